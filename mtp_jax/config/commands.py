"""Options of single commands, which are not part of a run's identity."""

import dataclasses

from mtp_jax.config import fields

MOST_POSITIONS = 2**20  # maximum length of a decoded row


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
  """The processes of a run, and which of them this one is."""

  coordinator_address: str = fields.field(
    '',
    'HOST:PORT on which process 0 listens; auto: as the TPU pod, Slurm or Open MPI '
    'provides; empty: one process',
  )
  num_processes: int = fields.field(
    1, 'number of processes, with HOST:PORT', **fields.limits(2**20)
  )
  process_id: int = fields.field(0, 'rank of this process, with HOST:PORT', **fields.UNSIGNED)
  heartbeat_timeout_s: int = fields.field(
    30,
    'seconds without a heartbeat after which a process counts as lost and the run aborts',
    **fields.limits(10**6),
  )


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
  """Generation, with the model's own heads as the draft."""

  num_draft_tokens: str = fields.field(
    'auto',
    'draft tokens that each forward pass verifies, one per head, or more of a shared module '
    '(recursive); 0 = plain decoding; all = those of all trained heads; auto = the fastest '
    'number, measured per batch: the text, greedy or sampled, is that of 0; mtp eval uses all '
    'instead',
  )
  tree: str = fields.field(
    '',
    'candidates of each further head, e.g. 3,2,1: the best ones form a tree that one '
    'forward pass verifies (16 tokens here); greedy only; empty = the best candidate of '
    'each head',
  )
  min_confidence: float = fields.field(
    0.0,
    'stop drafting where the product of the predicted acceptance rates of the drafts so far is '
    'below this, in all rows; of a model with --heads.confidence; 0 = off',
    min=0,
    max=1,
  )
  max_new_tokens: int = fields.field(
    256, 'maximum number of new tokens per prompt', **fields.limits(MOST_POSITIONS - 1)
  )
  temperature: float = fields.field(0.0, 'sampling temperature; 0 = greedy', min=0, max=1e6)
  top_k: int = fields.field(0, 'sample from the k most likely tokens; 0 = all', **fields.UNSIGNED)
  top_p: float = fields.field(
    1.0,
    'sample from the fewest most likely tokens with this total probability (nucleus sampling)',
    min=1e-6,
    max=1,
  )
  min_p: float = fields.field(
    0.0, 'drop tokens less likely than this fraction of the most likely one', min=0, max=1
  )
  seed: int = fields.field(
    0, 'random seed for sampling; prompt i has seed + i', min=0, max=2**31 - 1
  )
  stop_token_ids: str = fields.field(
    '',
    'token ids that end a text, with commas, or none; empty = the end-of-document token, '
    'but none for --prompt_ids',
  )
  prompts: str = fields.field(
    '',
    'file of prompts: .jsonl with prompt (text) or prompt_ids per line, or text with one '
    'prompt per line',
  )
  batch_size: int = fields.field(
    0, 'prompts decoded at the same time; 0 = all', **fields.limits(2**20, 0)
  )
  cache_length: int = fields.field(
    0,
    'length of the key/value cache in tokens, prompt and new tokens; 0 = as needed',
    **fields.limits(MOST_POSITIONS, 0),
  )
  cache_dtype: str = fields.field(
    'compute',
    'dtype of cached keys and values; compute = model.compute_dtype',
    choices=('compute', *fields.DTYPES),
  )
  prefill_chunk_size: int = fields.field(
    512, 'prompt tokens per prefill step', **fields.limits(2**24)
  )
  stream_every: int = fields.field(
    16, 'forward passes between pieces of streamed text', **fields.limits(2**24)
  )
  compare: bool = fields.field(
    False, 'compare speed and text with those of plain decoding, in turn for bench.rounds rounds'
  )


@dataclasses.dataclass(frozen=True)
class ExportConfig:
  """Export of a checkpoint to the format of another tool."""

  out: str = fields.field('', 'directory to write, new or empty')
  format: str = fields.field(
    'hf',
    'format; hf: Hugging Face Llama with further heads in a file beside it; meta: as the '
    "paper's models were released; mtp_llama: Fast-LLM's; transformers_mtp: sequential "
    'and recursive modules as Transformers drafts with them; gguf: llama.cpp, which '
    'drafts with the same modules; mimo: one module, for engines that know MiMo; medusa: '
    'residual heads in a directory of their own; speculators: one module of a Qwen 3, as '
    'that library trains it, in a directory beside the model',
    choices=(
      *('hf', 'meta', 'mtp_llama', 'transformers_mtp', 'gguf', 'mimo', 'medusa'),
      'speculators',
    ),
  )
  verifier: str = fields.field(
    '',
    'of --export.format=speculators: the name on the Hugging Face hub, or path, under which '
    'the library finds the model beside the module; default: export.out',
  )
  dtype: str = fields.field(
    'param', 'dtype of the tensors; param = model.param_dtype', choices=('param', *fields.DTYPES)
  )
  max_shard_gib: float = fields.field(4.0, 'maximum size of a file in GiB', above=0, max=1e6)


@dataclasses.dataclass(frozen=True)
class ImportConfig:
  """Import of another tool's checkpoint into --train.workdir."""

  path: str = fields.field(
    '', 'directory of the checkpoint, or hf:OWNER/NAME[@REVISION] of the Hugging Face hub'
  )
  format: str = fields.field(
    'hf',
    'format of a checkpoint that mtp export did not write; hf: config.json and '
    'safetensors; meta: params.json and consolidated.pth',
    choices=('hf', 'meta'),
  )
  tokenizer: str = fields.field(
    'read', 'read the tokenizer beside the weights, or skip it', choices=('read', 'skip')
  )


@dataclasses.dataclass(frozen=True)
class InspectConfig:
  """What `mtp inspect` prints."""

  step: int = fields.field(0, 'training step whose batch is printed', **fields.UNSIGNED)
  rows: int = fields.field(1, 'sequences to print', **fields.limits(2**24))
  tokens: int = fields.field(40, 'positions to print per sequence', **fields.limits(2**24))


@dataclasses.dataclass(frozen=True)
class PlanConfig:
  """The devices that `mtp plan` compiles for, which need not be present."""

  topology: str = fields.field(
    '',
    'devices to compile for ahead of time: a TPU slice, e.g. v5e:4x4 or v5p:4x4x4 (v4, v5e, '
    'v5p, v6e, tpu7x); NVIDIA GPUs of one node or of several, e.g. h100:8 or h100:2x8 (a100-40g, '
    'a100, h100, h200, b200); empty = the devices here',
  )
  slices: int = fields.field(
    1,
    'number of such TPU slices, connected by the data-center network along mesh.data',
    **fields.limits(2**16),
  )
  profile: bool = fields.field(
    False,
    "print the scopes with the most cycles, by the TPU compiler's estimate, and the largest "
    'temporaries at the peak; of one plan, not of a sweep or search',
  )
  against: str = fields.field(
    '',
    'file of an earlier mtp plan --plan.profile --out: print what differs, scope by scope; '
    'implies plan.profile',
  )
  sweep: tuple = fields.field(
    (), 'FLAG=VALUE,VALUE,…: a row per value; given twice, a grid of both'
  )
  search_mesh: bool = fields.field(
    False, 'rank mesh shapes, micro-batches and remat by formula, and compile the best'
  )
  search_timeout_s: int = fields.field(
    600, 'seconds after which plan.search_mesh starts no further compilation', **fields.POSITIVE
  )


@dataclasses.dataclass(frozen=True)
class BenchConfig:
  """Measurements of `mtp bench`; an empty list means the run's own value."""

  heads: str = fields.field('1,2,4', 'numbers of heads for loss and step; ratios are to the first')
  backward: str = fields.field(
    'remat,interleaved', 'backward strategies for loss and step; ratios are to the first'
  )
  chunk_size: str = fields.field('', 'chunk sizes for loss and step; ratios are to the first')
  documents: int = fields.field(
    1,
    'documents per sequence for loss and step; several make packed sequences',
    **fields.limits(2**24),
  )
  rounds: int = fields.field(
    5, 'interleaved rounds, in each of which every program runs once', **fields.limits(10**6)
  )
  iters: int = fields.field(1, 'calls per program and round', **fields.limits(10**6))
  num_draft_tokens: str = fields.field(
    '', 'numbers of draft tokens for decode, or auto, with commas; empty = 0, 1 … all'
  )
  batches: str = fields.field('1,8', 'batch sizes for decode')
  num_prompts: int = fields.field(
    8,
    'validation prompts for decode, the same for any batch size, and at least one batch',
    **fields.limits(10**6),
  )
  prompt_len: int = fields.field(
    128,
    'tokens per prompt for decode; decode.max_new_tokens new tokens follow',
    **fields.limits(2**24),
  )
