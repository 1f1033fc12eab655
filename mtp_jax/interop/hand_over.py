"""What an engine hands to the modules of an export, where it is not what they read here.

An engine that hands over hidden states before a norm, to modules trained on those after
it, drafts worse; the text is the same. The acceptance that it will get is computed from
the model under the engine's --heads.trunk_state, on text that the model samples itself.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import draft_vocab, schema
from mtp_jax.decode import decoder
from mtp_jax.interop import mapping
from mtp_jax.losses import multi_token
from mtp_jax.model import heads as heads_lib
from mtp_jax.parallel import sharding

ROWS, LENGTH = 4, 64  # of the text


def of_engine(cfg: schema.CommandConfig) -> str:
  """Returns the --heads.trunk_state of the engine that drafts with an export in
  --export.format; that of cfg where it is the same, or no engine drafts."""
  form, state, n = mapping.of(cfg), cfg.heads.trunk_state, cfg.heads.n
  if n == 1 or not heads_lib.family(cfg.heads).normed_chain:
    return state
  normed_chain = 'post_norm' if state == 'post_norm' else 'pre_norm_first'
  found = {
    # tie_last_hidden_states says which state module 1 reads.
    'transformers_mtp': normed_chain,
    # The library's caller has the state that module 1 reads.
    'speculators': normed_chain,
    'mimo': 'post_norm',
    'gguf_mtp': 'pre_norm',
  }.get(form, state)
  # With one module, what it hands on is not read.
  of_first = state == 'post_norm', found == 'post_norm'
  return state if n == 2 and of_first[0] == of_first[1] else found


def warning(model, cfg: schema.CommandConfig, tokenizer, mesh) -> str:
  """Returns a line on the acceptance that an engine will get; '' if it hands over what
  the modules were trained on."""
  there = of_engine(cfg)
  if there == cfg.heads.trunk_state:
    return ''
  start = tokenizer.bos if tokenizer is not None and tokenizer.bos is not None else 0
  text = _sampled(model, cfg, start, mesh)
  rates = {
    state: ', '.join(f'{x:.2f}' for x in accepted(model, text, cfg, state, mesh))
    for state in (cfg.heads.trunk_state, there)
  }
  engine = {
    'transformers_mtp': 'Transformers',
    'mimo': 'vLLM and SGLang',
    'gguf_mtp': 'llama.cpp',
    'speculators': 'speculators',
  }
  return (
    f'{engine[mapping.of(cfg)]} will accept fewer drafts, the text is the same: modules are'
    f' handed states of --heads.trunk_state={there}, and were trained on'
    f' {cfg.heads.trunk_state}; accepted of its own text, each draft with those before it:'
    f' {rates[there]} there, {rates[cfg.heads.trunk_state]} here'
  )


def of_all_tokens(cfg: schema.CommandConfig) -> str:
  """Returns a line on drafts of formats that have no draft vocabulary."""
  X, V = draft_vocab.size(cfg), cfg.model.vocab_size
  return (
    f'heads draft any of {V:,} tokens there, and were trained on {X:,} (--heads.draft_vocab): fewer'
    ' drafts may be accepted, the text is the same'
  )


def _sampled(model, cfg, start: int, mesh) -> np.ndarray:
  """Returns text (ROWS, LENGTH) that the model samples after one token."""
  n = min(LENGTH, cfg.data.seq_len) - 1
  sampling = {
    **{'decode.max_new_tokens': n, 'decode.temperature': 1.0, 'decode.num_draft_tokens': '0'},
    **{'decode.tree': '', 'decode.top_k': 0, 'decode.top_p': 1.0, 'decode.min_p': 0.0},
  }
  plain = decoder.Decoder(model, schema.replace(cfg, **sampling), mesh, cfg.heads.n)
  drawn = plain([np.array([start])] * ROWS).tokens
  return np.array([[start, *tokens] for tokens in drawn], np.int32)


def accepted(model, text_BT: np.ndarray, cfg: schema.CommandConfig, state: str, mesh):
  """Returns the rate at which each draft and those before it agree with head 1, of
  modules that read hidden states of a --heads.trunk_state."""
  T = text_BT.shape[1] - cfg.span
  changes = {'heads.trunk_state': state, 'data.seq_len': T, 'loss.chunk_size': 0}
  of_state = schema.replace(cfg, **changes)
  position_BU = np.broadcast_to(np.arange(text_BT.shape[1], dtype=np.int32), text_BT.shape)
  rows = -len(text_BT) % (mesh.shape['data'] * mesh.shape['fsdp'])
  batch = dict(tokens=text_BT, position=position_BU)
  batch = {name: np.pad(x, ((0, rows), (0, 0)), mode='wrap')[None] for name, x in batch.items()}

  @jax.jit
  def run(model, batch):
    one = jax.tree.map(lambda x: x[0], batch)
    return multi_token.evaluate(model, one, n_active=cfg.heads.n, cfg=of_state)[0]['accepted_K']

  with jax.set_mesh(mesh):
    found = jax.device_get(run(model, sharding.put_batch(mesh, batch)))
  return (found[1:] / jnp.maximum(found[0], 1)).tolist()
