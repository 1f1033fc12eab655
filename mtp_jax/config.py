"""One frozen Config: every hyper-parameter of a run, its unit and its limits.

Floor 0: standard library only. A field exists only if something reads it; each
becomes the flag --section.field (flags.py). `result=False` marks what may
change when a run is resumed, because it does not change what is computed.
"""

import dataclasses
import fractions
import json
import os
import re
import typing

from mtp_jax import jsonl

VERSION = 1  # of the JSON form; raised when a field changes its meaning
DTYPES = ('float32', 'bfloat16')
BLOCK_FIRST = ('parallel', 'causal', 'anticausal')
KERNELS = {'splash': 'tpu', 'flash': 'gpu'}  # of attention -> its platform
TILE = 128  # positions, that every kernel cuts a row into multiples of
INT32 = 2**31 - 1
MOST_POSITIONS = 2**20  # of a row that is decoded
UNSIGNED = dict(min=0, max=INT32)
POSITIVE = dict(min=1, max=INT32)


def _to(most, least=1):
  """Limits of a number; the upper one is far beyond any use."""
  return dict(min=least, max=most)


class ConfigError(ValueError):
  """One line that names the flag, its value and what is allowed."""

  status = 2  # with which a process then ends

  def __init__(self, flag: str, value: object, allowed: str):
    super().__init__(flag, value, allowed)  # as pickle hands them on

  def __str__(self):
    flag, value, allowed = self.args
    line = f'--{flag}={jsonl.one_line(value)}: '
    return line + jsonl.one_line(allowed, 1000)


def wrong_text(text: str) -> str:
  """Why a text cannot be a flag's: libraries can neither open nor store it.
  Empty if it can."""
  if '\0' in text:
    return 'must not contain a NUL character'
  try:
    text.encode()
  except UnicodeEncodeError:  # bytes of the command line that no decoder takes
    return 'must be UTF-8'
  return ''


class FileChanged(ConfigError):
  """An input that changed during a run; one process of several may find it."""


def _f(default, help, *, result=True, **limits):
  metadata = dict(help=help, result=result, **limits)
  return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Model:
  """The shared trunk, and the shape that every block-like head repeats."""

  d_model: int = _f(128, 'width of the residual stream', **_to(2**20))
  n_layers: int = _f(5, 'layers in all; block-like heads are counted in', **_to(10_000))
  n_attn_heads: int = _f(4, 'query heads of an attention', **_to(2**16))
  n_kv_heads: int = _f(0, 'key/value heads; 0 = n_attn_heads', **_to(2**16, 0))
  d_head: int = _f(0, 'width of a query head; 0 = d_model / n_attn_heads', **_to(2**16, 0))
  d_ff: int = _f(
    0, 'width of the SwiGLU; 0 = 8/3 d_model, up to a multiple of 256', **_to(2**24, 0)
  )
  vocab_size: int = _f(264, 'rows of the embedding, in tokens', min=2, max=2**24)
  rope_theta: float = _f(10_000.0, 'base wavelength of RoPE', above=0, max=1e12)
  rope_factor: float = _f(
    1.0,
    'how far Llama 3.1 stretches the long wavelengths of RoPE (Grattafiori et'
    ' al. 2024, arXiv 2407.21783); 1 = not at all',
    min=1,
    max=1e6,
  )
  rope_low_freq: float = _f(
    1.0, 'wavelengths above rope_context over this are stretched by rope_factor', above=0, max=1e6
  )
  rope_high_freq: float = _f(
    4.0, 'wavelengths below rope_context over this are left as they are', above=0, max=1e6
  )
  context: int = _f(
    0,
    'positions that it is for, which an export tells other programs; 0 = those'
    ' it trains on, data.seq_len',
    result=False,
    **UNSIGNED,
  )
  rope_context: int = _f(8192, 'context, in tokens, that the wavelengths were made for', **POSITIVE)
  norm_eps: float = _f(1e-5, 'epsilon of RMSNorm', above=0, max=1)
  param_dtype: str = _f(
    'float32',
    'of parameters at rest. bfloat16 keeps no float32 copy: an update is added'
    ' in float32 and the sum rounded up or down at random, so that on average'
    ' nothing is lost of a step below the spacing of bfloat16',
    choices=DTYPES,
  )
  compute_dtype: str = _f('bfloat16', 'of matrix products and activations', choices=DTYPES)
  remat: str = _f(
    'block',
    'kept of a trunk layer for its backward: everything, its input, or its'
    ' products without a batch dimension',
    choices=('none', 'block', 'dots'),
  )
  attention: str = _f(
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
class Heads:
  """The prediction heads: head k predicts token t + k, unless they leap."""

  n: int = _f(4, 'prediction heads, i.e. future tokens predicted', **_to(1024))
  family: str = _f(
    'parallel',
    'how head k is computed from the trunk',
    choices=(*BLOCK_FIRST, 'linear', 'residual', 'sequential', 'recursive'),
  )
  unembedding: str = _f(
    'shared',
    'one for all heads, one a head, or the input embedding transposed',
    choices=('shared', 'replicated', 'tied'),
  )
  stride: int = _f(
    1,
    'head k predicts token t + 1 + stride (k - 1); above 1 the heads leap'
    ' (Liu et al. 2025, arXiv 2505.17505)',
    **_to(2**24),
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
class Loss:
  """The multi-head loss."""

  schedule: str = _f(
    'remat',
    'remat: a scan of rematerialised heads; eager: each head runs forward and'
    ' backward at once, nothing is computed twice',
    choices=('remat', 'eager'),
  )
  chunk: int = _f(
    0,
    'positions whose logits are alive at once; 0 = the most with logits of half a GiB a device',
    **UNSIGNED,
  )
  weights: str = _f(
    '0:1',
    'weight by head from a step on, e.g. 0:1,.3;50000:1,.1; the last weight'
    ' serves all further heads',
  )
  curriculum: str = _f('', 'active heads from a step on, e.g. 0:1;1000:2; empty = all of them')
  z_loss: float = _f(0.0, 'weight of the squared log-sum-exp inside each head loss', min=0, max=1e6)
  order_weight: float = _f(
    0.0,
    'weight of token order prediction: one more unembedding of head 1 ranks'
    ' the tokens to come by how soon (Zuhri et al. 2025, arXiv 2508.19228);'
    ' 0 = without',
    min=0,
    max=1e6,
  )
  order_window: int = _f(
    32,
    'tokens ahead that it ranks; the d-th counts e^-d, so that float32 sees'
    ' no further than about 16',
    min=1,
    max=128,
  )
  grad_dtype: str = _f(
    'float32', 'in which gradients are summed over heads and micro-batches', choices=DTYPES
  )


@dataclasses.dataclass(frozen=True)
class Data:
  """Where tokens come from."""

  store: str = _f(
    '',
    'directory of a token store, or a mixture [NAME=]PATH[:WEIGHT],…: shares of'
    ' windows; NAME is the last part of PATH unless given',
    result=False,
  )
  documents: str = _f(
    'python:stdlib',
    'sources for prepare, separated by commas: python:stdlib, python:PACKAGE,'
    ' dir:PATH, text:PATH, jsonl:PATH#field, parquet:PATH#field, task:NAME;'
    ' jsonl:PATH#prompt+completion scores the completion only',
    result=False,
  )
  tokenizer: str = _f(
    '',
    'of prepare: bytes (UTF-8 bytes with BOS and EOS; also if empty),'
    ' train:SIZE (SentencePiece, trained on the documents),'
    ' sentencepiece:FILE.model, hf:FILE.json, tiktoken:FILE; afterwards: that'
    ' of the store, refused if it is another',
  )
  workers: int = _f(
    0, 'processes that encode documents; 0 = as many as cores', result=False, **_to(4096, 0)
  )
  seq_len: int = _f(256, 'queries of a window, in tokens', **_to(2**24))
  batch_size: int = _f(8, 'windows of one optimizer step, over all devices', **_to(2**24))
  valid_fraction: float = _f(
    0.02, 'share of documents that prepare holds out', result=False, min=0, below=1
  )
  overwrite: bool = _f(False, 'prepare replaces the store that is there', result=False)
  max_shard_gib: int = _f(
    0,
    'size limit of a file of tokens that prepare writes; 0 = 2**27 tokens, more'
    ' in a store of more than 512 such shards',
    result=False,
    **UNSIGNED,
  )
  max_document_mib: int = _f(
    1024,
    'prepare skips larger documents (of jsonl: larger lines), by name',
    result=False,
    **POSITIVE,
  )
  verify: bool = _f(True, 'check the checksums of a store when it is opened', result=False)
  read_threads: int = _f(2, 'threads that read rows', result=False, **_to(4096))


@dataclasses.dataclass(frozen=True)
class Optim:
  """The optimizer and its learning rate."""

  name: str = _f(
    'adamw',
    'update rule; muon: of the matrices between hidden states, AdamW for'
    ' embeddings, unembeddings and norms',
    choices=('adamw', 'muon'),
  )
  lr: float = _f(
    3e-4,
    'peak learning rate; an update of muon is as large as one of AdamW, so that'
    ' one rate serves both',
    above=0,
    max=1e3,
  )
  trunk_lr: float = _f(
    1.0,
    'learning rate over lr of the trunk: embedding, layers, final norm, and an'
    ' unembedding that heads share',
    above=0,
    max=1e6,
  )
  heads_lr: float = _f(
    1.0, 'learning rate over lr of the heads, and of unembeddings of their own', above=0, max=1e6
  )
  warmup_steps: int = _f(100, 'steps of linear warm-up from 0', **UNSIGNED)
  schedule: str = _f(
    'cosine',
    'after the warm-up: cosine down to end_ratio, wsd (constant, then linear'
    ' to end_ratio within decay_steps), or constant',
    choices=('cosine', 'wsd', 'constant'),
  )
  end_ratio: float = _f(0.03, 'last learning rate over peak', min=0, max=1)
  decay_steps: int = _f(0, 'steps of the decay of wsd', **UNSIGNED)
  b1: float = _f(0.9, 'decay of the first moment of AdamW', min=0, below=1)
  b2: float = _f(0.95, 'decay of the second moment of AdamW', min=0, below=1)
  momentum: float = _f(0.95, 'decay of the (Nesterov) momentum of muon', min=0, below=1)
  eps: float = _f(1e-8, 'added to the root of the second moment', above=0, max=1)
  weight_decay: float = _f(0.1, 'decoupled decay of matrices', min=0, max=1e3)
  clip_norm: float = _f(1.0, 'global gradient norm; 0 = no clipping', min=0, max=1e30)
  moment_dtype: str = _f(
    'float32', 'of the first moment, or momentum; the second is float32', choices=DTYPES
  )


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices along each mesh axis; one of them may be -1 = what is left."""

  data: int = _f(1, 'replicas of the parameters', result=False, **_to(2**20, -1))
  fsdp: int = _f(-1, 'shards of parameters and of the batch', result=False, **_to(2**20, -1))
  tensor: int = _f(1, 'shards of a layer and of the vocabulary', result=False, **_to(2**20, -1))


@dataclasses.dataclass(frozen=True)
class Processes:
  """Which process of a run this one is; not part of what the run is."""

  coordinator: str = _f(
    '',
    'HOST:PORT at which process 0 listens; auto: processes, TPU pod or Slurm'
    ' say it all; empty: one process',
    result=False,
  )
  count: int = _f(1, 'processes of the run, with a HOST:PORT', result=False, **_to(2**20))
  index: int = _f(0, 'of this process, with a HOST:PORT', result=False, **UNSIGNED)
  timeout_s: int = _f(
    30,
    'seconds after which a silent process is given up, and the run with it',
    result=False,
    **_to(10**6),
  )


@dataclasses.dataclass(frozen=True)
class Train:
  """The loop."""

  workdir: str = _f('', 'directory of the run; it may be gs://BUCKET/…', result=False)
  steps: int = _f(1000, 'optimizer steps', result=False, **POSITIVE)
  init_from: str = _f(
    '',
    'workdir of a run, or one of its checkpoints/STEP, whose parameters a new'
    ' run begins with; its heads may be others',
  )
  new_heads: str = _f(
    'copy', 'heads that it has not: as head 1, or fresh', choices=('copy', 'fresh')
  )
  freeze: str = _f(
    'none',
    'what does not train: trunk (embedding, layers, final norm, an unembedding'
    ' that heads share), or heads',
    choices=('none', 'trunk', 'heads'),
  )
  accumulate: int = _f(1, 'micro-batches of one optimizer step', **_to(2**24))
  seed: int = _f(
    0, 'of initial parameters, the order of data, and random rounding', min=0, max=2**32 - 1
  )
  log_every: int = _f(10, 'steps from one log line to the next', result=False, **POSITIVE)
  eval_every: int = _f(0, 'steps between evaluations; 0 = at the end', result=False, **UNSIGNED)
  suite_every: int = _f(
    0,
    'steps between evaluations by the suites of eval.suite; 0 = after the last step only',
    result=False,
    **UNSIGNED,
  )
  checkpoint_every: int = _f(
    0, 'steps between checkpoints; 0 = at the end', result=False, **UNSIGNED
  )
  keep_last: int = _f(
    2, 'newest checkpoints kept; at 1 the one before stays as well', result=False, **POSITIVE
  )
  keep_every: int = _f(
    0, 'checkpoints at multiples of this step are kept as well; 0 = none', result=False, **UNSIGNED
  )
  max_nonfinite: int = _f(
    10, 'non-finite steps in a row that end the run, at its next log line', **POSITIVE
  )
  watchdog_s: float = _f(
    1800.0,
    'seconds without a step, a compiled program or a batch of an evaluation'
    ' after which a process ends, with its stacks; 0 = never',
    result=False,
    min=0,
    max=1e8,
  )
  spike_sigma: float = _f(
    10.0,
    'deviations above the median of the last 128 losses of head 1 that make a'
    ' spike, which is said and counted; 0 = none is',
    result=False,
    min=0,
    max=1e6,
  )
  skip_batches: int = _f(
    0,
    'batches left out for good, up to that of a spike, when a run goes back to'
    ' the last checkpoint before it; 0 = it does not go back',
    **UNSIGNED,
  )
  profile_start: int = _f(0, 'first step of the profile', result=False, **UNSIGNED)
  profile_steps: int = _f(0, 'steps in the profile; 0 = no profile', result=False, **UNSIGNED)
  compilation_cache: str = _f(
    '~/.cache/mtp_jax', 'directory of compiled programs; empty = none', result=False
  )


@dataclasses.dataclass(frozen=True)
class Eval:
  """Evaluation of a checkpoint."""

  checkpoint: str = _f('', 'workdir of a run, or one of its checkpoints/STEP', result=False)
  split: str = _f('valid', 'part of the store', result=False, choices=('train', 'valid'))
  stores: str = _f(
    '',
    'further stores to evaluate on, [NAME=]PATH,…: this split of each, or all'
    ' of one that is not split',
    result=False,
  )
  batches: int = _f(
    0,
    'batches of data.batch_size windows a store, spread over it; 0 = all',
    result=False,
    **UNSIGNED,
  )
  suite: str = _f('heldout', 'evaluators, NAME or NAME:ARG,…; see README', result=False)
  items: int = _f(
    0,
    'items of a suite, its first ones, or of each of its levels; 0 = all',
    result=False,
    **UNSIGNED,
  )
  data: str = _f(
    '',
    'what a suite asks of: its file of problems, a directory of further tasks'
    ' (lm_eval), or documents as data.documents names them',
    result=False,
  )
  shots: int = _f(
    -1,
    'worked examples before each problem; -1 = as the suite is used',
    result=False,
    min=-1,
    max=10_000,
  )
  samples: int = _f(1, 'answers to each problem that are run', result=False, **_to(10**6))
  temperatures: str = _f(
    '',
    'of the answers that are run, with commas, each scored by itself; empty = 0'
    ' for one answer, 0.2,0.8 for several',
    result=False,
  )
  k: str = _f(
    '',
    'of pass@k, with commas: the chance that one of k answers passes; empty ='
    ' 1,10,100 up to --eval.samples',
    result=False,
  )
  allow_code_execution: bool = _f(
    False, 'programs that the model wrote may run on this machine', result=False
  )
  sandbox: str = _f(
    'full',
    'around a program. full: as nobody, in namespaces of its own: no other'
    ' file, process or network; weak: limits and an empty folder, no protection'
    ' from a program that means harm',
    result=False,
    choices=('full', 'weak'),
  )
  timeout_s: float = _f(
    10.0, 'seconds that a program has, each time it runs', result=False, above=0, max=1e6
  )


@dataclasses.dataclass(frozen=True)
class Decode:
  """Generation, with the model's own heads as the draft of what follows."""

  checkpoint: str = _f('', 'workdir of a run, or one of its checkpoints/STEP', result=False)
  draft: int = _f(
    0,
    'heads used: W - 1 drafts are verified by each forward pass; 1 = plain'
    ' decoding; 0 = all heads that trained',
    result=False,
    **_to(1024, 0),
  )
  tree: str = _f(
    '',
    'candidates of each further head, e.g. 3,2,1: their best ones form a tree'
    ' that one pass verifies, 16 tokens here; greedy only; empty = the best of'
    ' each',
    result=False,
  )
  max_new: int = _f(256, 'new tokens of a row, at most', result=False, **_to(MOST_POSITIONS - 1))
  temperature: float = _f(0.0, 'logits are divided by it; 0 = greedy', result=False, min=0, max=1e6)
  top_k: int = _f(0, 'most likely tokens that sampling keeps; 0 = all', result=False, **UNSIGNED)
  top_p: float = _f(
    1.0,
    'sampling keeps the fewest most likely tokens with this probability',
    result=False,
    min=1e-6,
    max=1,
  )
  min_p: float = _f(
    0.0,
    'sampling drops tokens less likely than this share of the likeliest',
    result=False,
    min=0,
    max=1,
  )
  seed: int = _f(0, 'of sampling; row i has seed + i', result=False, min=0, max=2**31 - 1)
  stop_ids: str = _f(
    '',
    'ids of tokens that end a row, with commas, or none; empty = the end of a'
    ' document, but nothing for --prompt_ids',
    result=False,
  )
  prompts: str = _f(
    '',
    'file of prompts: .jsonl with prompt (text) or prompt_ids a line, or text, a prompt a line',
    result=False,
  )
  batch_size: int = _f(0, 'rows decoded at once; 0 = all prompts', result=False, **_to(2**20, 0))
  cache: int = _f(
    0,
    'tokens that a row has room for, prompt and new ones; 0 = as many as are asked for',
    result=False,
    **_to(MOST_POSITIONS, 0),
  )
  cache_dtype: str = _f(
    'compute',
    'of cached keys and values; compute = --model.compute_dtype',
    result=False,
    choices=('compute', *DTYPES),
  )
  prefill: int = _f(512, 'positions of a prompt that are read at once', result=False, **_to(2**24))
  segment: int = _f(
    16, 'forward passes from one piece of streamed text to the next', result=False, **_to(2**24)
  )
  compare: bool = _f(
    False,
    'decode with head 1 alone and with --decode.draft heads, in turn for'
    ' --bench.rounds rounds, and compare times and texts',
    result=False,
  )


@dataclasses.dataclass(frozen=True)
class Export:
  """A checkpoint for other tools."""

  checkpoint: str = _f('', 'workdir of a run, or one of its checkpoints/STEP', result=False)
  out: str = _f('', 'directory to write, a new or an empty one', result=False)
  format: str = _f(
    'hf',
    'hf: Hugging Face Llama, further heads in a file beside it; meta: as the'
    " paper's models were released; mtp_llama: Fast-LLM's; transformers_mtp:"
    ' sequential and recursive modules as Transformers drafts with them; gguf:'
    ' a file for llama.cpp, which drafts with the same; mimo: one module, for'
    ' serving engines that know MiMo; medusa: residual heads in a folder of'
    ' their own',
    result=False,
    choices=('hf', 'meta', 'mtp_llama', 'transformers_mtp', 'gguf', 'mimo', 'medusa'),
  )
  dtype: str = _f(
    'param',
    'of the tensors written; param = --model.param_dtype',
    result=False,
    choices=('param', *DTYPES),
  )
  shard_gib: float = _f(4.0, 'GiB of a file, at most', result=False, above=0, max=1e6)


@dataclasses.dataclass(frozen=True)
class Import:
  """A checkpoint of another tool; --train.workdir is where it goes."""

  path: str = _f('', 'directory of the checkpoint', result=False)
  format: str = _f(
    'hf',
    'of a checkpoint that mtp export did not write: hf: config.json and'
    ' safetensors; meta: params.json and consolidated.pth',
    result=False,
    choices=('hf', 'meta'),
  )
  tokenizer: str = _f(
    'read',
    'skip: imports the weights without the tokenizer beside them',
    result=False,
    choices=('read', 'skip'),
  )


@dataclasses.dataclass(frozen=True)
class Inspect:
  """What `mtp inspect` prints."""

  step: int = _f(0, 'training step whose batch is shown', result=False, **UNSIGNED)
  rows: int = _f(1, 'windows shown', result=False, **_to(2**24))
  tokens: int = _f(40, 'positions shown of each', result=False, **_to(2**24))


@dataclasses.dataclass(frozen=True)
class Plan:
  """What `mtp plan` compiles for, without having it."""

  topology: str = _f(
    '',
    'TPU slice, e.g. v5e:4x4, v5p:4x4x4 or v6e:16x16, compiled for ahead of'
    ' time; empty: the devices that are here',
    result=False,
  )
  slices: int = _f(
    1, 'such slices, joined by the network along --mesh.data', result=False, **_to(2**16)
  )
  sweep: tuple = _f(
    (),
    'FLAG=VALUE,VALUE,…: a row for each value, which has no comma itself; given'
    ' twice, a grid of both',
    result=False,
  )
  search_mesh: bool = _f(
    False, 'rank mesh shapes, micro-batches and remat by formula, compile the best', result=False
  )
  search_s: int = _f(
    600, 'seconds in which --plan.search_mesh begins new compiles', result=False, **POSITIVE
  )


@dataclasses.dataclass(frozen=True)
class Bench:
  """What `mtp bench` measures; empty lists take the run's own value."""

  what: str = _f(
    'loss',
    "loss: the heads' loss and its gradient; step: the whole train step; data:"
    ' the loader, beside the step that it feeds; decode: a checkpoint, with'
    ' held-out documents as prompts',
    result=False,
    choices=('loss', 'step', 'data', 'decode'),
  )
  heads: str = _f(
    '1,2,4', 'numbers of heads of loss and step; ratios are to the first', result=False
  )
  schedules: str = _f(
    'remat,eager', 'schedules of loss and step, set beside the first', result=False
  )
  chunks: str = _f('', 'chunks of loss and step, set beside the first', result=False)
  documents: int = _f(
    1, 'documents in a row of loss and step; several make packed rows', result=False, **_to(2**24)
  )
  rounds: int = _f(
    5, 'rounds, in each of which every program has its turn', result=False, **_to(10**6)
  )
  calls: int = _f(1, 'calls in a row that make a turn', result=False, **_to(10**6))
  drafts: str = _f('', 'numbers of heads that decode uses; empty = 1, 2 … all', result=False)
  batches: str = _f('1,8', 'rows that decode decodes at once', result=False)
  pieces: int = _f(
    8,
    'held-out pieces, each a prompt of decode; the same for any number of'
    ' rows, and as many as those at least',
    result=False,
    **_to(10**6),
  )
  prompt: int = _f(
    128, 'tokens of a prompt of decode; --decode.max_new follow', result=False, **_to(2**24)
  )


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that defines a run."""

  model: Model = Model()
  heads: Heads = Heads()
  loss: Loss = Loss()
  data: Data = Data()
  optim: Optim = Optim()
  mesh: Mesh = Mesh()
  processes: Processes = Processes()
  train: Train = Train()
  eval: Eval = Eval()
  decode: Decode = Decode()
  export: Export = Export()
  import_: Import = Import()
  inspect: Inspect = Inspect()
  plan: Plan = Plan()
  bench: Bench = Bench()

  @property
  def span(self) -> int:
    """Tokens that a window carries past its last query, as targets."""
    order = self.loss.order_window if self.loss.order_weight else 0
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


def to_json(cfg: Config) -> str:
  return json.dumps(dict(version=VERSION) | dataclasses.asdict(cfg), indent=1)


class OtherVersion(ValueError):
  """A Config that another version of this program wrote."""


def from_json(text: str | bytes) -> Config:
  """Returns the Config that to_json wrote, its limits not yet checked.

  Raises:
    OtherVersion: another version wrote it, or it has a field that is unknown.
    ValueError: it is no JSON, or a field is of another type; in one line.
  """
  sections = jsonl.loads(text, {...: object})
  version = sections.pop('version', None)
  if version != VERSION:
    raise OtherVersion(f'config version {jsonl.one_line(version)}, this program reads {VERSION}')
  jsonl.check(sections, {...: {...: object}})
  values = {
    f'{section.rstrip("_")}.{name}': value
    for section, of in sections.items()
    for name, value in of.items()
  }
  for group in 'trunk', 'heads':  # before --train.freeze, a rate of 0 froze
    if values.get(f'optim.{group}_lr') == 0:
      values |= {f'optim.{group}_lr': 1.0, 'train.freeze': group}
  known = fields()
  for name, value in values.items():
    if name not in known:
      raise OtherVersion(f'{jsonl.one_line(name)}: no such field; it is of another version')
    wanted = [str] if known[name].type is tuple else known[name].type
    jsonl.check(value, wanted, name)
    values[name] = tuple(value) if isinstance(value, list) else value
  return replace(Config(), **values)


def parse_numbers(text: str) -> tuple[int, ...]:
  """'1,2,4' -> (1, 2, 4); '' -> ()."""
  return tuple(int(number) for number in text.split(',')) if text else ()


def parse_stop_ids(text: str) -> tuple[int, ...] | None:
  """'3,7' -> (3, 7); 'none' -> (); '' -> None, nothing said."""
  if not text:
    return None
  return () if text == 'none' else parse_numbers(text)


class StoreRef(typing.NamedTuple):
  """A store as a flag names it."""

  name: str
  path: str
  weight: str = '1'  # as written: decimal, hence exact

  @property
  def share(self) -> fractions.Fraction:
    return fractions.Fraction(self.weight)


STORE = re.compile(r'(?:([\w.-]+)=)?(.+?)(?::(\d+\.?\d*|\.\d+))?')


def parse_stores(text: str) -> tuple[StoreRef, ...]:
  """'a/b,c=d:.5' -> (('b', 'a/b', '1'), ('c', 'd', '.5')).

  A path has no comma; one that looks as if it began with NAME= or ended in
  :WEIGHT can be written ./PATH and PATH:1.
  """
  refs = []
  for entry in text.split(',') if text else ():
    match = STORE.fullmatch(entry.strip())
    if not match:
      raise ValueError('an empty path')
    name, path, weight = match.groups()
    name = name or os.path.basename(os.path.normpath(path))
    refs.append(StoreRef(name, path, weight or '1'))
    if not 1e-12 <= refs[-1].share <= 1e12:
      raise ValueError('a weight of 0, or of another size')
  return tuple(refs)


def format_stores(refs: typing.Iterable[StoreRef]) -> str:
  """The shortest text that parse_stores reads as refs."""
  entries = []
  for ref in refs:
    named = f'{ref.name}={ref.path}'
    forms = (ref.path, named, f'{ref.path}:{ref.weight}')
    forms += (f'{named}:{ref.weight}', f'{ref.path}:{ref.weight}')
    exact = (form for form in forms if parse_stores(form) == (ref,))
    # Some names, e.g. '~', cannot be written; the path tells more.
    entries.append(next(exact, forms[-1]))
  return ','.join(entries)


def unfit(cfg: Config, kernel: str) -> ConfigError | None:
  """Why an attention kernel cannot take the shapes of cfg, if it cannot."""
  name, width = 'model.attention', cfg.model.head_width
  if kernel in KERNELS and cfg.data.seq_len % TILE:
    return ConfigError(
      name, kernel, f'needs a multiple of {TILE} as --data.seq_len, not {cfg.data.seq_len}'
    )
  # Triton multiplies nothing narrower than 16; wider than 256 fills its memory.
  if kernel == 'flash' and not 16 <= width <= 256:
    return ConfigError(name, kernel, f'needs d_model / n_attn_heads of 16 to 256, not {width}')
  return None


def parse_steps(text: str) -> tuple[tuple[int, tuple[float, ...]], ...]:
  """'0:1,.3;50000:1,.1' -> ((0, (1.0, 0.3)), (50000, (1.0, 0.1)))."""
  phases = []
  for phase in text.split(';'):
    step, values = phase.split(':')
    phases.append((int(step), tuple(float(v) for v in values.split(','))))
  starts = [step for step, _ in phases]
  if starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] > INT32:
    raise ValueError(f'steps must start at 0 and rise, to at most {INT32:,}')
  return tuple(phases)


def head_weights(cfg: Config) -> tuple[tuple[int, tuple[float, ...]], ...]:
  """--loss.weights by phase, one weight a head."""
  return tuple(
    (start, values + values[-1:] * (cfg.heads.n - len(values)))
    for start, values in parse_steps(cfg.loss.weights)
  )


def in_force(phases, step: int):
  """The values of the phase that a step lies in."""
  return [values for start, values in phases if start <= step][-1]


def active_heads(cfg: Config, step: int) -> int:
  """Heads 1..m that train at this step, under --loss.curriculum."""
  if not cfg.loss.curriculum:
    return cfg.heads.n
  return int(in_force(parse_steps(cfg.loss.curriculum), step)[0])


def changed(old: Config, new: Config) -> list[tuple[str, object, object]]:
  """Fields that change a run's result and differ: (name, old, new)."""
  return [
    (name, get(old, name), get(new, name))
    for name, field in fields().items()
    if field.metadata['result'] and get(old, name) != get(new, name)
  ]
