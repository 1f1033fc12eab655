"""The Config of a run: every hyper-parameter, its default and limits.

A field exists only if something reads it; each becomes the flag --section.field.
`result=False` marks fields that do not affect the result, so that they may change when
a run is resumed. Options of single commands are in commands.py; CommandConfig adds them.
"""

import dataclasses
import typing

from mtp_jax.config import commands
from mtp_jax.config import fields as fields_lib

# Head families -> whether each head, head 1 too, is one of n_layers layers. A
# family from outside the package is added by heads.register.
HEAD_FAMILIES = {
  'parallel': True,
  'causal': True,
  'anticausal': True,
  'linear': False,
  'residual': False,
  'sequential': False,
  'recursive': False,
}
KERNELS = {'splash': 'tpu', 'flash': 'gpu'}  # attention kernel -> platform
# full: attends to all earlier positions; sliding: to the last `window`; nope: to all,
# without RoPE.
LAYER_TYPES = ('full', 'sliding', 'nope')
TILE = 128  # block sizes of every kernel are multiples, in positions


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The shared trunk, and the shape that every block-like head repeats."""

  d_model: int = fields_lib.field(128, 'width of the residual stream', **fields_lib.limits(2**20))
  n_layers: int = fields_lib.field(
    5, 'number of layers, the blocks of block-first heads among them', **fields_lib.limits(10_000)
  )
  n_attn_heads: int = fields_lib.field(
    4, 'query heads per attention layer', **fields_lib.limits(2**16)
  )
  n_kv_heads: int = fields_lib.field(
    0, 'key/value heads per attention layer; 0 = n_attn_heads', **fields_lib.limits(2**16, 0)
  )
  d_head: int = fields_lib.field(
    0, 'width of an attention head; 0 = d_model / n_attn_heads', **fields_lib.limits(2**16, 0)
  )
  d_ff: int = fields_lib.field(
    0,
    'hidden width of the gated MLP; 0 = 8/3 d_model, rounded up to a multiple of 256',
    **fields_lib.limits(2**24, 0),
  )
  vocab_size: int = fields_lib.field(
    264, 'vocabulary size; rows of the embedding', min=2, max=2**24
  )
  rope_theta: float = fields_lib.field(10_000.0, 'base wavelength of RoPE', above=0, max=1e12)
  rope_factor: float = fields_lib.field(
    1.0,
    'scaling factor of the wavelengths of RoPE, see rope_scaling; 1 = no scaling',
    min=1,
    max=1e6,
  )
  rope_scaling: str = fields_lib.field(
    'llama3',
    'how rope_factor scales; llama3: long wavelengths (Llama 3.1, Grattafiori et al. 2024, '
    'arXiv 2407.21783); linear: all of them (Chen et al. 2023, arXiv 2306.15595); yarn: by '
    'their turns in the original context, with a temperature (Peng et al. 2023, arXiv '
    '2309.00071); RoPE of sliding layers is not scaled',
    choices=('llama3', 'linear', 'yarn'),
  )
  rope_low_freq: float = fields_lib.field(
    1.0,
    'wavelengths above original_max_position_embeddings / rope_low_freq are scaled by rope_factor',
    above=0,
    max=1e6,
  )
  rope_high_freq: float = fields_lib.field(
    4.0,
    'wavelengths below original_max_position_embeddings / rope_high_freq are not scaled',
    above=0,
    max=1e6,
  )
  rope_beta_fast: float = fields_lib.field(
    32.0,
    'yarn: wavelengths with more turns in the original context are not scaled',
    above=0,
    max=1e6,
  )
  rope_beta_slow: float = fields_lib.field(
    1.0, 'yarn: wavelengths with fewer turns in the original context are scaled', above=0, max=1e6
  )
  rope_truncate: bool = fields_lib.field(
    True, 'yarn: round the two limits to whole dimensions, as published models do'
  )
  rope_attention_factor: float = fields_lib.field(
    0.0, 'yarn: factor of queries and keys; 0 = 0.1 ln(rope_factor) + 1', min=0, max=1e6
  )
  rope_fraction: float = fields_lib.field(
    1.0, 'fraction of the dimensions of an attention head that RoPE rotates', above=0, max=1
  )
  sliding_rope_theta: float = fields_lib.field(
    0.0, 'base wavelength of RoPE of sliding layers; 0 = rope_theta', min=0, max=1e12
  )
  window: int = fields_lib.field(
    0,
    'sliding window: positions that a sliding layer attends to, its own among them; 0 = all',
    **fields_lib.UNSIGNED,
  )
  layer_types: str = fields_lib.field(
    '',
    'pattern of attention of the layers of the next token (trunk, then head 1), repeated: '
    'full, sliding or nope (full without RoPE), e.g. sliding*5,full; empty = all sliding '
    'where window is given, else full',
  )
  norm_placement: str = fields_lib.field(
    'before',
    'where a block has its RMSNorms: before attention and MLP, after them (on what they add '
    'to the residual stream; OLMo 2), or both (Gemma 2)',
    choices=('before', 'after', 'both'),
  )
  norm_offset: bool = fields_lib.field(
    False, 'RMSNorm multiplies by 1 + its weight, which starts at 0 (Gemma)'
  )
  qk_norm: str = fields_lib.field(
    'none',
    'RMSNorm of queries and keys before RoPE: per attention head (Qwen3), or over the whole '
    'width (OLMo 2)',
    choices=('none', 'head', 'full'),
  )
  qk_norm_eps: float = fields_lib.field(
    0.0, 'epsilon of the RMSNorm of queries and keys; 0 = norm_eps', min=0, max=1
  )
  qkv_bias: bool = fields_lib.field(False, 'biases of queries, keys and values')
  o_bias: bool = fields_lib.field(False, "bias of attention's output projection")
  mlp_bias: bool = fields_lib.field(False, 'biases of the MLP')
  activation: str = fields_lib.field(
    'silu',
    'activation of the gated MLP; gelu_tanh: its tanh approximation',
    choices=('silu', 'gelu', 'gelu_tanh'),
  )
  attn_scale: float = fields_lib.field(
    0.0, 'factor of attention scores; 0 = d_head^-0.5', min=0, max=1e6
  )
  attn_softcap: float = fields_lib.field(
    0.0, 'cap c of attention scores, c tanh(score / c) (Gemma 2); 0 = none', min=0, max=1e6
  )
  attn_sink: bool = fields_lib.field(
    False, 'a learned score per attention head in the denominator of softmax (gpt-oss)'
  )
  attn_gate: bool = fields_lib.field(
    False, "a sigmoid gate on attention's output, from its input (Qwen3-Next)"
  )
  embedding_scale: float = fields_lib.field(
    1.0, 'factor of embeddings, e.g. d_model^0.5 (Gemma)', above=0, max=1e6
  )
  residual_scale: float = fields_lib.field(
    1.0, 'factor of what attention and MLP add to the residual stream', above=0, max=1e6
  )
  logits_scale: float = fields_lib.field(1.0, 'factor of the logits', above=0, max=1e6)
  logits_softcap: float = fields_lib.field(
    0.0, 'cap c of the logits, c tanh(logit / c) (Gemma 2); 0 = none', min=0, max=1e6
  )
  max_position_embeddings: int = fields_lib.field(
    0,
    'context length that an export declares; 0 = data.seq_len',
    result=False,
    **fields_lib.UNSIGNED,
  )
  original_max_position_embeddings: int = fields_lib.field(
    8192, 'context length before RoPE was scaled by rope_factor', **fields_lib.POSITIVE
  )
  norm_eps: float = fields_lib.field(1e-5, 'epsilon of RMSNorm', above=0, max=1)
  param_dtype: str = fields_lib.field(
    'float32',
    'dtype of parameters at rest; with bfloat16 there is no float32 copy: an update is '
    'added in float32 and the sum is rounded stochastically, so that updates below the '
    'spacing of bfloat16 are not lost on average',
    choices=fields_lib.DTYPES,
  )
  compute_dtype: str = fields_lib.field(
    'bfloat16', 'dtype of matrix products and activations', choices=fields_lib.DTYPES
  )
  remat: str = fields_lib.field(
    'block',
    'rematerialization of trunk layers: none saves all activations, block the input of a '
    'layer, dots the products without a batch dimension',
    choices=('none', 'block', 'dots'),
  )
  attention: str = fields_lib.field(
    'auto',
    'attention kernel; reference: all pairs of scores; splash: TPU; flash: NVIDIA; auto: '
    'the kernel of the platform where seq_len is a multiple of 128',
    result=False,
    choices=('auto', 'reference', *KERNELS),
  )

  @property
  def kv_heads(self) -> int:
    return self.n_kv_heads or self.n_attn_heads

  @property
  def ff_width(self) -> int:
    return self.d_ff or 256 * -(-8 * self.d_model // (3 * 256))

  @property
  def head_width(self) -> int:
    return self.d_head or self.d_model // self.n_attn_heads

  @property
  def rotary_width(self) -> int:
    """Dimensions of an attention head that RoPE rotates."""
    return int(self.head_width * self.rope_fraction)

  @property
  def score_scale(self) -> float:
    return self.attn_scale or self.head_width**-0.5

  @property
  def pattern(self) -> tuple[str, ...]:
    """--model.layer_types, of LAYER_TYPES; of layer i the i-th, cyclically."""
    if not self.layer_types:
      return ('sliding' if self.window else 'full',)
    found = []
    for entry in self.layer_types.split(','):
      name, _, times = entry.partition('*')
      found += [name] * int(times or 1)
    return tuple(found)


MOST_TOKENS = 64  # of a window that a decoder verifies


@dataclasses.dataclass(frozen=True)
class HeadsConfig:
  """The prediction heads: head k predicts token t + k, unless they are strided."""

  n: int = fields_lib.field(
    4, 'number of prediction heads, i.e. future tokens predicted at once', **fields_lib.limits(1024)
  )
  family: str = fields_lib.field(
    'parallel', 'architecture of the prediction heads', choices=HEAD_FAMILIES
  )
  unembedding: str = fields_lib.field(
    'shared',
    'unembedding: one that all heads share, one per head, or the transposed input embedding',
    choices=('shared', 'replicated', 'tied'),
  )
  stride: int = fields_lib.field(
    1,
    'offset between the targets of consecutive heads: head k predicts token t + 1 + '
    'stride (k - 1); above 1, strided (leap) heads (Liu et al. 2025, arXiv 2505.17505)',
    **fields_lib.limits(2**24),
  )

  layer_type: str = fields_lib.field(
    'last',
    'attention of the blocks of heads >= 2: full, sliding or nope; last: that of the last '
    'layer of --model.layer_types (in an anticausal chain, of the layer that a head is)',
    choices=('last', *LAYER_TYPES),
  )
  window: int = fields_lib.field(
    0,
    'sliding window of heads of --heads.layer_type=sliding; 0 = model.window',
    **fields_lib.UNSIGNED,
  )
  trunk_state: str = fields_lib.field(
    'post_norm',
    'hidden states that sequential and recursive modules read; post_norm: after the final '
    'norm, of the trunk and of the module before, as vLLM, SGLang and Transformers hand '
    "them over; pre_norm: before it, as llama.cpp does; pre_norm_first: the trunk's before "
    "it and a module's after its own (Transformers with tie_last_hidden_states=false)",
    choices=('post_norm', 'pre_norm', 'pre_norm_first'),
  )
  markov_rank: int = fields_lib.field(
    0,
    'rank of a Markov head: the logits of heads >= 2 gain a product with the token before, '
    'drafted or of the text, so that drafts depend on each other (arXiv 2607.05147); 0 = off',
    **fields_lib.limits(2**16, 0),
  )
  draft_vocab: str = fields_lib.field(
    '',
    'number of tokens that heads >= 2 predict and draft: the most frequent of the first 2^28 of '
    'each store of --data.store; head 1 verifies with all; empty = all (arXiv 2502.14856)',
  )
  mix_hidden_states: bool = fields_lib.field(
    False,
    'in training, each token of a sequential or recursive module reads the hidden state of the '
    'trunk or of any module before, with equal probabilities, and not of the last one alone; '
    'a module is then less surprised when it is applied deeper than it was trained',
  )
  share_keys_values: bool = fields_lib.field(
    False,
    'of --heads.family=recursive: each step of the module attends to the keys and values of its '
    'first step, which alone has a cache; a decoder then computes the later steps at one '
    'position of a row',
  )
  confidence: bool = fields_lib.field(
    False,
    'train a vector that predicts the acceptance rate of each draft, for --decode.min_confidence; '
    'needs --heads.share_keys_values, by which later steps can be skipped, and a --loss.head_loss '
    'other than ce (arXiv 2607.05147)',
  )
  isolated: bool = fields_lib.field(
    False,
    'stop the gradients of heads >= 2 at what they share with head 1: trunk, embedding, '
    'final norm and a shared or tied unembedding; gradients are clipped apart',
  )

  @property
  def offsets(self) -> tuple[int, ...]:
    """The offset of each head's target from the query, in tokens."""
    return tuple(1 + self.stride * k for k in range(self.n))

  @property
  def most_drafts(self) -> int:
    """The number of drafts per forward pass that a decoder can make: n - 1, but for a
    shared module, which may be applied again."""
    again = self.family == 'recursive' and self.unembedding != 'replicated' and self.n > 1
    return MOST_TOKENS - 1 if again else self.n - 1

  @property
  def block_first(self) -> bool:
    """Whether every head is a block and one of n_layers; else head 1 is the identity."""
    return HEAD_FAMILIES[self.family]


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """The multi-head loss."""

  backward: str = fields_lib.field(
    'remat',
    'backward strategy; remat: a scan over rematerialized heads; interleaved: each head '
    'runs forward and backward at once, and nothing is computed twice',
    choices=('remat', 'interleaved'),
  )
  head_loss: str = fields_lib.field(
    'ce',
    'loss of heads >= 2; ce: cross-entropy with the text; the others compare a head with '
    'head 1 as it verifies the same token (p, without a gradient): kl, the divergence from p; '
    'tv: 1 - acceptance rate, sum min(p, q), of rejection sampling; lk: -log of that rate; '
    'lk_hybrid: kl, moving to tv as the rate rises (arXiv 2602.23881); e2e_tv: 1 - the mean '
    'probability that drafts 2 to k are all accepted (arXiv 2606.12370)',
    choices=('ce', 'kl', 'tv', 'lk', 'lk_hybrid', 'e2e_tv'),
  )
  teacher: str = fields_lib.field(
    '',
    'teacher of a --loss.head_loss other than ce: a run, or one of its checkpoints/STEP, whose '
    "next-token distribution takes the place of head 1's; it does not train, and has the same "
    'tokenizer; store: the probabilities that prepare stored by --data.teacher; empty = head 1 '
    'of the model itself',
  )
  head_ce_weight: float = fields_lib.field(
    0.0,
    'share of cross-entropy in the loss of heads >= 2 with another --loss.head_loss, which '
    'has the rest',
    min=0,
    max=1,
  )
  lk_eta: float = fields_lib.field(
    3.0, 'kl has the share exp(-lk_eta x acceptance rate) in lk_hybrid, tv the rest', min=0, max=1e3
  )
  temperature: float = fields_lib.field(
    1.0,
    'temperature of p and q in acceptance rates and in losses other than ce: the '
    '--decode.temperature that heads are trained for',
    min=1e-2,
    max=1e2,
  )
  top_k: int = fields_lib.field(
    0,
    'the --decode.top_k that heads are trained for, in acceptance rates and losses; 0 = off',
    **fields_lib.UNSIGNED,
  )
  top_p: float = fields_lib.field(
    1.0, 'the --decode.top_p that heads are trained for; 1 = off', above=0, max=1
  )
  min_p: float = fields_lib.field(
    0.0, 'the --decode.min_p that heads are trained for; 0 = off', min=0, below=1
  )
  chunk_size: int = fields_lib.field(
    0,
    'positions whose logits are in memory at the same time; 0 = 1,024 per device, or the '
    'most whose logits fit in 128 MiB',
    **fields_lib.UNSIGNED,
  )
  weights: str = fields_lib.field(
    '0:1',
    'weight of each head by step, e.g. 0:1,.3;50000:1,.1; the last weight is that of all '
    'further heads. ~ in place of ; moves linearly to the next, 0:1,.5~2000:1,0; '
    '0:beta=.6 is .6^(k-1) for head k, divided by their sum',
  )
  curriculum: str = fields_lib.field(
    '', 'number of active heads by step, e.g. 0:1;1000:2; empty = all'
  )
  z_loss: float = fields_lib.field(
    0.0, "weight of the z-loss (squared log-sum-exp) in each head's loss", min=0, max=1e6
  )
  token_order_weight: float = fields_lib.field(
    0.0,
    'weight of token order prediction, which ranks upcoming tokens by how soon they come, '
    "from head 1's hidden state (Zuhri et al. 2025, arXiv 2508.19228); 0 = off",
    min=0,
    max=1e6,
  )
  token_order_window: int = fields_lib.field(
    32,
    'upcoming tokens that token order prediction ranks; the d-th weighs e^-d, so that '
    'float32 sees no further than about 16',
    min=1,
    max=128,
  )
  grad_dtype: str = fields_lib.field(
    'float32',
    'dtype in which gradients are accumulated over heads and micro-batches',
    choices=fields_lib.DTYPES,
  )

  @property
  def compares(self) -> bool:
    """Whether heads >= 2 are trained on a comparison with a teacher."""
    return self.head_loss != 'ce'

  @property
  def head_ce_share(self) -> float:
    """The share of cross-entropy in the loss of heads >= 2."""
    return self.head_ce_weight if self.compares else 1.0

  @property
  def reads_stored_teacher(self) -> bool:
    return self.teacher == 'store'

  @property
  def filters(self) -> bool:
    """Whether top_k, top_p or min_p drops a token."""
    return bool(self.top_k or self.top_p < 1 or self.min_p)


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Documents, token stores, tokenizer and batches."""

  store: str = fields_lib.field(
    '',
    'token store: a directory, or a mixture [NAME=]PATH[:WEIGHT],… whose weights are '
    'shares of windows; NAME defaults to the last part of PATH',
    result=False,
  )
  documents: str = fields_lib.field(
    'python:stdlib',
    'documents that prepare reads, separated by commas: python:stdlib, python:PACKAGE, '
    'dir:PATH, text:PATH, jsonl:PATH#field, parquet:PATH#field, task:NAME; with '
    'jsonl:PATH#prompt+completion only the completion is trained on, with #messages '
    "only the assistant's turns of a conversation",
    result=False,
  )
  tokenizer: str = fields_lib.field(
    '',
    'tokenizer for prepare: bytes (UTF-8 bytes with BOS and EOS, the default), train:SIZE '
    '(SentencePiece, trained on the documents), sentencepiece:FILE.model, hf:FILE.json, '
    'tiktoken:FILE, task:stories; for other commands it must match the store',
  )
  teacher: str = fields_lib.field(
    '',
    'teacher for prepare: a run, or one of its checkpoints/STEP, whose most probable next tokens '
    'are stored with each token of the documents, for --loss.teacher=store; empty = none',
    result=False,
  )
  teacher_top_k: int = fields_lib.field(
    64, 'tokens that are stored per position of a teacher', result=False, **fields_lib.limits(2**16)
  )
  teacher_seq_len: int = fields_lib.field(
    0,
    'tokens that a teacher reads at once for prepare; longer documents are read in windows '
    'that overlap by half; 0 = its model.max_position_embeddings, or its data.seq_len',
    result=False,
    **fields_lib.limits(2**24, 0),
  )
  workers: int = fields_lib.field(
    0,
    'processes that tokenize documents; 0 = number of cores',
    result=False,
    **fields_lib.limits(4096, 0),
  )
  seq_len: int = fields_lib.field(256, 'sequence length in tokens (T)', **fields_lib.limits(2**24))
  batch_size: int = fields_lib.field(
    8, 'sequences per optimizer step, over all devices', **fields_lib.limits(2**24)
  )
  valid_fraction: float = fields_lib.field(
    0.02, 'fraction of documents in the validation split', result=False, min=0, below=1
  )
  overwrite: bool = fields_lib.field(False, 'replace an existing store', result=False)
  max_shard_gib: int = fields_lib.field(
    0,
    'maximum size of a token shard; 0 = 2**27 tokens, or more in a store of more than 512 '
    'such shards',
    result=False,
    **fields_lib.UNSIGNED,
  )
  max_document_mib: int = fields_lib.field(
    1024,
    'maximum size of a document (of jsonl: of a line); larger ones are skipped and reported',
    result=False,
    **fields_lib.POSITIVE,
  )
  verify: bool = fields_lib.field(True, 'verify checksums when a store is opened', result=False)
  read_threads: int = fields_lib.field(
    2, 'threads that read sequences', result=False, **fields_lib.limits(4096)
  )


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """The optimizer and its learning rate."""

  name: str = fields_lib.field(
    'adamw',
    'optimizer; muon updates the matrices between hidden states, and AdamW embeddings, '
    'unembeddings and norms',
    choices=('adamw', 'muon'),
  )
  lr: float = fields_lib.field(
    3e-4,
    'peak learning rate; an update of muon has the size of one of AdamW, so that both use one rate',
    above=0,
    max=1e3,
  )
  trunk_lr_mult: float = fields_lib.field(
    1.0,
    'learning-rate multiplier of the trunk (embedding, layers, final norm, and an '
    'unembedding that heads share)',
    above=0,
    max=1e6,
  )
  heads_lr_mult: float = fields_lib.field(
    1.0, 'learning-rate multiplier of the heads and of their own unembeddings', above=0, max=1e6
  )
  warmup_steps: int = fields_lib.field(100, 'steps of linear warm-up from 0', **fields_lib.UNSIGNED)
  schedule: str = fields_lib.field(
    'cosine',
    'learning-rate schedule after warm-up: cosine to min_lr_ratio, wsd (constant, then '
    'linear to min_lr_ratio within decay_steps), or constant',
    choices=('cosine', 'wsd', 'constant'),
  )
  min_lr_ratio: float = fields_lib.field(
    0.03, 'final learning rate / peak learning rate', min=0, max=1
  )
  decay_steps: int = fields_lib.field(0, 'decay steps of wsd', **fields_lib.UNSIGNED)
  b1: float = fields_lib.field(0.9, 'decay of the first moment of AdamW', min=0, below=1)
  b2: float = fields_lib.field(0.95, 'decay of the second moment of AdamW', min=0, below=1)
  momentum: float = fields_lib.field(0.95, 'decay of the Nesterov momentum of muon', min=0, below=1)
  eps: float = fields_lib.field(
    1e-8, 'epsilon added to the root of the second moment', above=0, max=1
  )
  weight_decay: float = fields_lib.field(0.1, 'decoupled weight decay of matrices', min=0, max=1e3)
  clip_norm: float = fields_lib.field(
    1.0, 'maximum global gradient norm; 0 = no clipping', min=0, max=1e30
  )
  moment_dtype: str = fields_lib.field(
    'float32',
    'dtype of the first moment, or momentum; the second moment is float32',
    choices=fields_lib.DTYPES,
  )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; one of them may be -1 = the remaining ones."""

  data: int = fields_lib.field(
    1,
    'replicas of the parameters; -1 = all devices left',
    result=False,
    **fields_lib.limits(2**20, -1),
  )
  fsdp: int = fields_lib.field(
    -1,
    'shards of parameters and of the batch; -1 = all devices left',
    result=False,
    **fields_lib.limits(2**20, -1),
  )
  tensor: int = fields_lib.field(
    1,
    'shards of a layer and of the vocabulary; -1 = all devices left',
    result=False,
    **fields_lib.limits(2**20, -1),
  )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The training loop: steps, logs, evaluations, checkpoints."""

  workdir: str = fields_lib.field(
    '', 'directory of the run, on a disk or gs://BUCKET/…', result=False
  )
  steps: int = fields_lib.field(1000, 'optimizer steps', result=False, **fields_lib.POSITIVE)
  init_from: str = fields_lib.field(
    '',
    'run, or one of its checkpoints/STEP, from whose parameters a new run is initialized '
    '(warm start); its heads may differ',
  )
  head_init: str = fields_lib.field(
    'copy',
    'initialization of heads that the warm start does not have: a copy of head 1, or random',
    choices=('copy', 'random'),
  )
  freeze: str = fields_lib.field(
    'none',
    'parameters that do not train: trunk (embedding, layers, final norm, an unembedding '
    'that heads share), or heads',
    choices=('none', 'trunk', 'heads'),
  )
  grad_accum_steps: int = fields_lib.field(
    1, 'micro-batches per optimizer step', **fields_lib.limits(2**24)
  )
  seed: int = fields_lib.field(
    0, 'random seed for initialization, data order and stochastic rounding', min=0, max=2**32 - 1
  )
  log_every: int = fields_lib.field(
    10, 'steps between log lines', result=False, **fields_lib.POSITIVE
  )
  eval_every: int = fields_lib.field(
    0,
    'steps between evaluations on validation data; 0 = after the last step only',
    result=False,
    **fields_lib.UNSIGNED,
  )
  eval_tasks_every: int = fields_lib.field(
    0,
    'steps between evaluations of eval.tasks; 0 = after the last step only',
    result=False,
    **fields_lib.UNSIGNED,
  )
  checkpoint_every: int = fields_lib.field(
    0,
    'steps between checkpoints; 0 = after the last step only',
    result=False,
    **fields_lib.UNSIGNED,
  )
  max_to_keep: int = fields_lib.field(
    2, 'newest checkpoints to keep, at least two', result=False, **fields_lib.POSITIVE
  )
  keep_every: int = fields_lib.field(
    0,
    'checkpoints at multiples of this step are kept as well; 0 = none',
    result=False,
    **fields_lib.UNSIGNED,
  )
  max_nonfinite: int = fields_lib.field(
    10, 'consecutive non-finite steps that end the run, at its next log line', **fields_lib.POSITIVE
  )
  watchdog_s: float = fields_lib.field(
    1800.0,
    'seconds without a step, a compilation or an evaluation batch after which a process '
    'prints its stacks and exits; 0 = never',
    result=False,
    min=0,
    max=1e8,
  )
  spike_sigma: float = fields_lib.field(
    10.0,
    'standard deviations above the median of the last 128 losses of head 1 that count as '
    'a loss spike, which is logged; 0 = off',
    result=False,
    min=0,
    max=1e6,
  )
  skip_batches: int = fields_lib.field(
    0,
    'batches to skip, up to that of a loss spike, when a run rolls back to the checkpoint '
    'before it; 0 = no rollback',
    **fields_lib.UNSIGNED,
  )
  profile_start: int = fields_lib.field(
    0, 'first step to profile', result=False, **fields_lib.UNSIGNED
  )
  profile_steps: int = fields_lib.field(
    0, 'number of steps to profile; 0 = off', result=False, **fields_lib.UNSIGNED
  )
  compilation_cache: str = fields_lib.field(
    '~/.cache/mtp_jax', 'directory of the persistent compilation cache; empty = off', result=False
  )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Evaluation of a checkpoint."""

  split: str = fields_lib.field(
    'valid', 'split of the store', result=False, choices=('train', 'valid')
  )
  stores: str = fields_lib.field(
    '',
    'further stores to evaluate on, [NAME=]PATH,…: this split of each, or all of a store '
    'without splits',
    result=False,
  )
  batches: int = fields_lib.field(
    0, 'batches per store, spread over it; 0 = all', result=False, **fields_lib.UNSIGNED
  )
  tasks: str = fields_lib.field(
    'heldout', 'evaluators, NAME or NAME:ARG, separated by commas', result=False
  )
  limit: int = fields_lib.field(
    0,
    'number of items per task (or per level of a task); 0 = all',
    result=False,
    **fields_lib.UNSIGNED,
  )
  data: str = fields_lib.field(
    '',
    'data of a task: its file of problems, a directory of lm_eval tasks, or documents as '
    'in data.documents',
    result=False,
  )
  num_fewshot: int = fields_lib.field(
    -1,
    'few-shot examples per problem; -1 = as usual for the task',
    result=False,
    min=-1,
    max=10_000,
  )
  samples: int = fields_lib.field(
    1, 'sampled programs per problem', result=False, **fields_lib.limits(10**6)
  )
  temperatures: str = fields_lib.field(
    '',
    'sampling temperatures of programs, with commas, each evaluated separately; empty = 0 '
    'for one sample, 0.2,0.8 for several',
    result=False,
  )
  pass_at_k: str = fields_lib.field(
    '', 'values of k for pass@k, with commas; empty = 1,10,100 up to eval.samples', result=False
  )
  allow_code_execution: bool = fields_lib.field(
    False, 'allow programs written by the model to run on this machine', result=False
  )
  sandbox: str = fields_lib.field(
    'full',
    'sandbox of programs; full: as user nobody in namespaces of its own, with no other '
    'file, process or network; weak: limits and an empty directory, no protection from '
    'malicious programs',
    result=False,
    choices=('full', 'weak'),
  )
  timeout_s: float = fields_lib.field(
    10.0, 'time limit of a program in seconds', result=False, above=0, max=1e6
  )


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that defines a run."""

  model: ModelConfig = ModelConfig()
  heads: HeadsConfig = HeadsConfig()
  loss: LossConfig = LossConfig()
  data: DataConfig = DataConfig()
  optim: OptimConfig = OptimConfig()
  mesh: MeshConfig = MeshConfig()
  train: TrainConfig = TrainConfig()
  eval: EvalConfig = EvalConfig()

  @property
  def span(self) -> int:
    """Number of target tokens that a window has after its last query."""
    order = self.loss.token_order_window if self.loss.token_order_weight else 0
    return max(self.heads.offsets[-1], order)


@dataclasses.dataclass(frozen=True)
class CommandConfig(Config):
  """A run's Config and the options of the command at hand, which are not saved."""

  distributed: commands.DistributedConfig = commands.DistributedConfig()
  decode: commands.DecodeConfig = commands.DecodeConfig()
  export: commands.ExportConfig = commands.ExportConfig()
  import_: commands.ImportConfig = commands.ImportConfig()
  inspect: commands.InspectConfig = commands.InspectConfig()
  plan: commands.PlanConfig = commands.PlanConfig()
  bench: commands.BenchConfig = commands.BenchConfig()


AnyConfig = typing.TypeVar('AnyConfig', bound=Config)
SECTIONS = tuple(field.name for field in dataclasses.fields(Config))


def fields(of: type[Config] = CommandConfig) -> dict[str, dataclasses.Field]:
  """Returns {'section.field': dataclass field}, in declaration order; those of a run
  with of=Config."""
  return {
    f'{section.name.rstrip("_")}.{field.name}': field
    for section in dataclasses.fields(of)
    for field in dataclasses.fields(typing.get_type_hints(of)[section.name])
  }


def run_config(cfg: Config) -> Config:
  """Returns the Config of a run alone, without the options of a command."""
  return Config(**{name: getattr(cfg, name) for name in SECTIONS})


def command_config(cfg: Config) -> CommandConfig:
  """Returns a run's Config with the options of commands at their defaults."""
  return CommandConfig(**{name: getattr(cfg, name) for name in SECTIONS})


def type_of(field: dataclasses.Field) -> type:
  """Returns the type of a field's values."""
  assert isinstance(field.type, type)  # no annotation here is a string
  return field.type


def get(cfg: Config, name: str):
  """Returns the value of the field 'section.field'."""
  section, field = name.split('.')
  return getattr(getattr(cfg, _attribute(section)), field)


def _attribute(section: str) -> str:
  """Returns the attribute of a section; `import` is a Python keyword."""
  return 'import_' if section == 'import' else section


def replace(cfg: AnyConfig, **values) -> AnyConfig:
  """Returns a Config with some 'section.field' values changed, not validated."""
  by_section = {}
  for name, value in values.items():
    section, field = name.split('.')
    by_section.setdefault(_attribute(section), {})[field] = value
  return dataclasses.replace(
    cfg,
    **{
      section: dataclasses.replace(getattr(cfg, section), **changed)
      for section, changed in by_section.items()
    },
  )


def fixed() -> list[str]:
  """Returns the names of the fields that affect a run's result."""
  return [name for name, field in fields(Config).items() if field.metadata['result']]


def changed(old: Config, new: Config) -> list[tuple[str, object, object]]:
  """Returns (name, old, new) of the fields that affect a run's result and differ."""
  return [
    (name, get(old, name), get(new, name)) for name in fixed() if get(old, name) != get(new, name)
  ]
