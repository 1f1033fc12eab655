"""mtp_jax: pretrain language models that predict several tokens at once.

>>> import jax, numpy as np, mtp_jax as mtp
>>> cfg = mtp.Config(
...   model=mtp.ModelConfig(d_model=32, n_layers=3, vocab_size=264), heads=mtp.HeadsConfig(n=2)
... )
>>> params = mtp.init(cfg, jax.random.key(0))
>>> tokens_BU = np.arange(20, dtype=np.int32).reshape(2, 10)
>>> mtp.logits(params, tokens_BU, cfg).shape  # heads, rows, positions, vocabulary
(2, 2, 10, 264)
>>> loss, metrics = mtp.loss(params, {'tokens': tokens_BU}, cfg)
>>> metrics['count_K'].tolist()  # 8 positions per row have both targets
[16.0, 16.0]

Dimension key. An array's name ends in its letters: `z_BTD`, `logits_BTV`.
  B batch          T query position   S key/cache position   U window, T + K
  D model width    F feed-forward     V vocabulary           L layers
  N attention heads   G key/value heads   R = N / G   H attention-head width
  K prediction heads (future offsets)   C loss chunk   W draft window
  A micro-batches of a step   P tokens per position of a stored teacher (P1: and the rest)
Attention heads are N and prediction heads are K: "head" alone is always a
prediction head.

Folders, lowest first; each imports those before it: io, config, parallel, model, data,
losses, optim, checkpoint, decode, evals, train, interop, planning, bench, report, api,
cli.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from mtp_jax.api.model import forward, generate, init, init_state, logits, loss, mesh, train_step
  from mtp_jax.api.runs import Model, load, plan, save
  from mtp_jax.config.draft_vocab import recorded as draft_vocab
  from mtp_jax.config.schema import (
    Config,
    DataConfig,
    EvalConfig,
    HeadsConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
  )
  from mtp_jax.model.heads import Family
  from mtp_jax.model.heads import register as register_family

__all__ = [
  'Config',
  'DataConfig',
  'EvalConfig',
  'Family',
  'HeadsConfig',
  'LossConfig',
  'MeshConfig',
  'Model',
  'ModelConfig',
  'OptimConfig',
  'TrainConfig',
  'draft_vocab',
  'forward',
  'generate',
  'init',
  'init_state',
  'load',
  'logits',
  'loss',
  'mesh',
  'plan',
  'register_family',
  'save',
  'train_step',
]

_MODULES = {
  **dict.fromkeys(
    ('forward', 'generate', 'init', 'init_state', 'logits', 'loss', 'mesh', 'train_step'),
    'mtp_jax.api.model',
  ),
  **dict.fromkeys(('Model', 'load', 'plan', 'save'), 'mtp_jax.api.runs'),
  **dict.fromkeys(('Family', 'register_family'), 'mtp_jax.model.heads'),
  'draft_vocab': 'mtp_jax.config.draft_vocab',
}


# Where a function has another name.
_NAMES = {'register_family': 'register', 'draft_vocab': 'recorded'}


def __getattr__(name: str):
  """Resolves a public name (PEP 562): importing the package imports no jax."""
  if name not in __all__:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module = importlib.import_module(_MODULES.get(name, 'mtp_jax.config.schema'))
  return getattr(module, _NAMES.get(name, name))


def __dir__() -> list[str]:
  return __all__
