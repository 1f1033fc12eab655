"""The acceptance suite: prompts, and acceptance rates while decoding."""

import json

import numpy as np
import pytest

from mtp_jax.cli import main
from mtp_jax.config import schema
from mtp_jax.data import store as store_lib
from mtp_jax.decode import decoder
from mtp_jax.evals import acceptance
from mtp_jax.io import paths
from tests.support import runs


def test_acceptance_matches_decoding_of_the_same_prompts(undisturbed, tmp_path, monkeypatch):
  counted, given, out = [], [], tmp_path / 'out.json'
  decode = decoder.Decoder.__call__

  def counting(*args, **kwargs):
    counted.append(decode(*args, **kwargs))
    given.append(kwargs['stop_ids'])
    return counted[-1]

  monkeypatch.setattr(decoder.Decoder, '__call__', counting)
  args = [
    'eval',
    f'{undisturbed}',
    '--eval.tasks=acceptance',
    '--mesh.fsdp=-1',
    '--train.compilation_cache=',
    f'--out={out}',
    '--bench.prompt_len=12',
    '--decode.max_new_tokens=20',
  ]
  assert not main.main([*args, '--eval.limit=5'])
  found = json.loads(out.read_text())['suites']['acceptance']
  (decoded,) = counted
  assert len(decoded.tokens) == 5 and given == [(257,)]
  assert found['tokens_per_forward'] == decoded.tokens_per_forward
  rate = decoded.accepted_J[0] / decoded.proposed_J[0]
  assert found['accepted_2'] == rate
  assert found['accepted_2_low'] <= rate <= found['accepted_2_high']


def test_acceptance_prompts_are_first_pieces_then_later_ones(tmp_path):
  path = runs.make_store(str(tmp_path / 'store'))
  cfg = schema.replace(schema.CommandConfig(), **{'data.store': path, 'bench.prompt_len': 10})
  split = store_lib.open_store(path).split('valid')
  tokens, offsets = split.tokens[0][:], split.offsets[0][:]
  found = acceptance.pieces(cfg, len(offsets) + 2)
  starts = [*offsets, offsets[0] + 10, offsets[1] + 10]
  for piece, start in zip(found, starts, strict=True):
    assert piece.tolist() == tokens[start : start + 10].tolist()
  # After each there is a token to predict.
  longest = int(np.diff([*offsets, tokens.size]).max())
  cfg = schema.replace(cfg, **{'bench.prompt_len': longest - 1})
  assert acceptance.pieces(cfg, 1)
  cfg = schema.replace(cfg, **{'bench.prompt_len': longest})
  with pytest.raises(paths.InputError, match='--bench.prompt_len'):
    acceptance.pieces(cfg, 1)


def test_acceptance_with_too_few_prompts_raises(undisturbed, capsys):
  capsys.readouterr()
  assert (
    main.main(
      [
        'eval',
        f'{undisturbed}',
        '--eval.tasks=acceptance',
        '--mesh.fsdp=-1',
        '--train.compilation_cache=',
        '--bench.prompt_len=150',
        '--eval.limit=4000',
      ]
    )
    == 2
  )
  line = capsys.readouterr().err
  assert line.startswith('mtp: ')
  assert 'held-out pieces of --bench.prompt_len=150 tokens; 4000 are needed' in line
