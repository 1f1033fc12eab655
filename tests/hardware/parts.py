"""The parts of the acceptance, in the order of their priority. A later part is a line here."""

import functools

from tests.hardware import (
  add_heads,
  against_cpu,
  cross_entropy,
  decoding,
  kernels,
  machine,
  session,
  step,
)


def _step(**options):
  return functools.partial(step.run, options=step.Options(**options))


PARTS = (
  session.Part(
    'machine', machine.run, 0.3, 0.0, 'versions, device, what a matrix product and a sum reach'
  ),
  session.Part(
    'kernels', kernels.run, 0.8, 0.2, 'attention kernels against the reference: value, gradients'
  ),
  session.Part(
    'cpu', against_cpu.run, 0.9, 0.3, "a training step's loss and gradients against the CPU"
  ),
  session.Part('step', _step(), 2.8, 1.0, 'MFU, memory and time of the step at 1.3B, n = 1, 2, 4'),
  session.Part(
    'cross_entropy',
    cross_entropy.run,
    0.6,
    0.2,
    'linear cross-entropy at 32768 x 2560 x 128256: time, temporaries, value, gradients',
  ),
  session.Part(
    'decoding',
    decoding.run,
    8.0,
    1.0,
    'decoding, random and trained model, W = 1, 2, 4, 8, batch 1, 8, 42',
  ),
  session.Part(
    'remat',
    _step(heads=(1, 4), backward='remat', has_bars=False),
    2.0,
    1.0,
    'the step with --loss.backward=remat',
  ),
  session.Part(
    'packed',
    _step(heads=(1, 4), documents=4, has_bars=False),
    2.0,
    1.0,
    'the step with four documents per row',
  ),
  session.Part(
    'step_0.3b', _step(heads=(1, 4), size='0.3b'), 1.5, 0.7, 'the step at 0.3B, n = 1, 4'
  ),
  session.Part(
    'add_heads',
    add_heads.run,
    5.0,
    1.0,
    'heads added to a frozen trunk at 0.3B: time, tokens per forward pass by loss',
  ),
)
