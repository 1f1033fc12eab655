"""Sums of a step or an evaluation -> named scalars, and their table."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def mean(total, count) -> float | None:
  """Returns total / count; None (null in JSON, `-` in a table) if count is 0."""
  return float(total / count) if count else None


def acceptance(accepted_K) -> tuple[list[float | None], float | None]:
  """Returns (acceptance rates of drafts 2, 3, …, mean acceptance length) from
  the sums of `targets.acceptance`.

  A rate is conditional on the drafts before it; the length is the head-1 token
  plus the accepted drafts, in tokens per forward pass. None where nothing was
  proposed.
  """
  rates, prefix_rate = [], 1.0
  length = 1.0
  for before, after in zip(accepted_K[:-1], accepted_K[1:], strict=True):
    rates.append(mean(after, before))
    prefix_rate *= rates[-1] or 0.0
    length += prefix_rate
  return rates, length if accepted_K[0] else None


def scalars(metrics: dict) -> dict[str, Any]:
  """Returns a step's metrics (host arrays) as flat scalars in reading order: sums
  divided by their counts, None where a count is 0."""
  count_K = metrics['count_K']
  out = dict(loss=float(metrics['total']) if np.any(count_K) else None)
  for name, total in dict(loss='loss_sum_K', z_loss='z_loss_sum_K', accuracy='correct_K').items():
    sum_K = metrics[total]
    if name != 'z_loss' or np.any(sum_K):
      out |= {f'{name}_{k}': mean(*of) for k, of in enumerate(zip(sum_K, count_K, strict=True), 1)}
  for name in ('head_grad_norm', 'weight'):
    for k, value in enumerate(metrics.get(f'{name}_K', ()), 1):
      out[f'{name}_{k}'] = float(value)
  if 'token_order_loss_sum' in metrics:
    out['token_order_loss'] = mean(metrics['token_order_loss_sum'], count_K[0])
  rates, length = acceptance(metrics['accepted_K'])
  out |= {f'acceptance_{k}': rate for k, rate in enumerate(rates, 2)}
  out['mean_acceptance_length'] = length
  if 'draft_count_K' in metrics:
    out |= _drafts(metrics)
  nats = metrics['loss_sum_K'][0] - metrics['z_loss_sum_K'][0]
  out['bits_per_byte'] = mean(nats / math.log(2), metrics['bytes'])
  for name in ('lr', 'grad_norm', 'skipped', 'consecutive_nonfinite'):
    if name in metrics:
      out[name] = float(metrics[name])
  return out


def _drafts(metrics: dict) -> dict[str, float | None]:
  """Returns what drafts that are sampled at --loss.temperature are accepted by: alpha of
  each head, the mean acceptance length, and each head's --loss.head_loss but for ce; with
  --loss.teacher sum min(p, q) of that as teacher_alpha, and alpha in evaluations only."""
  out = {}
  for name in ('alpha', 'teacher_alpha', 'draft_loss'):
    total = f'{name}_sum_K'
    if total not in metrics:
      continue
    count = 'draft_count_K' if name == 'draft_loss' else 'alpha_count_K'
    of = zip(metrics[total][1:], metrics[count][1:], strict=True)
    if name != 'draft_loss' or np.any(metrics[total]):
      out |= {f'{name}_{k}': mean(*sums) for k, sums in enumerate(of, 2)}
  if 'confidence_loss_sum_K' in metrics:
    of = zip(metrics['confidence_loss_sum_K'][1:], metrics['draft_count_K'][1:], strict=True)
    out |= {f'confidence_loss_{k}': mean(*sums) for k, sums in enumerate(of, 2)}
  if 'alpha_in_a_row_K' in metrics:
    n_queries, *in_a_row = metrics['alpha_in_a_row_K']
    out['mean_acceptance_length_sampled'] = mean(n_queries + sum(in_a_row), n_queries)
  return out


def shown(value: float | None, form: str) -> str:
  """Formats a number; `-` for None."""
  return '-' if value is None else format(value, form)


def table(values: dict[str, float | None]) -> list[str]:
  """Formats held-out results per head as text lines."""
  sampled = 'alpha_2' in values
  lines = ['head    loss  accuracy  acceptance' + sampled * '   alpha']
  n = sum(name.startswith('accuracy_') for name in values)
  rates = {
    int(name.split('_')[1]): rate for name, rate in values.items() if name.startswith('acceptance_')
  }
  strided = len(rates) > n - 1  # several drafts per head
  for k in range(1, n + 1):
    rate = '' if strided or k not in rates else shown(rates[k], '.2%')
    lines.append(
      f'{k:4d}  {shown(values[f"loss_{k}"], ".4f"):>6}'
      f'  {shown(values[f"accuracy_{k}"], ".2%"):>8}  {rate:>10}'
      + (f'  {shown(values[f"alpha_{k}"], ".2%"):>6}' if sampled and k > 1 else '')
    )
  if strided:
    drafts = (f't+{j} {shown(rate, ".2%")}' for j, rate in rates.items())
    lines.append('conditional acceptance rate of drafts: ' + ', '.join(drafts))
  if 'token_order_loss' in values:
    loss = shown(values['token_order_loss'], '.4f')
    lines.append(f'token order loss {loss}')
  if values.get('mean_acceptance_length_sampled'):
    length = shown(values['mean_acceptance_length_sampled'], '.3f')
    lines.append(f'mean acceptance length of sampled drafts {length} tokens')
  return [
    *lines,
    f'bits per byte {shown(values["bits_per_byte"], ".4f")}, mean acceptance'
    f' length {shown(values["mean_acceptance_length"], ".3f")} tokens'
    ' (teacher-forced estimate)',
  ]


def jsonable(values: Mapping[str, float | None]) -> dict[str, float | None]:
  """Returns values with None in place of NaN, infinity and numbers above 1e100 in
  magnitude, which JSON cannot represent."""
  return {k: v if v is not None and abs(v) <= 1e100 else None for k, v in values.items()}
