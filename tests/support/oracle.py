"""An independent second opinion on the model, in plain float64 NumPy.

Written to be obviously right, not fast: masks, targets and acceptance are
explicit loops, and nothing here comes from the package under test.
Letters: B row, U window, T query, S key, K target, D width, N query head,
G key-value head, H head width, E H / 2, F ffn width, V vocab.
Heads are numbered from 1: head k at query t predicts token t + 1 +
stride (k - 1).
"""

import math
from typing import NamedTuple

import numpy as np

BLOCK_FIRST = ('parallel', 'causal', 'anticausal')


class Layer(NamedTuple):
  """What a layer's attention sees, and how it rotates."""

  window: int = 0  # 0 = all before
  theta: float = 10000.0  # 0 = no rotation
  rates: tuple[float, ...] = ()  # instead of those of theta
  temperature: float = 1.0  # of sines and cosines


class Block(NamedTuple):
  """Options of the block; where a weight is missing, so is what it does."""

  layers: tuple[Layer, ...] = (Layer(),)  # of the layers of the next token, cyclically
  head_layer: Layer | None = None  # of heads >= 2; None = as the last layer
  rotated: float = 1.0  # fraction of a head's dimensions
  one_plus: bool = False  # norms multiply by 1 + w
  qk_eps: float = 0.0  # 0 = eps
  activation: str = 'silu'
  scale: float = 0.0  # of scores; 0 = H ** -.5
  score_cap: float = 0.0
  logits_cap: float = 0.0
  logits_scale: float = 1.0
  embedding_scale: float = 1.0
  residual_scale: float = 1.0


class Shape(NamedTuple):
  family: str
  n: int
  theta: float = 10000.0
  eps: float = 1e-5
  z_loss: float = 0.0
  stride: int = 1
  window: int = 0  # of token order prediction; 0 = without
  trunk_state: str = 'post_norm'  # what a chain of modules hands on
  mix_step: int | None = None  # of mixed hidden states
  share_kv: bool = False  # heads of a shared module attend to what head 2 does
  drafted: tuple[int, ...] = ()  # tokens that heads >= 2 score; () = all
  block: Block = Block()

  def offset(self, k):
    return 1 + self.stride * (k - 1)

  @property
  def span(self):
    """Tokens after the last query of a window."""
    return max(self.offset(self.n), self.window)


def _float64(params):
  return {path: np.asarray(x, np.float64) for path, x in params.items()}


def _rms(x, w, shape, eps=0.0):
  """Over as many of the last dimensions as w has."""
  over = tuple(range(-np.ndim(w), 0))
  mean = np.mean(x**2, axis=over, keepdims=True)
  return x * (1 + w if shape.block.one_plus else w) / np.sqrt(mean + (eps or shape.eps))


def _silu(x):
  return x / (1.0 + np.exp(-x))


def _visible(position_BT):
  """True where query t may look at key s."""
  B, T = position_BT.shape
  visible_BTS = np.zeros((B, T, T), bool)
  for b in range(B):
    segment, segment_T = 0, []
    for t in range(T):
      if position_BT[b, t] == 0:
        segment += 1
      segment_T.append(segment)
    for t in range(T):
      for s in range(t + 1):
        visible_BTS[b, t, s] = segment_T[s] == segment_T[t]
  return visible_BTS


def _gelu(x):
  return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def _gelu_tanh(x):
  return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {'silu': _silu, 'gelu': _gelu, 'gelu_tanh': _gelu_tanh}


def _cap(x, cap):
  return cap * np.tanh(x / cap) if cap else x


def _rope(x_BTNH, position_BT, shape, layer):
  if not layer.theta:
    return x_BTNH
  R = int(x_BTNH.shape[-1] * shape.block.rotated)
  frequency_E = np.array(layer.rates or [layer.theta ** (-2 * i / R) for i in range(R // 2)])
  angle_BT1E = position_BT[:, :, None, None] * frequency_E
  cos_BT1E, sin_BT1E = (layer.temperature * f(angle_BT1E) for f in (np.cos, np.sin))
  a_BTNE, b_BTNE = x_BTNH[..., : R // 2], x_BTNH[..., R // 2 : R]
  c_BTNE = a_BTNE * cos_BT1E - b_BTNE * sin_BT1E
  d_BTNE = a_BTNE * sin_BT1E + b_BTNE * cos_BT1E
  return np.concatenate([c_BTNE, d_BTNE, x_BTNH[..., R:]], axis=-1)


def _block(params, prefix, index, x_BTD, position_BT, shape, layer, kv=None):
  """One transformer layer: entry `index` of the stack `prefix`."""
  o = shape.block
  w = {
    path.removeprefix(prefix + '.'): array[index]
    for path, array in params.items()
    if path.startswith(prefix + '.') and '.' not in path.removeprefix(prefix + '.')
  }
  y_BTD = _rms(x_BTD, w['attn_norm'], shape) if 'attn_norm' in w else x_BTD
  q_BTNH = np.einsum('BTD,DNH->BTNH', y_BTD, w['q']) + w.get('q_bias', 0.0)
  k_BTGH = np.einsum('BTD,DGH->BTGH', y_BTD, w['k']) + w.get('k_bias', 0.0)
  v_BTGH = np.einsum('BTD,DGH->BTGH', y_BTD, w['v']) + w.get('v_bias', 0.0)
  if 'q_norm' in w:
    q_BTNH = _rms(q_BTNH, w['q_norm'], shape, o.qk_eps)
    k_BTGH = _rms(k_BTGH, w['k_norm'], shape, o.qk_eps)
  q_BTNH = _rope(q_BTNH, position_BT, shape, layer)
  k_BTGH = _rope(k_BTGH, position_BT, shape, layer)
  if kv:  # those of the first call
    k_BTGH, v_BTGH = kv
  elif kv is not None:
    kv += [k_BTGH, v_BTGH]
  N, G, H = q_BTNH.shape[2], k_BTGH.shape[2], q_BTNH.shape[3]
  kv_N = [n // (N // G) for n in range(N)]
  k_BSNH, v_BSNH = k_BTGH[:, :, kv_N], v_BTGH[:, :, kv_N]
  score_BNTS = np.einsum('BTNH,BSNH->BNTS', q_BTNH, k_BSNH) * (o.scale or H**-0.5)
  score_BNTS = _cap(score_BNTS, o.score_cap)
  visible_B1TS = _visible(position_BT)[:, None]
  for t in range(visible_B1TS.shape[2] if layer.window else 0):
    visible_B1TS[:, :, t, : max(0, t - layer.window + 1)] = False
  score_BNTS = np.where(visible_B1TS, score_BNTS, -np.inf)
  if 'sink' in w:
    sink_BNT1 = np.broadcast_to(w['sink'][None, :, None, None], (*score_BNTS.shape[:3], 1))
    score_BNTS = np.concatenate([score_BNTS, sink_BNT1], axis=-1)
  p_BNTS = np.exp(score_BNTS - score_BNTS.max(axis=-1, keepdims=True))
  p_BNTS = p_BNTS / p_BNTS.sum(axis=-1, keepdims=True)
  if 'sink' in w:
    p_BNTS = p_BNTS[..., :-1]
  out_BTNH = np.einsum('BNTS,BSNH->BTNH', p_BNTS, v_BSNH)
  if 'attn_gate' in w:
    out_BTNH = out_BTNH / (1 + np.exp(-np.einsum('BTD,DNH->BTNH', y_BTD, w['attn_gate'])))
  added_BTD = np.einsum('BTNH,NHD->BTD', out_BTNH, w['o']) + w.get('o_bias', 0.0)
  if 'attn_out_norm' in w:
    added_BTD = _rms(added_BTD, w['attn_out_norm'], shape)
  x_BTD = x_BTD + o.residual_scale * added_BTD
  y_BTD = _rms(x_BTD, w['mlp_norm'], shape) if 'mlp_norm' in w else x_BTD
  gate_BTF = y_BTD @ w['gate'] + w.get('gate_bias', 0.0)
  up_BTF = y_BTD @ w['up'] + w.get('up_bias', 0.0)
  added_BTD = (ACTIVATIONS[o.activation](gate_BTF) * up_BTF) @ w['down'] + w.get('down_bias', 0.0)
  if 'mlp_out_norm' in w:
    added_BTD = _rms(added_BTD, w['mlp_out_norm'], shape)
  return x_BTD + o.residual_scale * added_BTD


def _layer(shape, i):
  return shape.block.layers[i % len(shape.block.layers)]


def _layer_of_head(shape, k, trunk):
  """Head 1 of a block-first model is the layer after the trunk, as are all heads of an
  anticausal chain, from n down."""
  if k > 1 and shape.block.head_layer:
    return shape.block.head_layer
  if shape.family == 'anticausal':
    return _layer(shape, trunk + shape.n - k)
  return _layer(shape, trunk if shape.family in BLOCK_FIRST else trunk - 1)


def trunk(params, tokens_BT, position_BT, shape):
  """The raw (un-normed) residual z_BTD after the last trunk layer."""
  params = _float64(params)
  tokens_BT, position_BT = np.asarray(tokens_BT), np.asarray(position_BT)
  x_BTD = shape.block.embedding_scale * params['embed'][tokens_BT]
  for i in range(params['trunk.q'].shape[0]):
    x_BTD = _block(params, 'trunk', i, x_BTD, position_BT, shape, _layer(shape, i))
  return x_BTD


def _feed(params, module, k, c_BTD, tokens_BU, position_BT, shape, kv):
  """c_k from c_{k-1}, for the sequential and the recursive family."""
  e_BTD = np.zeros_like(c_BTD)
  for b in range(position_BT.shape[0]):
    for t in range(position_BT.shape[1]):
      if position_BT[b, t] != 0:
        token = tokens_BU[b, t + shape.offset(k - 1)]
        e_BTD[b, t] = shape.block.embedding_scale * params['embed'][token]
  hidden_BTD = _rms(c_BTD, params['heads.hidden_norm'][module], shape)
  e_BTD = _rms(e_BTD, params['heads.embed_norm'][module], shape)
  both_BTC = np.concatenate([hidden_BTD, e_BTD], axis=-1)
  x_BTD = both_BTC @ params['heads.proj'][module]
  layer = _layer_of_head(shape, k, len(params['trunk.q']))
  return _block(params, 'heads.block', module, x_BTD, position_BT, shape, layer, kv)


def _draw(tokens_U, position, t, k, step):
  """A number in [0, 1) of 32-bit integers, by Python's own."""

  def mixed(x):
    x ^= x >> 16
    x = x * 0x85EBCA6B % 2**32
    x ^= x >> 13
    x = x * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)

  found = mixed(int(position))
  for x in (int(tokens_U[t]), int(tokens_U[t + 1]), k, step):
    found = (mixed(found ^ x) + 0x9E3779B9) % 2**32
  return (mixed(found) >> 8) / 2**24


def _ready(params, z_BTD, tokens_BU, position_BT, shape):
  """{k: what the unembedding of head k reads}."""
  n, family, norm_D = shape.n, shape.family, params['norm']
  if family in BLOCK_FIRST:
    h = {0: z_BTD, n + 1: z_BTD}
    for k in range(n, 0, -1) if family == 'anticausal' else range(1, n + 1):
      below = {'parallel': 0, 'causal': k - 1, 'anticausal': k + 1}[family]
      layer = _layer_of_head(shape, k, len(params['trunk.q']))
      h[k] = _block(params, 'heads', k - 1, h[below], position_BT, shape, layer)
    return {k: _rms(h[k], norm_D, shape) for k in range(1, n + 1)}
  x_BTD = _rms(z_BTD, norm_D, shape)
  c_BTD = x_BTD if shape.trunk_state == 'post_norm' else z_BTD
  ready, kv = {1: x_BTD}, [] if shape.share_kv else None
  for k in range(2, n + 1):
    if family == 'linear':
      ready[k] = _rms(z_BTD @ params['heads.proj'][k - 2], norm_D, shape)
    elif family == 'residual':
      ready[k] = x_BTD + _silu(x_BTD @ params['heads.proj'][k - 2])
    elif family in ('sequential', 'recursive'):
      i = 0 if family == 'recursive' else k - 2
      before_BTD = np.array(c_BTD)
      c_BTD = _feed(params, i, k, c_BTD, tokens_BU, position_BT, shape, kv)
      ready[k] = _rms(c_BTD, params['heads.final_norm'][i], shape)
      if shape.trunk_state != 'pre_norm':
        c_BTD = np.array(ready[k])
      if shape.mix_step is not None:
        for b in range(len(z_BTD)):
          for t in range(z_BTD.shape[1]):
            if _draw(tokens_BU[b], position_BT[b, t], t, k, shape.mix_step) >= np.float32(1 / k):
              c_BTD[b, t] = before_BTD[b, t]
    else:
      raise ValueError(f'unknown family {family!r}')
  return ready


def hidden(params, tokens_BU, position_BU, shape):
  """{k: what the unembedding of head k reads}, (B, T, D) each."""
  params = _float64(params)
  position_BT = np.asarray(position_BU)[:, : np.shape(tokens_BU)[1] - shape.span]
  T = position_BT.shape[1]
  z_BTD = trunk(params, tokens_BU[:, :T], position_BT, shape)
  return _ready(params, z_BTD, np.asarray(tokens_BU), position_BT, shape)


def forward(params, tokens_BU, position_BU, shape):
  """Logits_KBTV of every head at the first T = U - span tokens."""
  params = _float64(params)
  tokens_BU, position_BU = np.asarray(tokens_BU), np.asarray(position_BU)
  T = tokens_BU.shape[1] - shape.span
  position_BT = position_BU[:, :T]
  z_BTD = trunk(params, tokens_BU[:, :T], position_BT, shape)
  ready = _ready(params, z_BTD, tokens_BU, position_BT, shape)
  logits = []
  for k in range(1, shape.n + 1):
    unembed = params['unembed'] if 'unembed' in params else params['embed'].T
    unembed_DV = unembed[k - 1] if unembed.ndim == 3 else unembed
    logits_BTV = shape.block.logits_scale * (ready[k] @ unembed_DV)
    logits_BTV = _cap(logits_BTV, shape.block.logits_cap)
    if 'markov.embed' in params and k > 1:
      before_BT = tokens_BU[:, k - 1 : k - 1 + T]
      gained = params['markov.embed'][before_BT] @ params['markov.unembed']
      logits_BTV = np.array(logits_BTV)
      logits_BTV[:, :, list(shape.drafted) or slice(None)] += gained
    if shape.drafted and k > 1:
      others = [v for v in range(unembed_DV.shape[1]) if v not in shape.drafted]
      logits_BTV = np.array(logits_BTV)
      logits_BTV[:, :, others] = -np.inf
    logits.append(logits_BTV)
  return np.stack(logits)


def _valid(position_U, t, k):
  """Whether token t + k continues the document of token t."""
  return bool(position_U[t + k] == position_U[t] + k)


def losses(logits_KBTV, tokens_BU, position_BU, shape, weights_K=None, mask_BU=None):
  logits_KBTV = np.asarray(logits_KBTV, np.float64)
  tokens_BU, position_BU = np.asarray(tokens_BU), np.asarray(position_BU)
  K, B, T, _ = logits_KBTV.shape
  assert tokens_BU.shape == (B, T + shape.span), (tokens_BU.shape, T)
  weights_K = np.ones(K) if weights_K is None else np.asarray(weights_K)
  loss_K, accuracy_K, count_K = np.zeros(K), np.zeros(K), np.zeros(K, int)
  for k in range(1, K + 1):
    loss, right, count = 0.0, 0, 0
    for b in range(B):
      for t in range(T):
        there = t + shape.offset(k)
        if not _valid(position_BU[b], t, shape.offset(k)):
          continue
        if mask_BU is not None and mask_BU[b][there] != 1:
          continue
        target, logits_V = tokens_BU[b, there], logits_KBTV[k - 1, b, t]
        if logits_V[target] == -np.inf:  # not drafted
          continue
        top = logits_V.max()
        lse = top + np.log(np.sum(np.exp(logits_V - top)))
        loss += lse - logits_V[target] + shape.z_loss * lse**2
        right += int(np.argmax(logits_V) == target)
        count += 1
    count_K[k - 1] = count
    if count > 0:
      loss_K[k - 1], accuracy_K[k - 1] = loss / count, right / count
  total = float(sum(weights_K[i] * loss_K[i] for i in range(K)))
  return dict(total=total, loss_K=loss_K, accuracy_K=accuracy_K, count_K=count_K)


def order(params, tokens_BU, position_BU, shape):
  """Mean cross-entropy between the softmax of W - distance over the tokens that
  come within W (first occurrences, same document) and that of head 1's second
  unembedding, over the positions with a next token."""
  params = _float64(params)
  tokens_BU, position_BU = np.asarray(tokens_BU), np.asarray(position_BU)
  T = tokens_BU.shape[1] - shape.span
  position_BT = position_BU[:, :T]
  z_BTD = trunk(params, tokens_BU[:, :T], position_BT, shape)
  h_BTD = _ready(params, z_BTD, tokens_BU, position_BT, shape)[1]
  total, count = 0.0, 0
  for b in range(len(tokens_BU)):
    for t in range(T):
      score = {}
      for d in range(1, shape.window + 1):
        if _valid(position_BU[b], t, d):
          score.setdefault(int(tokens_BU[b, t + d]), shape.window - d)
      if not score:
        continue
      logits_V = params['order'] @ h_BTD[b, t]
      top = logits_V.max()
      log_q_V = logits_V - top - np.log(np.sum(np.exp(logits_V - top)))
      mass = sum(np.exp(float(x)) for x in score.values())
      for token, x in score.items():
        total -= np.exp(float(x)) / mass * log_q_V[token]
      count += 1
  return total / count


def acceptance(logits_KBTV, position_BU, shape):
  """[evaluated, draft of t + 2 accepted, of t + 3 …] over all queries t. A draft
  is made by the head that reaches exactly that far, or by one that does from
  less than a stride before t."""
  logits_KBTV, position_BU = np.asarray(logits_KBTV), np.asarray(position_BU)
  n, B, T, _ = logits_KBTV.shape
  choice_KBT = np.argmax(logits_KBTV, axis=-1)
  far = shape.offset(n)
  accepted = np.zeros(far, int)
  for b in range(B):
    for t in range(shape.stride - 1, T - far + 1):
      made_at = range(t - shape.stride + 1, t + 1)
      if not all(
        _valid(position_BU[b], made, shape.offset(k))
        for made in (made_at[0], t)
        for k in range(1, n + 1)
      ):
        continue
      accepted[0] += 1
      for j in range(2, far + 1):
        [(k, made)] = [
          (k, made) for made in made_at for k in range(1, n + 1) if made + shape.offset(k) == t + j
        ]
        if choice_KBT[k - 1, b, made] != choice_KBT[0, b, t + j - 1]:
          break
        accepted[j - 1] += 1
  return accepted


class Comparison(NamedTuple):
  """How drafts are compared with head 1."""

  loss: str = 'tv'
  eta: float = 3.0
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0


def compared(
  logits_KBTV, teacher_BTV, position_BU, shape, how, *, held=None, mask_BU=None, stored=None
):
  """Mean loss and acceptance rate of each head's drafts, by loops over the vocabulary.

  The teacher's logits are head 1's, of parameters that do not move; `held`: acceptance
  rates by (k, b, t) in the share of lk_hybrid, which do not move either. `stored`: instead of
  the teacher's logits, (ids_BTP, log-probabilities of these and of all others).
  """
  logits_KBTV = np.asarray(logits_KBTV)
  K, B, T, V = logits_KBTV.shape
  alpha, loss_of = {}, {}

  def verified(b, t, k):
    there = t + shape.offset(k)
    inside = there - 1 < T and _valid(position_BU[b], t, shape.offset(k))
    return inside and (mask_BU is None or mask_BU[b][there] == 1)

  filters = how.top_k, how.top_p, how.min_p
  for k in range(2, K + 1):
    for b in range(B):
      for t in range(T):
        if not verified(b, t, k):
          continue
        z_V, there = logits_KBTV[k - 1, b, t], t + shape.offset(k) - 1
        q_V, rest, known = kept(z_V, how.temperature, *filters), 0.0, range(V)
        if stored is None:
          p_V = kept(teacher_BTV[b, there], how.temperature, *filters)
        else:
          p_V, known = np.zeros(V), [int(v) for v in stored[0][b, there]]
          mass = [math.exp(x) for x in stored[1][b, there]]
          for v, x in zip(known, mass, strict=False):
            p_V[v] = x / sum(mass)
          rest = mass[-1] / sum(mass)
          if filters != (0, 1.0, 0.0):  # those of the filters are all known
            p_V, rest = kept(np.log(np.maximum(p_V, 1e-300)), how.temperature, *filters), 0.0
        open_V = kept(z_V, how.temperature)
        rate = sum(min(p_V[v], q_V[v]) for v in range(V))
        drafted = [v for v in range(V) if p_V[v] > 0 and z_V[v] > -np.inf]
        mass = sum(p_V[v] for v in drafted) if shape.drafted else 1.0
        kl = sum(p_V[v] * math.log(p_V[v] / mass / open_V[v]) for v in drafted)
        if rest and not shape.drafted:
          kl += rest * math.log(rest / sum(open_V[v] for v in range(V) if v not in known))
        alpha[k, b, t] = rate
        share = math.exp(-how.eta * (held or alpha)[k, b, t])
        loss_of[k, b, t] = {
          'kl': kl,
          'tv': 1 - rate,
          'lk': -math.log(max(rate, 1e-5)),
          'lk_hybrid': share * kl + (1 - share) * (1 - rate),
          'e2e_tv': 0.0,
        }[how.loss]
  whole = [
    (b, t)
    for b in range(B)
    for t in range(T)
    if all((k, b, t) in alpha for k in range(2, K + 1)) and K > 1
  ]
  in_a_row_K = np.zeros(K)
  for b, t in whole:
    product = 1.0
    in_a_row_K[0] += 1
    for k in range(2, K + 1):
      product *= alpha[k, b, t]
      in_a_row_K[k - 1] += product
  loss_K, alpha_K, count_K = np.zeros(K), np.zeros(K), np.zeros(K, int)
  compared_K = np.zeros(K, int)
  for k in range(2, K + 1):
    found = [key for key in alpha if key[0] == k]
    compared_K[k - 1] = len(found)
    alpha_K[k - 1] = sum(alpha[key] for key in found)
    if how.loss == 'e2e_tv':
      found = [(k, b, t) for b, t in whole]
    count_K[k - 1] = len(found)
    loss_K[k - 1] = sum(loss_of[key] for key in found) / max(len(found), 1)
    if how.loss == 'e2e_tv' and whole:
      loss_K[k - 1] = (1 - in_a_row_K[k - 1] / len(whole)) / (K - 1)
  sums = dict(alpha_sum_K=alpha_K, alpha_count_K=compared_K, in_a_row_K=in_a_row_K)
  return sums | dict(loss_K=loss_K, count_K=count_K, alpha=alpha)


def greedy(params, prompt, n_new, shape):
  """The n_new tokens after the prompt: head 1, a full forward each."""
  params = _float64(params)
  tokens = [int(token) for token in prompt]
  for _ in range(n_new):
    window_1U = np.array([tokens + [0] * shape.span])  # head 1 sees no padding
    position_1U = np.arange(window_1U.shape[1])[None]
    logits_K1TV = forward(params, window_1U, position_1U, shape)
    tokens.append(int(np.argmax(logits_K1TV[0, 0, -1])))
  return tokens[len(prompt) :]


def derivative(f, params, along, eps=1e-6):
  """Central difference of f(params) as each array of `along` moves params."""

  def moved(step):
    return float(
      f(
        params
        | {
          path: np.asarray(params[path], np.float64) + step * array for path, array in along.items()
        }
      )
    )

  return (moved(eps) - moved(-eps)) / (2 * eps)


def kept(logits_V, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
  """Probabilities after each filter in turn, by ranking one token at a time."""
  logits_V = np.asarray(logits_V, np.float64) / temperature
  p_V = np.exp(logits_V - logits_V.max())
  p_V /= p_V.sum()
  ranked = sorted(range(len(p_V)), key=lambda v: -p_V[v])
  if top_k:
    ranked = ranked[:top_k]
  total, mass, few = sum(p_V[v] for v in ranked), 0.0, []
  for v in ranked:
    if mass >= top_p:
      break
    few.append(v)
    mass += p_V[v] / total
  best = p_V[ranked[0]]
  out_V = np.zeros_like(p_V)
  for v in few:
    if p_V[v] >= min_p * best:
      out_V[v] = p_V[v]
  return out_V / out_V.sum()
