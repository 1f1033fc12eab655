"""TODO of mtp_jax.config."""

import dataclasses

from mtp_jax.config import fields

MOST_POSITIONS = 2**20  # of a row that is decoded


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
  """Which process of a run this one is; not part of what the run is."""

  coordinator_address: str = fields.field(
    '',
    'HOST:PORT at which process 0 listens; auto: processes, TPU pod or Slurm'
    ' say it all; empty: one process',
    result=False,
  )
  num_processes: int = fields.field(
    1, 'processes of the run, with a HOST:PORT', result=False, **fields.limits(2**20)
  )
  process_id: int = fields.field(
    0, 'of this process, with a HOST:PORT', result=False, **fields.UNSIGNED
  )
  heartbeat_timeout_s: int = fields.field(
    30,
    'seconds after which a silent process is given up, and the run with it',
    result=False,
    **fields.limits(10**6),
  )


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
  """Generation, with the model's own heads as the draft of what follows."""

  num_draft_tokens: str = fields.field(
    'all',
    'tokens drafted for each forward pass to verify: an integer, one head each;'
    ' 0 = plain decoding; all = as many as heads 2 to n trained',
    result=False,
  )
  tree: str = fields.field(
    '',
    'candidates of each further head, e.g. 3,2,1: their best ones form a tree'
    ' that one pass verifies, 16 tokens here; greedy only; empty = the best of'
    ' each',
    result=False,
  )
  max_new_tokens: int = fields.field(
    256, 'new tokens of a row, at most', result=False, **fields.limits(MOST_POSITIONS - 1)
  )
  temperature: float = fields.field(
    0.0, 'logits are divided by it; 0 = greedy', result=False, min=0, max=1e6
  )
  top_k: int = fields.field(
    0, 'most likely tokens that sampling keeps; 0 = all', result=False, **fields.UNSIGNED
  )
  top_p: float = fields.field(
    1.0,
    'sampling keeps the fewest most likely tokens with this probability',
    result=False,
    min=1e-6,
    max=1,
  )
  min_p: float = fields.field(
    0.0,
    'sampling drops tokens less likely than this share of the likeliest',
    result=False,
    min=0,
    max=1,
  )
  seed: int = fields.field(0, 'of sampling; row i has seed + i', result=False, min=0, max=2**31 - 1)
  stop_token_ids: str = fields.field(
    '',
    'ids of tokens that end a row, with commas, or none; empty = the end of a'
    ' document, but nothing for --prompt_ids',
    result=False,
  )
  prompts: str = fields.field(
    '',
    'file of prompts: .jsonl with prompt (text) or prompt_ids a line, or text, a prompt a line',
    result=False,
  )
  batch_size: int = fields.field(
    0, 'rows decoded at once; 0 = all prompts', result=False, **fields.limits(2**20, 0)
  )
  cache_length: int = fields.field(
    0,
    'tokens that a row has room for, prompt and new ones; 0 = as many as are asked for',
    result=False,
    **fields.limits(MOST_POSITIONS, 0),
  )
  cache_dtype: str = fields.field(
    'compute',
    'of cached keys and values; compute = --model.compute_dtype',
    result=False,
    choices=('compute', *fields.DTYPES),
  )
  prefill_chunk_size: int = fields.field(
    512, 'positions of a prompt that are read at once', result=False, **fields.limits(2**24)
  )
  stream_every: int = fields.field(
    16,
    'forward passes from one piece of streamed text to the next',
    result=False,
    **fields.limits(2**24),
  )
  compare: bool = fields.field(
    False,
    'decode with head 1 alone and with --decode.num_draft_tokens heads, in turn for'
    ' --bench.rounds rounds, and compare times and texts',
    result=False,
  )


@dataclasses.dataclass(frozen=True)
class ExportConfig:
  """A checkpoint for other tools."""

  out: str = fields.field('', 'directory to write, a new or an empty one', result=False)
  format: str = fields.field(
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
  dtype: str = fields.field(
    'param',
    'of the tensors written; param = --model.param_dtype',
    result=False,
    choices=('param', *fields.DTYPES),
  )
  max_shard_gib: float = fields.field(4.0, 'GiB of a file, at most', result=False, above=0, max=1e6)


@dataclasses.dataclass(frozen=True)
class ImportConfig:
  """A checkpoint of another tool; --train.workdir is where it goes."""

  path: str = fields.field('', 'directory of the checkpoint', result=False)
  format: str = fields.field(
    'hf',
    'of a checkpoint that mtp export did not write: hf: config.json and'
    ' safetensors; meta: params.json and consolidated.pth',
    result=False,
    choices=('hf', 'meta'),
  )
  tokenizer: str = fields.field(
    'read',
    'skip: imports the weights without the tokenizer beside them',
    result=False,
    choices=('read', 'skip'),
  )


@dataclasses.dataclass(frozen=True)
class InspectConfig:
  """What `mtp inspect` prints."""

  step: int = fields.field(0, 'training step whose batch is shown', result=False, **fields.UNSIGNED)
  rows: int = fields.field(1, 'windows shown', result=False, **fields.limits(2**24))
  tokens: int = fields.field(40, 'positions shown of each', result=False, **fields.limits(2**24))


@dataclasses.dataclass(frozen=True)
class PlanConfig:
  """What `mtp plan` compiles for, without having it."""

  topology: str = fields.field(
    '',
    'TPU slice, e.g. v5e:4x4, v5p:4x4x4 or v6e:16x16, compiled for ahead of'
    ' time; empty: the devices that are here',
    result=False,
  )
  slices: int = fields.field(
    1, 'such slices, joined by the network along --mesh.data', result=False, **fields.limits(2**16)
  )
  sweep: tuple = fields.field(
    (),
    'FLAG=VALUE,VALUE,…: a row for each value, which has no comma itself; given'
    ' twice, a grid of both',
    result=False,
  )
  search_mesh: bool = fields.field(
    False, 'rank mesh shapes, micro-batches and remat by formula, compile the best', result=False
  )
  search_timeout_s: int = fields.field(
    600, 'seconds in which --plan.search_mesh begins new compiles', result=False, **fields.POSITIVE
  )


@dataclasses.dataclass(frozen=True)
class BenchConfig:
  """What `mtp bench` measures; empty lists take the run's own value."""

  heads: str = fields.field(
    '1,2,4', 'numbers of heads of loss and step; ratios are to the first', result=False
  )
  backward: str = fields.field(
    'remat,interleaved', 'schedules of loss and step, set beside the first', result=False
  )
  chunk_size: str = fields.field('', 'chunks of loss and step, set beside the first', result=False)
  documents: int = fields.field(
    1,
    'documents in a row of loss and step; several make packed rows',
    result=False,
    **fields.limits(2**24),
  )
  rounds: int = fields.field(
    5, 'rounds, in each of which every program has its turn', result=False, **fields.limits(10**6)
  )
  iters: int = fields.field(
    1, 'calls in a row that make a turn', result=False, **fields.limits(10**6)
  )
  num_draft_tokens: str = fields.field(
    '', 'numbers of draft tokens of decode; empty = 0, 1 … all', result=False
  )
  batches: str = fields.field('1,8', 'rows that decode decodes at once', result=False)
  num_prompts: int = fields.field(
    8,
    'held-out pieces, each a prompt of decode; the same for any number of'
    ' rows, and as many as those at least',
    result=False,
    **fields.limits(10**6),
  )
  prompt_len: int = fields.field(
    128,
    'tokens of a prompt of decode; --decode.max_new_tokens follow',
    result=False,
    **fields.limits(2**24),
  )
