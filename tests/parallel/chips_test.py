"""Chip peaks, looked up by jax's device_kind."""

import pytest

from mtp_jax.parallel import chips


@pytest.mark.parametrize(
  'kind, peak',
  [
    ('TPU v4', 275e12),
    ('TPU v5 lite', 197e12),
    ('TPU v5', 459e12),
    ('TPU v5p', 459e12),
    ('TPU v6 lite', 918e12),
    ('TPU7x', 1153.5e12),
    ('NVIDIA A100-SXM4-80GB', 312e12),
    ('NVIDIA H100 80GB HBM3', 989e12),
    ('NVIDIA H100 PCIe', 756e12),
    ('NVIDIA H100 NVL', 835e12),
    ('NVIDIA H200', 989e12),
    ('NVIDIA B200', 2250e12),
  ],
)
def test_chip_peaks(kind, peak):
  assert chips.chip(kind).flops_per_s == peak


@pytest.mark.parametrize('kind', ['cpu', 'NVIDIA GeForce RTX 4090', 'TPU v2'])
def test_unknown_device_has_no_peaks(kind):
  assert chips.chip(kind) is None


@pytest.mark.parametrize('kind', chips.CHIPS)
def test_chip_peaks_are_per_device(kind):
  """A wrong power of ten, or GB for bytes, is outside these ranges."""
  chip = chips.CHIPS[kind]
  assert 1e14 < chip.flops_per_s < 1e16
  assert 1e10 < chip.hbm_bytes < 1e12
  assert 5e11 < chip.hbm_bytes_per_s < 1e13
  assert 2e10 < chip.link_bytes_per_s < 1e12  # the least: PCIe 4
  assert 1e9 < chip.network_bytes_per_s < chip.link_bytes_per_s


def test_longest_device_kind_prefix_wins():
  large, small = map(chips.chip, ('NVIDIA A100-SXM4-80GB', 'NVIDIA A100-SXM4-40GB'))
  assert small.hbm_bytes < 40 * 2**30 < large.hbm_bytes
