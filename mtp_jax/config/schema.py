"""TODO of mtp_jax.config."""

import dataclasses
import typing

from mtp_jax.config import commands
from mtp_jax.config import fields as fields_lib

BLOCK_FIRST = ('parallel', 'causal', 'anticausal')
KERNELS = {'splash': 'tpu', 'flash': 'gpu'}  # of attention -> its platform
TILE = 128  # positions, that every kernel cuts a row into multiples of


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The shared trunk, and the shape that every block-like head repeats."""

  d_model: int = fields_lib.field(128, 'width of the residual stream', **fields_lib.limits(2**20))
  n_layers: int = fields_lib.field(
    5, 'layers in all; block-like heads are counted in', **fields_lib.limits(10_000)
  )
  n_attn_heads: int = fields_lib.field(4, 'query heads of an attention', **fields_lib.limits(2**16))
  n_kv_heads: int = fields_lib.field(
    0, 'key/value heads; 0 = n_attn_heads', **fields_lib.limits(2**16, 0)
  )
  d_head: int = fields_lib.field(
    0, 'width of a query head; 0 = d_model / n_attn_heads', **fields_lib.limits(2**16, 0)
  )
  d_ff: int = fields_lib.field(
    0,
    'width of the SwiGLU; 0 = 8/3 d_model, up to a multiple of 256',
    **fields_lib.limits(2**24, 0),
  )
  vocab_size: int = fields_lib.field(264, 'rows of the embedding, in tokens', min=2, max=2**24)
  rope_theta: float = fields_lib.field(10_000.0, 'base wavelength of RoPE', above=0, max=1e12)
  rope_factor: float = fields_lib.field(
    1.0,
    'how far Llama 3.1 stretches the long wavelengths of RoPE (Grattafiori et'
    ' al. 2024, arXiv 2407.21783); 1 = not at all',
    min=1,
    max=1e6,
  )
  rope_low_freq: float = fields_lib.field(
    1.0, 'wavelengths above rope_context over this are stretched by rope_factor', above=0, max=1e6
  )
  rope_high_freq: float = fields_lib.field(
    4.0, 'wavelengths below rope_context over this are left as they are', above=0, max=1e6
  )
  max_position_embeddings: int = fields_lib.field(
    0,
    'positions that it is for, which an export tells other programs; 0 = those'
    ' it trains on, data.seq_len',
    result=False,
    **fields_lib.UNSIGNED,
  )
  original_max_position_embeddings: int = fields_lib.field(
    8192, 'context, in tokens, that the wavelengths were made for', **fields_lib.POSITIVE
  )
  norm_eps: float = fields_lib.field(1e-5, 'epsilon of RMSNorm', above=0, max=1)
  param_dtype: str = fields_lib.field(
    'float32',
    'of parameters at rest. bfloat16 keeps no float32 copy: an update is added'
    ' in float32 and the sum rounded up or down at random, so that on average'
    ' nothing is lost of a step below the spacing of bfloat16',
    choices=fields_lib.DTYPES,
  )
  compute_dtype: str = fields_lib.field(
    'bfloat16', 'of matrix products and activations', choices=fields_lib.DTYPES
  )
  remat: str = fields_lib.field(
    'block',
    'kept of a trunk layer for its backward: everything, its input, or its'
    ' products without a batch dimension',
    choices=('none', 'block', 'dots'),
  )
  attention: str = fields_lib.field(
    'auto',
    'reference: scores of all pairs; splash: TPU kernel; flash: NVIDIA kernels;'
    ' auto: the kernel of the platform, where seq_len is a multiple of 128',
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


@dataclasses.dataclass(frozen=True)
class HeadsConfig:
  """The prediction heads: head k predicts token t + k, unless they leap."""

  n: int = fields_lib.field(
    4, 'prediction heads, i.e. future tokens predicted', **fields_lib.limits(1024)
  )
  family: str = fields_lib.field(
    'parallel',
    'how head k is computed from the trunk',
    choices=(*BLOCK_FIRST, 'linear', 'residual', 'sequential', 'recursive'),
  )
  unembedding: str = fields_lib.field(
    'shared',
    'one for all heads, one a head, or the input embedding transposed',
    choices=('shared', 'replicated', 'tied'),
  )
  stride: int = fields_lib.field(
    1,
    'head k predicts token t + 1 + stride (k - 1); above 1 the heads leap'
    ' (Liu et al. 2025, arXiv 2505.17505)',
    **fields_lib.limits(2**24),
  )

  @property
  def offsets(self) -> tuple[int, ...]:
    """How far ahead of the query each head's target lies, in tokens."""
    return tuple(1 + self.stride * k for k in range(self.n))

  @property
  def block_first(self) -> bool:
    """Every head is a block and one of n_layers; else head 1 is z itself."""
    return self.family in BLOCK_FIRST


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """The multi-head loss."""

  backward: str = fields_lib.field(
    'remat',
    'remat: a scan of rematerialised heads; interleaved: each head runs forward and'
    ' backward at once, nothing is computed twice',
    choices=('remat', 'interleaved'),
  )
  chunk_size: int = fields_lib.field(
    0,
    'positions whose logits are alive at once; 0 = the most with logits of half a GiB a device',
    **fields_lib.UNSIGNED,
  )
  weights: str = fields_lib.field(
    '0:1',
    'weight by head from a step on, e.g. 0:1,.3;50000:1,.1; the last weight'
    ' serves all further heads',
  )
  curriculum: str = fields_lib.field(
    '', 'active heads from a step on, e.g. 0:1;1000:2; empty = all of them'
  )
  z_loss: float = fields_lib.field(
    0.0, 'weight of the squared log-sum-exp inside each head loss', min=0, max=1e6
  )
  token_order_weight: float = fields_lib.field(
    0.0,
    'weight of token order prediction: one more unembedding of head 1 ranks'
    ' the tokens to come by how soon (Zuhri et al. 2025, arXiv 2508.19228);'
    ' 0 = without',
    min=0,
    max=1e6,
  )
  token_order_window: int = fields_lib.field(
    32,
    'tokens ahead that it ranks; the d-th counts e^-d, so that float32 sees'
    ' no further than about 16',
    min=1,
    max=128,
  )
  grad_dtype: str = fields_lib.field(
    'float32',
    'in which gradients are summed over heads and micro-batches',
    choices=fields_lib.DTYPES,
  )


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where tokens come from."""

  store: str = fields_lib.field(
    '',
    'directory of a token store, or a mixture [NAME=]PATH[:WEIGHT],…: shares of'
    ' windows; NAME is the last part of PATH unless given',
    result=False,
  )
  documents: str = fields_lib.field(
    'python:stdlib',
    'sources for prepare, separated by commas: python:stdlib, python:PACKAGE,'
    ' dir:PATH, text:PATH, jsonl:PATH#field, parquet:PATH#field, task:NAME;'
    ' jsonl:PATH#prompt+completion scores the completion only',
    result=False,
  )
  tokenizer: str = fields_lib.field(
    '',
    'of prepare: bytes (UTF-8 bytes with BOS and EOS; also if empty),'
    ' train:SIZE (SentencePiece, trained on the documents),'
    ' sentencepiece:FILE.model, hf:FILE.json, tiktoken:FILE; afterwards: that'
    ' of the store, refused if it is another',
  )
  workers: int = fields_lib.field(
    0,
    'processes that encode documents; 0 = as many as cores',
    result=False,
    **fields_lib.limits(4096, 0),
  )
  seq_len: int = fields_lib.field(256, 'queries of a window, in tokens', **fields_lib.limits(2**24))
  batch_size: int = fields_lib.field(
    8, 'windows of one optimizer step, over all devices', **fields_lib.limits(2**24)
  )
  valid_fraction: float = fields_lib.field(
    0.02, 'share of documents that prepare holds out', result=False, min=0, below=1
  )
  overwrite: bool = fields_lib.field(
    False, 'prepare replaces the store that is there', result=False
  )
  max_shard_gib: int = fields_lib.field(
    0,
    'size limit of a file of tokens that prepare writes; 0 = 2**27 tokens, more'
    ' in a store of more than 512 such shards',
    result=False,
    **fields_lib.UNSIGNED,
  )
  max_document_mib: int = fields_lib.field(
    1024,
    'prepare skips larger documents (of jsonl: larger lines), by name',
    result=False,
    **fields_lib.POSITIVE,
  )
  verify: bool = fields_lib.field(
    True, 'check the checksums of a store when it is opened', result=False
  )
  read_threads: int = fields_lib.field(
    2, 'threads that read rows', result=False, **fields_lib.limits(4096)
  )


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """The optimizer and its learning rate."""

  name: str = fields_lib.field(
    'adamw',
    'update rule; muon: of the matrices between hidden states, AdamW for'
    ' embeddings, unembeddings and norms',
    choices=('adamw', 'muon'),
  )
  lr: float = fields_lib.field(
    3e-4,
    'peak learning rate; an update of muon is as large as one of AdamW, so that'
    ' one rate serves both',
    above=0,
    max=1e3,
  )
  trunk_lr_mult: float = fields_lib.field(
    1.0,
    'learning rate over lr of the trunk: embedding, layers, final norm, and an'
    ' unembedding that heads share',
    above=0,
    max=1e6,
  )
  heads_lr_mult: float = fields_lib.field(
    1.0, 'learning rate over lr of the heads, and of unembeddings of their own', above=0, max=1e6
  )
  warmup_steps: int = fields_lib.field(100, 'steps of linear warm-up from 0', **fields_lib.UNSIGNED)
  schedule: str = fields_lib.field(
    'cosine',
    'after the warm-up: cosine down to end_ratio, wsd (constant, then linear'
    ' to end_ratio within decay_steps), or constant',
    choices=('cosine', 'wsd', 'constant'),
  )
  min_lr_ratio: float = fields_lib.field(0.03, 'last learning rate over peak', min=0, max=1)
  decay_steps: int = fields_lib.field(0, 'steps of the decay of wsd', **fields_lib.UNSIGNED)
  b1: float = fields_lib.field(0.9, 'decay of the first moment of AdamW', min=0, below=1)
  b2: float = fields_lib.field(0.95, 'decay of the second moment of AdamW', min=0, below=1)
  momentum: float = fields_lib.field(
    0.95, 'decay of the (Nesterov) momentum of muon', min=0, below=1
  )
  eps: float = fields_lib.field(1e-8, 'added to the root of the second moment', above=0, max=1)
  weight_decay: float = fields_lib.field(0.1, 'decoupled decay of matrices', min=0, max=1e3)
  clip_norm: float = fields_lib.field(1.0, 'global gradient norm; 0 = no clipping', min=0, max=1e30)
  moment_dtype: str = fields_lib.field(
    'float32', 'of the first moment, or momentum; the second is float32', choices=fields_lib.DTYPES
  )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; one of them may be -1 = what is left."""

  data: int = fields_lib.field(
    1, 'replicas of the parameters', result=False, **fields_lib.limits(2**20, -1)
  )
  fsdp: int = fields_lib.field(
    -1, 'shards of parameters and of the batch', result=False, **fields_lib.limits(2**20, -1)
  )
  tensor: int = fields_lib.field(
    1, 'shards of a layer and of the vocabulary', result=False, **fields_lib.limits(2**20, -1)
  )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The loop."""

  workdir: str = fields_lib.field('', 'directory of the run; it may be gs://BUCKET/…', result=False)
  steps: int = fields_lib.field(1000, 'optimizer steps', result=False, **fields_lib.POSITIVE)
  init_from: str = fields_lib.field(
    '',
    'workdir of a run, or one of its checkpoints/STEP, whose parameters a new'
    ' run begins with; its heads may be others',
  )
  head_init: str = fields_lib.field(
    'copy',
    'initial parameters of heads that the other run does not have: as head 1, or random',
    choices=('copy', 'random'),
  )
  freeze: str = fields_lib.field(
    'none',
    'what does not train: trunk (embedding, layers, final norm, an unembedding'
    ' that heads share), or heads',
    choices=('none', 'trunk', 'heads'),
  )
  grad_accum_steps: int = fields_lib.field(
    1, 'micro-batches of one optimizer step', **fields_lib.limits(2**24)
  )
  seed: int = fields_lib.field(
    0, 'of initial parameters, the order of data, and random rounding', min=0, max=2**32 - 1
  )
  log_every: int = fields_lib.field(
    10, 'steps from one log line to the next', result=False, **fields_lib.POSITIVE
  )
  eval_every: int = fields_lib.field(
    0, 'steps between evaluations; 0 = at the end', result=False, **fields_lib.UNSIGNED
  )
  eval_tasks_every: int = fields_lib.field(
    0,
    'steps between evaluations by the suites of eval.tasks; 0 = after the last step only',
    result=False,
    **fields_lib.UNSIGNED,
  )
  checkpoint_every: int = fields_lib.field(
    0, 'steps between checkpoints; 0 = at the end', result=False, **fields_lib.UNSIGNED
  )
  max_to_keep: int = fields_lib.field(
    2,
    'newest checkpoints kept; at 1 the one before stays as well',
    result=False,
    **fields_lib.POSITIVE,
  )
  keep_every: int = fields_lib.field(
    0,
    'checkpoints at multiples of this step are kept as well; 0 = none',
    result=False,
    **fields_lib.UNSIGNED,
  )
  max_nonfinite: int = fields_lib.field(
    10, 'non-finite steps in a row that end the run, at its next log line', **fields_lib.POSITIVE
  )
  watchdog_s: float = fields_lib.field(
    1800.0,
    'seconds without a step, a compiled program or a batch of an evaluation'
    ' after which a process ends, with its stacks; 0 = never',
    result=False,
    min=0,
    max=1e8,
  )
  spike_sigma: float = fields_lib.field(
    10.0,
    'deviations above the median of the last 128 losses of head 1 that make a'
    ' spike, which is said and counted; 0 = none is',
    result=False,
    min=0,
    max=1e6,
  )
  skip_batches: int = fields_lib.field(
    0,
    'batches left out for good, up to that of a spike, when a run goes back to'
    ' the last checkpoint before it; 0 = it does not go back',
    **fields_lib.UNSIGNED,
  )
  profile_start: int = fields_lib.field(
    0, 'first step of the profile', result=False, **fields_lib.UNSIGNED
  )
  profile_steps: int = fields_lib.field(
    0, 'steps in the profile; 0 = no profile', result=False, **fields_lib.UNSIGNED
  )
  compilation_cache: str = fields_lib.field(
    '~/.cache/mtp_jax', 'directory of compiled programs; empty = none', result=False
  )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Evaluation of a checkpoint."""

  split: str = fields_lib.field(
    'valid', 'part of the store', result=False, choices=('train', 'valid')
  )
  stores: str = fields_lib.field(
    '',
    'further stores to evaluate on, [NAME=]PATH,…: this split of each, or all'
    ' of one that is not split',
    result=False,
  )
  batches: int = fields_lib.field(
    0,
    'batches of data.batch_size windows a store, spread over it; 0 = all',
    result=False,
    **fields_lib.UNSIGNED,
  )
  tasks: str = fields_lib.field(
    'heldout', 'evaluators, NAME or NAME:ARG,…; see README', result=False
  )
  limit: int = fields_lib.field(
    0,
    'items of a suite, its first ones, or of each of its levels; 0 = all',
    result=False,
    **fields_lib.UNSIGNED,
  )
  data: str = fields_lib.field(
    '',
    'what a suite asks of: its file of problems, a directory of further tasks'
    ' (lm_eval), or documents as data.documents names them',
    result=False,
  )
  num_fewshot: int = fields_lib.field(
    -1,
    'worked examples before each problem; -1 = as the suite is used',
    result=False,
    min=-1,
    max=10_000,
  )
  samples: int = fields_lib.field(
    1, 'answers to each problem that are run', result=False, **fields_lib.limits(10**6)
  )
  temperatures: str = fields_lib.field(
    '',
    'of the answers that are run, with commas, each scored by itself; empty = 0'
    ' for one answer, 0.2,0.8 for several',
    result=False,
  )
  pass_at_k: str = fields_lib.field(
    '',
    'of pass@k, with commas: the chance that one of k answers passes; empty ='
    ' 1,10,100 up to --eval.samples',
    result=False,
  )
  allow_code_execution: bool = fields_lib.field(
    False, 'programs that the model wrote may run on this machine', result=False
  )
  sandbox: str = fields_lib.field(
    'full',
    'around a program. full: as nobody, in namespaces of its own: no other'
    ' file, process or network; weak: limits and an empty folder, no protection'
    ' from a program that means harm',
    result=False,
    choices=('full', 'weak'),
  )
  timeout_s: float = fields_lib.field(
    10.0, 'seconds that a program has, each time it runs', result=False, above=0, max=1e6
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
  distributed: commands.DistributedConfig = commands.DistributedConfig()
  train: TrainConfig = TrainConfig()
  eval: EvalConfig = EvalConfig()
  decode: commands.DecodeConfig = commands.DecodeConfig()
  export: commands.ExportConfig = commands.ExportConfig()
  import_: commands.ImportConfig = commands.ImportConfig()
  inspect: commands.InspectConfig = commands.InspectConfig()
  plan: commands.PlanConfig = commands.PlanConfig()
  bench: commands.BenchConfig = commands.BenchConfig()

  @property
  def span(self) -> int:
    """Tokens that a window carries past its last query, as targets."""
    order = self.loss.token_order_window if self.loss.token_order_weight else 0
    return max(self.heads.offsets[-1], order)


def fields() -> dict[str, dataclasses.Field]:
  """'section.field' -> its dataclass field, in reading order."""
  hints = typing.get_type_hints(Config)
  return {
    f'{section.rstrip("_")}.{field.name}': field
    for section, cls in hints.items()
    for field in dataclasses.fields(cls)
  }


def get(cfg: Config, name: str):
  """Value of the field called 'section.field'."""
  section, field = name.split('.')
  return getattr(getattr(cfg, _attribute(section)), field)


def _attribute(section: str) -> str:
  """import is a word of Python's own."""
  return 'import_' if section == 'import' else section


def replace(cfg: Config, **values) -> Config:
  """A Config with some 'section.field' values changed, not yet checked."""
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


def changed(old: Config, new: Config) -> list[tuple[str, object, object]]:
  """Fields that change a run's result and differ: (name, old, new)."""
  return [
    (name, get(old, name), get(new, name))
    for name, field in fields().items()
    if field.metadata['result'] and get(old, name) != get(new, name)
  ]
