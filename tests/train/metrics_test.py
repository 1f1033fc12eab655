"""Metrics: scalars, the log line, metrics.jsonl and TensorBoard."""

import errno
import json
import math
import os
import struct
import time

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from mtp_jax.io import paths
from mtp_jax.losses import metrics
from mtp_jax.train import metrics as metrics_lib

NAN, INF = math.nan, math.inf
NONE = None  # a mean over nothing


@pytest.mark.parametrize(
  'accepted_K, rates, length',
  [
    ([40], [], 1),
    ([40, 20], [0.5], 1.5),
    ([40, 20, 5], [0.5, 0.25], 1 + 0.5 + 0.125),
    ([40, 40, 40, 40], [1, 1, 1], 4),
    ([40, 0, 0], [0, NONE], 1),
    ([40, 10, 0, 0], [0.25, 0, NONE], 1.25),
    ([0, 0, 0], [NONE, NONE], NONE),
  ],
)
def test_mean_acceptance_length_from_sums(accepted_K, rates, length):
  found, found_length = metrics.acceptance(np.array(accepted_K, np.float32))
  assert (found, found_length) == (rates, length)


STEP = dict(
  lr=1e-3,
  grad_norm=2.0,
  skipped=0.0,
  tokens_per_s=12_345.6,
  model_flops_per_s=2.5e12,
  time_left_s=3_725.4,
)


def _raw(**changes):
  step = dict(
    total=np.float32(3),
    loss_sum_K=np.array([80, 160], np.float32),
    z_loss_sum_K=np.zeros(2, np.float32),
    correct_K=np.array([20, 10], np.float32),
    accepted_K=np.array([8, 2], np.float32),
    count_K=np.array([40, 40], np.float32),
    bytes=np.float32(20 / math.log(2)),
  )
  return step | changes


def test_scalars_of_an_evaluation():
  assert metrics.scalars(_raw()) == {
    'loss': 3,
    'loss_1': 2,
    'loss_2': 4,
    'accuracy_1': 0.5,
    'accuracy_2': 0.25,
    'acceptance_2': 0.25,
    'mean_acceptance_length': 1.25,
    'bits_per_byte': pytest.approx(4, rel=1e-6),
  }


def test_scalars_of_a_step():
  step = dict(
    lr=np.float32(0.5),
    grad_norm=np.float32(7),
    skipped=np.int32(3),
    consecutive_nonfinite=np.int32(1),
    head_grad_norm_K=np.array([5, 6.0]),
    weight_K=np.array([1, 0.5]),
    z_loss_sum_K=np.array([0, 5]),
  )
  values = metrics.scalars(_raw(**step))
  assert list(values) == [
    'loss',
    'loss_1',
    'loss_2',
    'z_loss_1',
    'z_loss_2',
    'accuracy_1',
    'accuracy_2',
    'head_grad_norm_1',
    'head_grad_norm_2',
    'weight_1',
    'weight_2',
    'acceptance_2',
    'mean_acceptance_length',
    'bits_per_byte',
    'lr',
    'grad_norm',
    'skipped',
    'consecutive_nonfinite',
  ]
  assert {type(v) for v in values.values()} == {float}
  assert (
    values['z_loss_2'],
    values['head_grad_norm_1'],
    values['weight_2'],
    values['skipped'],
  ) == (0.125, 5, 0.5, 3)


def test_bits_per_byte_without_bytes_is_none():
  values = metrics.scalars(_raw(bytes=np.float32(0)))
  assert values['bits_per_byte'] is None


def test_mean_over_nothing_is_none():
  """Head 2 has no target: neither loss 0 nor accuracy 0."""
  raw = _raw(
    count_K=np.array([40, 0], np.float32),
    token_order_loss_sum=np.float32(60),
    loss_sum_K=np.array([80, 0], np.float32),
    correct_K=np.array([20, 0], np.float32),
    accepted_K=np.array([8, 0], np.float32),
  )
  values = metrics.scalars(raw)
  assert (values['loss_1'], values['loss_2'], values['accuracy_2']) == (2, None, None)
  assert (values['loss'], values['token_order_loss']) == (3, 1.5)
  assert metrics.table(values)[2].split() == ['2', '-', '-', '0.00%']
  none = (
    raw
    | dict.fromkeys(('count_K', 'loss_sum_K', 'correct_K', 'accepted_K'), np.zeros(2))
    | dict(total=np.float32(0), bytes=np.float32(0))
  )
  values = metrics.scalars(none)
  assert set(values.values()) == {None}
  line = metrics_lib.line(7, 90, values | STEP)
  assert line.startswith(
    'step 7/90  loss -  head 1 -  bits/byte -  lr 1.00e-03  |grad| 2.000  E[accepted] -  '
  )
  assert metrics.table(values)[1].split() == ['1', '-', '-']
  assert metrics.table(values)[-1].startswith('bits per byte -, mean acceptance')


def test_log_line():
  values = metrics.scalars(_raw()) | STEP
  line = metrics_lib.line(7, 90, values)
  assert line == (
    'step 7/90  loss 3.0000  head 1 2.0000  bits/byte 4.000  lr 1.00e-03'
    '  |grad| 2.000  E[accepted] 1.25  12,346 tokens/s  2.5 TFLOP/s  MFU n/a'
    '  left 1:02:05'
  )
  line = metrics_lib.line(7, 90, values | dict(mfu=0.4321, skipped=2.0))
  assert 'MFU 43.2%' in line and line.endswith('skipped 2')


def test_evaluation_table():
  lines = metrics.table(metrics.scalars(_raw()))
  assert [line.split() for line in lines[:3]] == [
    ['head', 'loss', 'accuracy', 'acceptance'],
    ['1', '2.0000', '50.00%'],
    ['2', '4.0000', '25.00%', '25.00%'],
  ]
  assert '4.0000' in lines[3] and '1.250 tokens' in lines[3]


def _sinks(path, start, *records):
  sinks = metrics_lib.Sinks(str(path), start)
  for kind, step, value in records:
    sinks.write(kind, step, dict(loss=value))
  sinks.close()


def _events(path):
  """Event protos of a TFRecord file: length, its CRC, data, its CRC."""
  data = path.read_bytes()
  while data:
    (length,) = struct.unpack('<Q', data[:8])
    yield event_pb2.Event.FromString(data[12 : 12 + length])
    data = data[16 + length :]


def test_nan_and_infinity_are_written_as_null(tmp_path):
  _sinks(tmp_path, 0, ('train', 1, NAN), ('train', 2, -INF), ('eval', 2, 0.5))
  text = (tmp_path / 'metrics.jsonl').read_text()
  records = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
  assert (
    records
    == metrics_lib.read(str(tmp_path))
    == [
      dict(kind='train', step=1, loss=None),
      dict(kind='train', step=2, loss=None),
      dict(kind='eval', step=2, loss=0.5),
    ]
  )


def test_records_past_the_start_are_truncated(tmp_path):
  _sinks(tmp_path, 0, *(('train', step, step / 2) for step in range(1, 6)))
  with open(tmp_path / 'metrics.jsonl', 'a') as f:
    f.write('{"kind": "train", "step": 6, "lo')
  assert [r['step'] for r in metrics_lib.read(str(tmp_path))] == [1, 2, 3, 4, 5]
  (before,) = (tmp_path / 'tensorboard').iterdir()
  before.rename(tmp_path / 'before')  # its name is that of the second it began
  _sinks(tmp_path, 3, ('train', 4, 9.0))
  found = [(r['step'], r['loss']) for r in metrics_lib.read(str(tmp_path))]
  assert found == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 9.0)]
  (new,) = (tmp_path / 'tensorboard').iterdir()
  events = list(_events(new))
  # To TensorBoard: forget what has a step from 4 on.
  starts = [e.step for e in events if e.session_log.status == 1]
  assert starts == [4]
  values = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
  assert values == [(4, 'train/loss', 9.0)]


def test_records_of_an_empty_workdir(tmp_path):
  assert metrics_lib.read(str(tmp_path)) == []
  assert metrics_lib.read(str(tmp_path / 'none')) == []
  (tmp_path / 'file').write_text('')
  assert metrics_lib.read(str(tmp_path / 'file')) == []


@pytest.mark.parametrize('number', sorted(paths.DISK_ERRORS))
def test_full_disk_raises_instead_of_blocking(tmp_path, monkeypatch, number):
  """200 scalars a step, as 36 heads have: tensorboardX's own thread dies
  of the first error, and the eleventh scalar after it waits for ever."""
  sinks = metrics_lib.Sinks(str(tmp_path), 0)
  full = OSError(number, os.strerror(number))

  def write(data):
    raise full

  monkeypatch.setattr(sinks._board._py_recordio_writer, 'write', write)
  for step in range(1, 4):
    with pytest.raises(OSError, match=os.strerror(number)):
      sinks.write('train', step, {f'loss_{k}': 1.0 for k in range(200)})
  sinks.close()
  assert paths.DISK_ERRORS >= {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


def test_clock_set_back_does_not_block(tmp_path, monkeypatch):
  sinks = metrics_lib.Sinks(str(tmp_path), 0)
  sinks.write('train', 1, dict(loss=1.0))
  now = time.time()
  monkeypatch.setattr(time, 'time', lambda: now - 30 * 86_400)
  sinks.write('train', 2, dict(loss=2.0))
  (file,) = (tmp_path / 'tensorboard').iterdir()
  assert [e.step for e in _events(file) if e.summary.value] == [1, 2]
  sinks.close()
