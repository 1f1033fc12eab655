"""The paper's loop over heads in plain PyTorch, in float32.

Gloeckle et al. 2024 (https://arxiv.org/abs/2404.19737), section 2: one forward
pass of the trunk; then forward and backward of one head after the other, down to a
detached z that accumulates gradients, so that the logits of a head are freed before
those of the next; then one backward pass of the trunk. The same Llama as in the
package, with parallel heads, a shared unembedding, and one document per row.
"""

import dataclasses
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class Parameters(NamedTuple):
  """Leaf tensors; layers are lists, since the gradient of a slice of a stack is as
  large as the stack."""

  embed: Any
  trunk: list[dict]
  heads: list[dict]
  norm: Any
  unembed: Any


def load(w) -> Parameters:
  """Copies an lm.LM of unsharded arrays to tensors."""

  def leaf(x):
    return torch.tensor(x, dtype=torch.float32, requires_grad=True)

  def layers(stack):
    fields = {f.name: getattr(stack, f.name) for f in dataclasses.fields(stack)}
    present = {name: x for name, x in fields.items() if x is not None}
    return [{name: leaf(x[i]) for name, x in present.items()} for i in range(len(stack.q))]

  return Parameters(leaf(w.embed), layers(w.trunk), layers(w.heads), leaf(w.norm), leaf(w.unembed))


def gradients(p: Parameters) -> dict:
  """Returns gradients by path, as 'trunk.q', stacked as in the package."""
  found = {name: getattr(p, name).grad for name in ('embed', 'norm', 'unembed')}
  for part in ('trunk', 'heads'):
    layers = getattr(p, part)
    for name in layers[0]:
      stack = torch.stack([layer[name].grad for layer in layers])
      found[f'{part}.{name}'] = stack
  return {name: x.numpy() for name, x in found.items()}


def _norm(x, w, eps):
  return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w


def _rotate(x_bnth, theta):
  T, H = x_bnth.shape[-2:]
  angle = torch.outer(torch.arange(T).float(), theta ** (-torch.arange(0, H, 2) / H))
  a, b = x_bnth.chunk(2, dim=-1)
  sin, cos = angle.sin(), angle.cos()
  return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _block(w, x, m):
  y = _norm(x, w['attn_norm'], m.norm_eps)
  q, k, v = (torch.einsum('btd,dnh->bnth', y, w[name]) for name in ('q', 'k', 'v'))
  q, k = _rotate(q, m.rope_theta), _rotate(k, m.rope_theta)
  mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
  x = x + torch.einsum('bnth,nhd->btd', mixed, w['o'])
  y = _norm(x, w['mlp_norm'], m.norm_eps)
  return x + (F.silu(y @ w['gate']) * (y @ w['up'])) @ w['down']


def step(p: Parameters, tokens_BU, n: int, m) -> float:
  """Returns the loss; replaces the gradients of the parameters."""
  for x in (p.embed, p.norm, p.unembed):
    x.grad = None
  for layer in p.trunk + p.heads:
    for x in layer.values():
      x.grad = None
  T = tokens_BU.shape[1] - n
  z = F.embedding(tokens_BU[:, :T], p.embed)
  for layer in p.trunk:
    z = _block(layer, z, m)
  detached = z.detach().requires_grad_()
  total = 0.0
  for k, head in enumerate(p.heads, 1):
    h = _norm(_block(head, detached, m), p.norm, m.norm_eps)
    logits = (h @ p.unembed).flatten(0, 1)
    loss = F.cross_entropy(logits, tokens_BU[:, k : k + T].flatten())
    loss.backward()
    total += loss.item()
    del logits, loss  # free them before the next head
  z.backward(detached.grad)
  return total
