"""How engines compute the further heads of an export, from its files alone.

The second opinion on exports: float64 NumPy that imports nothing of ours. It
reads a folder as an engine does, and computes the tokens that each module would
draft at each place of a text, where engines differ in what they hand to a
module:

  pre_norm      ours: module j reads at each place what module j - 1 gave there,
                before its norm; the first the trunk's state before the final
                norm. The first place reads no embedding
  post_norm     ours: the same with states after the norms
  pre_norm_first  ours: the trunk's state before its norm, later ones after
  transformers  as post_norm, or where config.json has tie_last_hidden_states =
                false as pre_norm_first; and the first place reads its embedding
                (MtpModel, transformers 5.24; MTPDraftModel, speculators 0.9.0)
  llama_cpp     what the module before gave before its norm, and that only in
                places drafted since the last verified one: in places before it
                every module reads the trunk's state, and so attends to. The
                first token of a text is paired with zeros
                (common/speculative.cpp, October 2026). One module is repeated
  vllm          llama_cpp with states after the norm, of the trunk and of the
                one module; the first place reads none
                (model_executor/models/mimo_mtp.py, 0.32)

The text is fixed: a rejected draft counts as rejected, and so do those after it; after
an accepted draft an engine drafts the same as here.
"""

import json
import os
from typing import NamedTuple

import ml_dtypes
import numpy as np

LAYER = ('attn_norm', 'q', 'k', 'v', 'o', 'mlp_norm', 'gate', 'up', 'down')
LLAMA = dict(
  zip(
    LAYER,
    (
      'input_layernorm',
      'self_attn.q_proj',
      'self_attn.k_proj',
      'self_attn.v_proj',
      'self_attn.o_proj',
      'post_attention_layernorm',
      'mlp.gate_proj',
      'mlp.up_proj',
      'mlp.down_proj',
    ),
    strict=True,
  )
)
BLOCK = dict(
  zip(
    LAYER,
    (
      'attn_norm',
      'attn_q',
      'attn_k',
      'attn_v',
      'attn_output',
      'ffn_norm',
      'ffn_gate',
      'ffn_up',
      'ffn_down',
    ),
    strict=True,
  )
)


# What a layer has in some families only: biases, norms of queries and keys, norms after.
MORE = {
  'q_bias': 'self_attn.q_proj.bias',
  'k_bias': 'self_attn.k_proj.bias',
  'v_bias': 'self_attn.v_proj.bias',
  'q_norm': 'self_attn.q_norm.weight',
  'k_norm': 'self_attn.k_norm.weight',
}


class Sizes(NamedTuple):
  n_heads: int
  n_kv_heads: int
  head_width: int
  eps: float
  rates: np.ndarray  # radians per position, of each pair
  pairs: bool  # 2i and 2i + 1 turn together, not i and i + H/2
  gelu: bool = False  # the gate is tanh-approximated GELU, not SiLU


class Module(NamedTuple):
  hidden_norm: np.ndarray
  embed_norm: np.ndarray
  proj: np.ndarray  # (D, 2D), of [hidden; embedding]
  layer: dict
  final_norm: np.ndarray
  unembed: np.ndarray


class Model(NamedTuple):
  embed: np.ndarray
  layers: list[dict]
  norm: np.ndarray
  unembed: np.ndarray
  modules: list[Module]
  medusa: list[tuple[np.ndarray, np.ndarray]]  # (proj, unembedding) each
  sizes: Sizes
  tied: bool = True  # tie_last_hidden_states
  embed_scale: float = 1.0


# Reading.


def _safetensors(path: str) -> dict[str, np.ndarray]:
  with open(path, 'rb') as file:
    data = file.read()
  length = int.from_bytes(data[:8], 'little')
  header = json.loads(data[8 : 8 + length])
  dtypes = {'F32': np.float32, 'BF16': ml_dtypes.bfloat16}
  return {
    name: np.frombuffer(data[8 + length :][slice(*about['data_offsets'])], dtypes[about['dtype']])
    .reshape(about['shape'])
    .astype(np.float64)
    for name, about in header.items()
    if name != '__metadata__'
  }


def _folder(folder: str) -> tuple[dict[str, np.ndarray], dict]:
  """(what the index names or the only file holds, config.json)."""
  index = os.path.join(folder, 'model.safetensors.index.json')
  names = ['model.safetensors']
  if os.path.exists(index):
    with open(index) as file:
      names = sorted(set(json.load(file)['weight_map'].values()))
  found = {}
  for name in names:
    found |= _safetensors(os.path.join(folder, name))
  with open(os.path.join(folder, 'config.json')) as file:
    return found, json.load(file)


def _rates(theta, width, scaling=None) -> np.ndarray:
  rates = theta ** (-np.arange(0, width, 2) / width)
  if not scaling:
    return rates
  low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
  turns = scaling['original_max_position_embeddings'] * rates / (2 * np.pi)
  kept = np.clip((turns - low) / (high - low), 0, 1)
  return rates * (kept + (1 - kept) / scaling['factor'])


def _layer(w: dict, prefix: str, names: dict) -> dict:
  return {ours: w[f'{prefix}{name}.weight'] for ours, name in names.items()}


def _folder_layer(w: dict, prefix: str, about: dict, kind: str) -> dict:
  """A layer with what only some families have, and its window and RoPE rates where they
  are not those of all layers. kind: as in layer_types of config.json."""
  found = _layer(w, prefix, LLAMA)
  found |= {ours: w[prefix + name] for ours, name in MORE.items() if prefix + name in w}
  if 'gemma' in about['model_type']:  # post_attention_layernorm is after there
    found['attn_after'] = found['mlp_norm']
    found['mlp_norm'] = w[f'{prefix}pre_feedforward_layernorm.weight']
    found['mlp_after'] = w[f'{prefix}post_feedforward_layernorm.weight']
  if kind == 'sliding_attention':
    found['window'] = about['sliding_window']
    if local := about.get('rope_local_base_freq'):
      found['rates'] = _rates(local, about['head_dim'])
  return found


MOST_MODULES = 8


def of_folder(folder: str) -> Model:
  """Of hf, transformers_mtp, mimo, medusa and speculators."""
  w, about = _folder(folder)
  width, n = about['head_dim'], about['num_hidden_layers']
  gemma = 'gemma' in about['model_type']
  if gemma:  # its norms multiply by 1 + w
    w |= {name: 1 + x for name, x in w.items() if 'norm' in name}
  kinds = [
    *about.get('layer_types', ['full_attention'] * n),
    *about.get('mtp_layer_types', ['full_attention'] * MOST_MODULES),
  ]
  sizes = Sizes(
    about['num_attention_heads'],
    about['num_key_value_heads'],
    width,
    about['rms_norm_eps'],
    _rates(about['rope_theta'], width, about.get('rope_scaling')),
    False,
    gemma,
  )
  embed = w['model.embed_tokens.weight']
  unembed = embed if about['tie_word_embeddings'] else w['lm_head.weight']
  modules = []
  for j in range(about.get('num_mtp_layers', 0)):
    p = f'model.layers.{n + j}.'
    modules.append(
      Module(
        w[f'{p}hnorm.weight'],
        w[f'{p}enorm.weight'],
        np.roll(w[f'{p}eh_proj.weight'], embed.shape[1], 1),
        _folder_layer(w, p, about, kinds[n + j]),
        w[f'{p}shared_head.norm.weight'],
        unembed,
      )
    )
  for j in range(about.get('num_nextn_predict_layers', 0)):
    p = f'model.mtp_layers.{j}.'
    modules.append(
      Module(
        w[f'{p}hidden_layernorm.weight'],
        w[f'{p}token_layernorm.weight'],
        w[f'{p}input_proj.weight'],
        _folder_layer(w, p, about, kinds[n + j]),
        w[f'{p}final_layernorm.weight'],
        unembed,
      )
    )
  if os.path.isdir(beside := os.path.join(folder, 'speculator')):
    m, more = _folder(beside)
    p, of_layer = 'mtp_layers.0.', more['transformer_layer_config']
    modules.append(
      Module(
        m[f'{p}hidden_layernorm.weight'],
        m[f'{p}token_layernorm.weight'],
        np.roll(m[f'{p}input_proj.weight'], embed.shape[1], 1),
        _folder_layer(m, p, of_layer, 'full_attention'),
        m[f'{p}final_layernorm.weight'],
        unembed,
      )
    )
  medusa = []
  if os.path.isdir(beside := os.path.join(folder, 'medusa')):
    m, more = _folder(beside)
    for j in range(more['num_heads']):
      own = m.get(f'lm_heads.{j}.weight', m.get('lm_head.weight'))
      medusa.append((m[f'blocks.{j}.layers.0.weight'], own))
  layers = [_folder_layer(w, f'model.layers.{i}.', about, kinds[i]) for i in range(n)]
  norm = w['model.norm.weight']
  tied = about.get('tie_last_hidden_states', True)
  scale = embed.shape[1] ** 0.5 if gemma else 1.0
  return Model(embed, layers, norm, unembed, modules, medusa, sizes, tied, scale)


def of_gguf(path: str) -> Model:
  """Of model.gguf, read by the gguf package."""
  import gguf

  reader = gguf.GGUFReader(path)
  says = {name.partition('.')[2]: field.contents() for name, field in reader.fields.items()}
  kinds = gguf.GGMLQuantizationType
  w = {
    x.name: gguf.dequantize(x.data, kinds(x.tensor_type)).astype(np.float64) for x in reader.tensors
  }
  width = says['attention.key_length']
  heads, kv_heads = (says['attention.head_count'], says['attention.head_count_kv'])
  for name in [x for x in w if x.endswith('attn_qkv.weight')]:
    parts = np.split(w[name], np.cumsum([heads * width, kv_heads * width]))
    for part, x in zip(parts, 'qkv', strict=True):
      w[name.replace('qkv', x)] = part
  modules = says.get('nextn_predict_layers', 0)
  n = says['block_count'] - modules
  rates = _rates(says['rope.freq_base'], width) / w.get('rope_freqs.weight', 1)
  sizes = Sizes(
    heads, kv_heads, width, says['attention.layer_norm_rms_epsilon'], rates, not modules
  )
  embed = w['token_embd.weight']
  unembed = w.get('output.weight', embed)
  found = []
  for l in range(n, n + modules):
    p = f'blk.{l}.'
    found.append(
      Module(
        w[f'{p}nextn.hnorm.weight'],
        w[f'{p}nextn.enorm.weight'],
        np.roll(w[f'{p}nextn.eh_proj.weight'], embed.shape[1], 1),
        _layer(w, p, BLOCK),
        w[f'{p}nextn.shared_head_norm.weight'],
        w.get(f'{p}nextn.shared_head_head.weight', unembed),
      )
    )
  layers = [_layer(w, f'blk.{i}.', BLOCK) for i in range(n)]
  norm = w['output_norm.weight']
  return Model(embed, layers, norm, unembed, found, [], sizes)


# Computing.


def _norm(x, w, s: Sizes):
  return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + s.eps) * w


def _turn(x_TNH, position_T, s: Sizes, rates):
  angle = position_T[:, None, None] * rates
  cos, sin = np.cos(angle), np.sin(angle)
  if s.pairs:
    a, b = x_TNH[..., 0::2], x_TNH[..., 1::2]
    turned = np.stack([a * cos - b * sin, b * cos + a * sin], -1)
    return turned.reshape(x_TNH.shape)
  a, b = np.split(x_TNH, 2, -1)
  return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _run(w: dict, x_TD, position_T, s: Sizes, before=None):
  """(a layer's output, its keys and values). Each place attends to `before`,
  (keys, values) of earlier places, to itself and to those before it in x."""
  y = _norm(x_TD, w['attn_norm'], s)
  T = len(x_TD)

  def split(name, n):
    x = (y @ w[name].T + w.get(f'{name}_bias', 0)).reshape(T, n, s.head_width)
    return _norm(x, w[f'{name}_norm'], s) if f'{name}_norm' in w else x

  rates = w.get('rates', s.rates)
  q = _turn(split('q', s.n_heads), position_T, s, rates)
  k = _turn(split('k', s.n_kv_heads), position_T, s, rates)
  v = split('v', s.n_kv_heads)
  ks, vs = k, v
  if before is not None:
    ks, vs = np.concatenate([before[0], k]), np.concatenate([before[1], v])
  group = s.n_heads // s.n_kv_heads
  score = np.einsum('tnh,snh->nts', q, np.repeat(ks, group, 1))
  score /= np.sqrt(s.head_width)
  hidden = np.triu(np.ones((T, len(ks)), bool), 1 + len(ks) - T)
  if window := w.get('window'):
    hidden |= np.tril(np.ones((T, len(ks)), bool), len(ks) - T - window)
  score = np.where(hidden, -np.inf, score)
  share = np.exp(score - score.max(-1, keepdims=True))
  share /= share.sum(-1, keepdims=True)
  a = np.einsum('nts,snh->tnh', share, np.repeat(vs, group, 1))
  attn = a.reshape(T, -1) @ w['o'].T
  x = x_TD + (_norm(attn, w['attn_after'], s) if 'attn_after' in w else attn)
  y = _norm(x, w['mlp_norm'], s)
  gate = y @ w['gate'].T
  if s.gelu:
    gate = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
  else:
    gate = gate / (1 + np.exp(-gate))
  mlp = (gate * (y @ w['up'].T)) @ w['down'].T
  return x + (_norm(mlp, w['mlp_after'], s) if 'mlp_after' in w else mlp), (k, v)


def trunk(m: Model, ids_T) -> np.ndarray:
  """Hidden states (T, D) before the final norm."""
  x = m.embed[ids_T] * m.embed_scale
  for layer in m.layers:
    x, _ = _run(layer, x, np.arange(len(ids_T)), m.sizes)
  return x


def next_tokens(m: Model, ids_T) -> np.ndarray:
  """Head 1's best token after each place (T,)."""
  z = _norm(trunk(m, ids_T), m.norm, m.sizes)
  return np.argmax(z @ m.unembed.T, -1)


def _module(x: Module, m: Model, emb_TD, states_TD, position_T, before=None):
  """(states before the norm, keys and values) of places that read the embedding
  of a token and a state."""
  pair = [_norm(states_TD, x.hidden_norm, m.sizes), _norm(emb_TD, x.embed_norm, m.sizes)]
  y = np.concatenate(pair, -1) @ x.proj.T
  return _run(x.layer, y, position_T, m.sizes, before)


def _best(x: Module, m: Model, states_TD) -> np.ndarray:
  return np.argmax(_norm(states_TD, x.final_norm, m.sizes) @ x.unembed.T, -1)


def drafts(m: Model, ids_T, hand_over: str, steps: int) -> np.ndarray:
  """The token that each step drafts at each place.

  Args:
    m: with modules, or with Medusa's heads.
    ids_T: a text.
    hand_over: as listed above.
    steps: drafts per forward pass.

  Returns:
    (steps, T): [j, t] is the draft of token t + 2 + j; token t + 1 is head 1's. -1
    where a step would read beyond the text.
  """
  ids_T = np.asarray(ids_T)
  T = len(ids_T)
  out = np.full((steps, T), -1)
  z = trunk(m, ids_T)
  if m.medusa:
    h = _norm(z, m.norm, m.sizes)
    for j, (proj, unembed) in enumerate(m.medusa[:steps]):
      y = h @ proj.T
      best = np.argmax((h + y / (1 + np.exp(-y))) @ unembed.T, -1)
      out[j] = best
    return out
  chosen = [m.modules[j % len(m.modules)] for j in range(steps)]
  emb, place = m.embed[ids_T] * m.embed_scale, np.arange(T)
  if hand_over in ('pre_norm', 'post_norm', 'pre_norm_first', 'transformers'):
    raw = hand_over[:3] == 'pre' or (hand_over == 'transformers' and not m.tied)
    state = z if raw else _norm(z, m.norm, m.sizes)
    for j, x in enumerate(chosen):
      n = T - 1 - j
      read = emb[1 + j :].copy()
      if hand_over != 'transformers':
        read[0] = 0
      state, _ = _module(x, m, read, state[:n], place[1 + j :])
      out[j, :n] = _best(x, m, state)
      if hand_over != 'pre_norm':
        state = _norm(state, x.final_norm, m.sizes)
    return out
  normed = hand_over == 'vllm'
  first = _norm(z, m.norm, m.sizes) if normed else z
  if normed:
    emb[1] = 0
  # Row p: the token at p, and the state of the place before it.
  given = np.concatenate([np.zeros_like(first[:1]), first[:-1]])
  begin = 1 if normed else 0
  earlier = [_module(x, m, emb[begin:], given[begin:], place[begin:])[1] for x in m.modules]
  for t in range(T - 1):
    chain = [first[t]]
    for j, x in enumerate(chosen[: T - 1 - t]):
      keys, values = earlier[j % len(m.modules)]
      rows, seen = slice(t + 1, t + 2 + j), t + 1 - begin
      states, _ = _module(
        x, m, emb[rows], np.stack(chain), place[rows], (keys[:seen], values[:seen])
      )
      out[j, t] = _best(x, m, states[-1:])[0]
      last = states[-1]
      chain.append(_norm(last, x.final_norm, m.sizes) if normed else last)
  return out


def accepted(m: Model, ids_T, hand_over: str, steps: int) -> np.ndarray:
  """Returns the rate (steps,) at which each draft and those before it are accepted by
  head 1, over the positions of a text where all drafts can be verified."""
  made, judge = drafts(m, ids_T, hand_over, steps), next_tokens(m, ids_T)
  places = len(ids_T) - steps
  is_accepted = [made[j, :places] == judge[1 + j :][:places] for j in range(steps)]
  return np.cumprod(is_accepted, 0).mean(1)


def passes(m: Model, ids_T, begin: int, hand_over: str, steps: int) -> int:
  """Returns the number of forward passes to decode ids_T[begin:] greedily with `steps`
  draft tokens after each pass except the first, which reads ids_T[:begin]."""
  made = drafts(m, ids_T, hand_over, steps)
  at, n = begin, 1  # the first pass has written ids_T[begin]
  while at < len(ids_T) - 1:
    t = at - 1  # the last place whose state is known
    n_ok = 0
    while n_ok < steps and at + 1 + n_ok < len(ids_T) and made[n_ok, t] == ids_T[at + 1 + n_ok]:
      n_ok += 1
    at = min(at + n_ok + 1, len(ids_T) - 1)
    n += 1
  return n
