"""The acceptance suite: prompts, and acceptance rates while decoding."""

import json

import jax
import numpy as np
import pytest

from mtp_jax.cli import main
from mtp_jax.config import schema
from mtp_jax.data import store as store_lib
from mtp_jax.decode import decoder
from mtp_jax.evals import acceptance
from mtp_jax.evals import subject as subject_lib
from mtp_jax.io import paths
from tests.support import decoding, runs, tiny


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


@pytest.mark.parametrize(
  'family, filters',
  [
    ('parallel', dict(decode__top_p=0.9)),
    ('sequential', {}),
    ('linear', dict(heads__markov_rank=4, decode__top_k=6)),
  ],
)
def test_predicted_acceptance_is_that_of_the_decoder(family, filters):
  """On text that it sampled, given the drafts before; 20,000 tokens."""
  c = decoding.cfg(family, 4, decode__temperature=0.8, decode__max_new_tokens=200, **filters)
  m = tiny.mesh(c)
  # Sharper than at the start, so that rates differ between drafts and texts.
  model = jax.tree.map(lambda x: 2.5 * x, tiny.model(c, m))
  decode = decoding.make(c, model)
  prompts = [np.array([row % decoding.VOCAB]) for row in range(100)]
  decoded = decode(prompts)
  subject = subject_lib.Subject('', c, model, m, None, 0, decode)
  found_J = acceptance.predicted(subject, prompts, decoded.tokens, 3)
  measured_J = decoded.accepted_J / decoded.proposed_J
  sigma_J = np.sqrt(measured_J * (1 - measured_J) / decoded.proposed_J)
  assert decoded.n_tokens == 20_000 and np.all(sigma_J < 0.03)
  assert np.all(np.abs(found_J - measured_J) < 3.5 * sigma_J), (found_J, measured_J, sigma_J)
  # Rates of all positions, whether drafts were reached there or not, are others.
  rates = acceptance._rates(subject, prompts, decoded.tokens, 3)
  alpha_BTJ = np.stack([alpha_TJ for alpha_TJ, _ in rates])
  assert np.max(np.abs(alpha_BTJ[:, :190].mean((0, 1)) - found_J)) > 0.01
