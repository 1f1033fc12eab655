"""The independent second opinion: the whole method in float64 NumPy, by loops.

Written from the paper (Gloeckle et al. 2024, arXiv 2404.19737) and the decided
semantics, not from `mtp_jax`; slow and plain on purpose. Parameters are a flat
dict {path: array}, layers and heads stacked. A window is U = T + n wide: T
queries, then the tokens that are only targets (or fed to feedback heads).
"""

from typing import NamedTuple

import numpy as np

FAMILIES = ('parallel', 'causal', 'anticausal')  # Head 1 is a block too.
FAMILIES += ('linear', 'residual', 'sequential', 'recursive')  # h_1 = z.


class Shape(NamedTuple):
  """What the arrays do not say: the family, n heads, and the constants."""

  family: str
  n: int
  theta: float = 10000.0
  eps: float = 1e-5
  z_loss: float = 0.0


def _cast(params):
  return {path: np.asarray(x).astype(np.float64) for path, x in params.items()}


def _at(params, prefix, i):
  """The fields whose path begins with `prefix`: layer or head i of each."""
  n = len(prefix)
  return {p[n:]: x[i] for p, x in params.items() if p.startswith(prefix)}


def _rms(x_BTD, weight_D, eps):
  mean_BT1 = np.mean(x_BTD * x_BTD, axis=-1, keepdims=True)
  return x_BTD * weight_D / np.sqrt(mean_BT1 + eps)


def _silu(x):
  return x / (1 + np.exp(-x))


def _rope(x_H, position, theta):
  """Pair i is (x[i], x[i + H/2]), turned by position * theta^(-2i/H)."""
  H = len(x_H)
  y_H = np.zeros(H)
  for i in range(H // 2):
    angle = position * theta ** (-2 * i / H)
    turned = (x_H[i] + 1j * x_H[i + H // 2]) * np.exp(1j * angle)
    y_H[i], y_H[i + H // 2] = turned.real, turned.imag
  return y_H


def _start(position_T, t):
  """Where t's segment starts: walk back to a position 0 or the edge."""
  while t > 0 and position_T[t] != 0:
    t -= 1
  return t


def _attention(q_BTNH, k_BTGH, v_BTGH, position_BU, theta):
  """Causal attention inside segments -> (B, T, N, H)."""
  B, T, N, H = q_BTNH.shape
  G = k_BTGH.shape[2]
  out_BTNH = np.zeros_like(q_BTNH)
  for b in range(B):
    start_T = [_start(position_BU[b], t) for t in range(T)]
    for n in range(N):
      g = n // (N // G)
      at_T = position_BU[b][:T]
      q_TH = [_rope(q_BTNH[b, t, n], at_T[t], theta) for t in range(T)]
      k_TH = [_rope(k_BTGH[b, t, g], at_T[t], theta) for t in range(T)]
      for t in range(T):
        seen = [s for s in range(T) if s <= t and start_T[s] == start_T[t]]
        score_S = np.array([q_TH[t] @ k_TH[s] * H**-0.5 for s in seen])
        weight_S = np.exp(score_S - score_S.max())
        for s, weight in zip(seen, weight_S / weight_S.sum(), strict=True):
          out_BTNH[b, t, n] += weight * v_BTGH[b, s, g]
  return out_BTNH


def _block(p, x_BTD, position_BU, shape):
  """One pre-norm Llama layer -> (B, T, D)."""
  y_BTD = _rms(x_BTD, p['attn_norm'], shape.eps)
  q_BTNH = np.einsum('btd,dnh->btnh', y_BTD, p['q'])
  k_BTGH = np.einsum('btd,dgh->btgh', y_BTD, p['k'])
  v_BTGH = np.einsum('btd,dgh->btgh', y_BTD, p['v'])
  out_BTNH = _attention(q_BTNH, k_BTGH, v_BTGH, position_BU, shape.theta)
  x_BTD = x_BTD + np.einsum('btnh,nhd->btd', out_BTNH, p['o'])
  y_BTD = _rms(x_BTD, p['mlp_norm'], shape.eps)
  return x_BTD + (_silu(y_BTD @ p['gate']) * (y_BTD @ p['up'])) @ p['down']


def trunk(params, tokens_BT, position_BT, shape):
  """Ids and positions (B, T), no look-ahead -> z (B, T, D), un-normed."""
  params = _cast(params)
  z_BTD = params['embed'][np.asarray(tokens_BT)]
  for i in range(len(params['trunk.q'])):
    z_BTD = _block(_at(params, 'trunk.', i), z_BTD, position_BT, shape)
  return z_BTD


def _fed(head, carry_BTD, embed_VD, tokens_BU, position_BU, k, eps):
  """The input of feedback head k's block: token t + k - 1 joins the carry."""
  next_BTD = np.zeros_like(carry_BTD)
  for b in range(carry_BTD.shape[0]):
    for t in range(carry_BTD.shape[1]):
      if position_BU[b, t] != 0:
        next_BTD[b, t] = embed_VD[tokens_BU[b, t + k - 1]]
  hidden_BTD = _rms(carry_BTD, head['hidden_norm'], eps)
  next_BTD = _rms(next_BTD, head['embed_norm'], eps)
  return np.concatenate([hidden_BTD, next_BTD], axis=-1) @ head['proj']


def _hidden(params, z_BTD, tokens_BU, position_BU, shape):
  """What the unembedding reads, norms included: [(B, T, D)] of heads 1..n."""
  family, n, eps = shape.family, shape.n, shape.eps
  assert family in FAMILIES, family
  stacked = n if family in FAMILIES[:3] else n - 1
  stacked = min(stacked, 1) if family == 'recursive' else stacked
  for path in params:
    assert not path.startswith('heads.') or len(params[path]) == stacked, path

  def block(i, x_BTD):
    return _block(_at(params, 'heads.block.', i), x_BTD, position_BU, shape)

  state = {1: z_BTD}  # By head, before the final norm.
  norm = {k: params['norm'] for k in range(1, n + 1)}
  if family == 'parallel':
    for k in range(1, n + 1):
      state[k] = block(k - 1, z_BTD)
  elif family == 'causal':
    for k in range(1, n + 1):
      state[k] = block(k - 1, z_BTD if k == 1 else state[k - 1])
  elif family == 'anticausal':
    for k in range(n, 0, -1):
      state[k] = block(k - 1, z_BTD if k == n else state[k + 1])
  elif family == 'linear':
    for k in range(2, n + 1):
      state[k] = z_BTD @ params['heads.proj'][k - 2]
  elif family == 'residual':
    x_BTD = _rms(z_BTD, norm[1], eps)
    proj = params.get('heads.proj', [])
    return [x_BTD] + [x_BTD + _silu(x_BTD @ W) for W in proj]
  else:
    for k in range(2, n + 1):
      i, last = 0 if family == 'recursive' else k - 2, state[k - 1]
      head, embed = _at(params, 'heads.', i), params['embed']
      fed = _fed(head, last, embed, tokens_BU, position_BU, k, eps)
      state[k], norm[k] = block(i, fed), head['final_norm']
  return [_rms(state[k], norm[k], eps) for k in range(1, n + 1)]


def forward(params, tokens_BU, position_BU, shape):
  """A window of U = T + n tokens and positions -> logits (n, B, T, V)."""
  params = _cast(params)
  tokens_BU, position_BU = np.asarray(tokens_BU), np.asarray(position_BU)
  T = tokens_BU.shape[1] - shape.n
  z_BTD = trunk(params, tokens_BU[:, :T], position_BU[:, :T], shape)
  hidden = _hidden(params, z_BTD, tokens_BU, position_BU, shape)
  unembed = params.get('unembed', params['embed'].T)
  own = [unembed] * shape.n if unembed.ndim == 2 else unembed
  return np.stack([hidden[k] @ own[k] for k in range(shape.n)])


def valid(position_BU, b, t, k, mask_BU=None):
  """Whether token t + k of row b is a target of head k (from 1) at t."""
  masked = mask_BU is not None and not mask_BU[b][t + k]
  return not masked and position_BU[b][t + k] == position_BU[b][t] + k


def losses(
  logits_KBTV, tokens_BU, position_BU, shape, weights_K=None, mask_BU=None
):
  """loss_k = sum(nll + z_loss * lse^2) / count_k over head k's own targets.

  Returns dict(total = sum of weight_k * loss_k, loss_K, accuracy_K, count_K).
  """
  K, B, T, _ = logits_KBTV.shape
  loss_K, accuracy_K, count_K = np.zeros(K), np.zeros(K), np.zeros(K, int)
  weights_K = np.ones(K) if weights_K is None else np.asarray(weights_K)
  for i in range(K):
    for b in range(B):
      for t in range(T):
        if valid(position_BU, b, t, i + 1, mask_BU):
          logits_V, target = logits_KBTV[i, b, t], tokens_BU[b][t + i + 1]
          top = logits_V.max()
          lse = top + np.log(np.sum(np.exp(logits_V - top)))
          loss_K[i] += lse - logits_V[target] + shape.z_loss * lse**2
          accuracy_K[i] += np.argmax(logits_V) == target
          count_K[i] += 1
    if count_K[i] > 0:
      loss_K[i] /= count_K[i]
      accuracy_K[i] /= count_K[i]
  total = sum(float(weights_K[i] * loss_K[i]) for i in range(K))
  return dict(
    total=total, loss_K=loss_K, accuracy_K=accuracy_K, count_K=count_K
  )


def acceptance(logits_KBTV, tokens_BU, position_BU, mask_BU=None):
  """Teacher-forced: drafts against head 1's argmax, never against the text.

  Returns dict(rate_K = accepted_j / accepted_(j-1), 1 for head 1, and
  length = 1 + sum over j >= 2 of rate_2 * ... * rate_j).
  """
  K, B, T, _ = logits_KBTV.shape
  best_KBT, accepted_K = np.argmax(logits_KBTV, axis=-1), np.zeros(K)
  for b in range(B):
    for t in range(T - K + 1):
      if all(valid(position_BU, b, t, k, mask_BU) for k in range(1, K + 1)):
        for i in range(K):  # Head i + 1; head 1 always agrees with itself.
          if best_KBT[i, b, t] != best_KBT[0, b, t + i]:
            break
          accepted_K[i] += 1
  rate_K, length = np.ones(K), 1.0
  for i in range(1, K):
    before = accepted_K[i - 1]
    rate_K[i] = accepted_K[i] / before if before else 0.0
    length += np.prod(rate_K[: i + 1])
  return dict(rate_K=rate_K, length=float(length))


def _next(params, text, k, shape):
  """Argmax of head k at query len(text) - k: the id to append to the text."""
  t = len(text) - k
  row = list(text) + [0] * (t + 1 + shape.n - len(text))
  window, position = np.array([row]), np.arange(len(row))[None]
  return int(np.argmax(forward(params, window, position, shape)[k - 1, 0, t]))


def greedy(params, prompt, n_new, shape):
  """The n_new ids after one prompt (a list of ids): head 1, no cache."""
  text = list(prompt)
  for _ in range(n_new):
    text.append(_next(params, text, 1, shape))
  return text[len(prompt) :]


def blockwise(params, prompt, n_new, width, shape):
  """Greedy blockwise parallel decoding (Stern et al. 2018), width <= n.

  Returns (the n_new ids, the forwards a cached decoder needs: one over the
  prompt, then one a round that verifies width - 1 drafts and proposes anew).
  """
  text, drafts, forwards = list(prompt), [], 0
  while len(text) < len(prompt) + n_new:
    forwards += 1
    while drafts and drafts[0] == _next(params, text, 1, shape):
      text.append(drafts.pop(0))
    text.append(_next(params, text, 1, shape))
    drafts = []
    for k in range(2, width + 1):
      drafts.append(_next(params, text + drafts, k, shape))
  return text[len(prompt) : len(prompt) + n_new], forwards


def numeric_grad(f, params, path, index, eps=1e-5):
  """Central difference of the scalar f(params) in params[path][index]."""
  low, high = _cast(params), _cast(params)
  low[path][index] -= eps
  high[path][index] += eps
  return (f(high) - f(low)) / (2 * eps)
