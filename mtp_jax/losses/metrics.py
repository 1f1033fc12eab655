"""TODO of mtp_jax.train.metrics."""

import math

import numpy as np


def mean(total, count) -> float | None:
  """None where there is nothing to average: that is null in JSON and `-` on a
  line, and no 0."""
  return float(total / count) if count else None


def acceptance(accepted_K) -> tuple[list[float | None], float | None]:
  """`targets.acceptance` sums -> (rate of drafts 2, 3, …, expected length).

  A rate is conditional on the drafts before it; the length is the head-1 token
  plus the drafts accepted in a row, in tokens per forward pass. None where
  nothing was proposed.
  """
  rates, alive = [], 1.0
  length = 1.0
  for before, after in zip(accepted_K[:-1], accepted_K[1:], strict=True):
    rates.append(mean(after, before))
    alive *= rates[-1] or 0.0
    length += alive
  return rates, length if accepted_K[0] else None


def scalars(metrics: dict) -> dict[str, float | None]:
  """A step's metrics, on the host, as flat names in reading order: sums over
  their counts. Means of nothing are None."""
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
    out['order_loss'] = mean(metrics['token_order_loss_sum'], count_K[0])
  rates, length = acceptance(metrics['accepted_K'])
  out |= {f'acceptance_{k}': rate for k, rate in enumerate(rates, 2)}
  out['accepted_length'] = length
  nats = metrics['loss_sum_K'][0] - metrics['z_loss_sum_K'][0]
  out['bits_per_byte'] = mean(nats / math.log(2), metrics['bytes'])
  for name in ('lr', 'grad_norm', 'skipped', 'skipped_in_a_row'):
    if name in metrics:
      out[name] = float(metrics[name])
  return out


def shown(value: float | None, form: str) -> str:
  """A number in a format, `-` for one that is not there."""
  return '-' if value is None else format(value, form)


def table(values: dict[str, float | None]) -> list[str]:
  """Held-out results by head, as lines."""
  lines = ['head    loss  accuracy  acceptance']
  n = sum(name.startswith('accuracy_') for name in values)
  rates = {
    int(name.split('_')[1]): rate for name, rate in values.items() if name.startswith('acceptance_')
  }
  leaps = len(rates) > n - 1  # several drafts a head
  for k in range(1, n + 1):
    rate = '' if leaps or k not in rates else shown(rates[k], '.2%')
    lines.append(
      f'{k:4d}  {shown(values[f"loss_{k}"], ".4f"):>6}'
      f'  {shown(values[f"accuracy_{k}"], ".2%"):>8}  {rate:>10}'
    )
  if leaps:
    drafts = (f't+{j} {shown(rate, ".2%")}' for j, rate in rates.items())
    lines.append('draft accepted, given those before: ' + ', '.join(drafts))
  if 'order_loss' in values:
    loss = shown(values['order_loss'], '.4f')
    lines.append(f'order of the tokens to come {loss}')
  return [
    *lines,
    f'bits per byte {shown(values["bits_per_byte"], ".4f")}, expected accepted'
    f' length {shown(values["accepted_length"], ".3f")} tokens (teacher-forced'
    ' estimate)',
  ]


def jsonable(values: dict[str, float | None]) -> dict[str, float | None]:
  """NaN, infinities and what is as good as one as None, i.e. null: JSON has no
  other word for them."""
  return {k: v if v is not None and abs(v) <= 1e100 else None for k, v in values.items()}
