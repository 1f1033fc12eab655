"""An independent second opinion on the model, in plain float64 NumPy.

Written to be obviously right, not fast: masks, targets and acceptance are
explicit loops, and nothing here comes from the package under test.
Letters: B row, U window, T query, S key, K target, D width, N query head,
G key-value head, H head width, E H / 2, F ffn width, V vocab.
Heads are numbered from 1: head k at query t predicts token t + 1 +
stride (k - 1).
"""

from typing import NamedTuple

import numpy as np

BLOCK_FIRST = ('parallel', 'causal', 'anticausal')
FIELDS = ('attn_norm', 'q', 'k', 'v', 'o', 'mlp_norm', 'gate', 'up', 'down')


class Shape(NamedTuple):
  family: str
  n: int
  theta: float = 10000.0
  eps: float = 1e-5
  z_loss: float = 0.0
  stride: int = 1
  window: int = 0  # of token order prediction; 0 = without

  def offset(self, k):
    return 1 + self.stride * (k - 1)

  @property
  def span(self):
    """Tokens after the last query of a window."""
    return max(self.offset(self.n), self.window)


def _float64(params):
  return {path: np.asarray(x, np.float64) for path, x in params.items()}


def _rms(x_BTD, w_D, shape):
  mean_BT1 = np.mean(x_BTD**2, axis=-1, keepdims=True)
  return x_BTD * w_D / np.sqrt(mean_BT1 + shape.eps)


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


def _rope(x_BTNH, position_BT, shape):
  H = x_BTNH.shape[-1]
  frequency_E = np.array([shape.theta ** (-2 * i / H) for i in range(H // 2)])
  angle_BT1E = position_BT[:, :, None, None] * frequency_E
  cos_BT1E, sin_BT1E = np.cos(angle_BT1E), np.sin(angle_BT1E)
  a_BTNE, b_BTNE = x_BTNH[..., : H // 2], x_BTNH[..., H // 2 :]
  c_BTNE = a_BTNE * cos_BT1E - b_BTNE * sin_BT1E
  d_BTNE = a_BTNE * sin_BT1E + b_BTNE * cos_BT1E
  return np.concatenate([c_BTNE, d_BTNE], axis=-1)


def _block(params, prefix, index, x_BTD, position_BT, shape):
  """One pre-norm transformer layer: entry `index` of the stack `prefix`."""
  w = {field: params[f'{prefix}.{field}'][index] for field in FIELDS}
  y_BTD = _rms(x_BTD, w['attn_norm'], shape)
  q_BTNH = np.einsum('BTD,DNH->BTNH', y_BTD, w['q'])
  k_BTGH = np.einsum('BTD,DGH->BTGH', y_BTD, w['k'])
  v_BTGH = np.einsum('BTD,DGH->BTGH', y_BTD, w['v'])
  q_BTNH = _rope(q_BTNH, position_BT, shape)
  k_BTGH = _rope(k_BTGH, position_BT, shape)
  N, G, H = q_BTNH.shape[2], k_BTGH.shape[2], q_BTNH.shape[3]
  kv_N = [n // (N // G) for n in range(N)]
  k_BSNH, v_BSNH = k_BTGH[:, :, kv_N], v_BTGH[:, :, kv_N]
  score_BNTS = np.einsum('BTNH,BSNH->BNTS', q_BTNH, k_BSNH) * H**-0.5
  visible_B1TS = _visible(position_BT)[:, None]
  score_BNTS = np.where(visible_B1TS, score_BNTS, -np.inf)
  p_BNTS = np.exp(score_BNTS - score_BNTS.max(axis=-1, keepdims=True))
  p_BNTS = p_BNTS / p_BNTS.sum(axis=-1, keepdims=True)
  out_BTNH = np.einsum('BNTS,BSNH->BTNH', p_BNTS, v_BSNH)
  x_BTD = x_BTD + np.einsum('BTNH,NHD->BTD', out_BTNH, w['o'])
  y_BTD = _rms(x_BTD, w['mlp_norm'], shape)
  hidden_BTF = _silu(y_BTD @ w['gate']) * (y_BTD @ w['up'])
  return x_BTD + hidden_BTF @ w['down']


def trunk(params, tokens_BT, position_BT, shape):
  """The raw (un-normed) residual z_BTD after the last trunk layer."""
  params = _float64(params)
  tokens_BT, position_BT = np.asarray(tokens_BT), np.asarray(position_BT)
  x_BTD = params['embed'][tokens_BT]
  for layer in range(params['trunk.q'].shape[0]):
    x_BTD = _block(params, 'trunk', layer, x_BTD, position_BT, shape)
  return x_BTD


def _feed(params, module, k, c_BTD, tokens_BU, position_BT, shape):
  """c_k from c_{k-1}, for the sequential and the recursive family."""
  e_BTD = np.zeros_like(c_BTD)
  for b in range(position_BT.shape[0]):
    for t in range(position_BT.shape[1]):
      if position_BT[b, t] != 0:
        e_BTD[b, t] = params['embed'][tokens_BU[b, t + shape.offset(k - 1)]]
  hidden_BTD = _rms(c_BTD, params['heads.hidden_norm'][module], shape)
  e_BTD = _rms(e_BTD, params['heads.embed_norm'][module], shape)
  both_BTC = np.concatenate([hidden_BTD, e_BTD], axis=-1)
  x_BTD = both_BTC @ params['heads.proj'][module]
  return _block(params, 'heads.block', module, x_BTD, position_BT, shape)


def _ready(params, z_BTD, tokens_BU, position_BT, shape):
  """{k: what the unembedding of head k reads}."""
  n, family, norm_D = shape.n, shape.family, params['norm']
  if family in BLOCK_FIRST:
    h = {0: z_BTD, n + 1: z_BTD}
    for k in range(n, 0, -1) if family == 'anticausal' else range(1, n + 1):
      below = {'parallel': 0, 'causal': k - 1, 'anticausal': k + 1}[family]
      h[k] = _block(params, 'heads', k - 1, h[below], position_BT, shape)
    return {k: _rms(h[k], norm_D, shape) for k in range(1, n + 1)}
  x_BTD, c_BTD = _rms(z_BTD, norm_D, shape), z_BTD
  ready = {1: x_BTD}
  for k in range(2, n + 1):
    if family == 'linear':
      ready[k] = _rms(z_BTD @ params['heads.proj'][k - 2], norm_D, shape)
    elif family == 'residual':
      ready[k] = x_BTD + _silu(x_BTD @ params['heads.proj'][k - 2])
    elif family in ('sequential', 'recursive'):
      i = 0 if family == 'recursive' else k - 2
      c_BTD = _feed(params, i, k, c_BTD, tokens_BU, position_BT, shape)
      ready[k] = _rms(c_BTD, params['heads.final_norm'][i], shape)
    else:
      raise ValueError(f'unknown family {family!r}')
  return ready


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
    logits.append(ready[k] @ unembed_DV)
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
