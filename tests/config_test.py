"""The Config: its JSON, its limits, and what its small languages mean."""

import dataclasses
import json
import pathlib

import pytest

from mtp_jax import config, validate
from tests import runs

OTHER = {
  'model.d_model': 96,
  'model.rope_theta': 500_000.0,
  'model.norm_eps': 1e-6,
  'heads.n': 3,
  'loss.weights': '0:1,.3;50:1,.1',
  'data.verify': False,
  'data.documents': 'text:/tmp/a b.txt,python:json',
  'optim.lr': 0.1 + 0.2,  # 0.30000000000000004
  'train.seed': 2**32 - 1,
  'train.workdir': '/runs/ü',
  'plan.sweep': ('heads.n=1,2', 'loss.schedule=remat,eager'),
}

# Every field that may differ when a run goes on; all others may not.
FREE = """
  data.store data.documents data.valid_fraction data.overwrite data.verify
  data.read_threads data.workers data.max_shard_gib data.max_document_mib
  model.attention
  mesh.data mesh.fsdp mesh.tensor
  processes.coordinator processes.count processes.index processes.timeout_s
  train.workdir train.steps
  train.log_every train.eval_every train.checkpoint_every train.keep_last
  model.context train.keep_every train.profile_start train.profile_steps
  train.suite_every train.watchdog_s train.spike_sigma train.compilation_cache
  eval.checkpoint eval.split eval.stores eval.batches eval.suite eval.items
  eval.data eval.shots eval.samples eval.temperatures eval.k
  eval.allow_code_execution eval.sandbox eval.timeout_s
  inspect.step inspect.rows inspect.tokens bench.what bench.heads
  bench.schedules bench.chunks bench.documents bench.rounds bench.calls
  bench.drafts bench.batches bench.pieces bench.prompt
  decode.checkpoint decode.draft decode.tree decode.max_new decode.temperature
  decode.top_k decode.top_p decode.min_p decode.seed decode.stop_ids
  decode.prompts decode.batch_size decode.cache decode.cache_dtype
  decode.prefill decode.segment decode.compare
  export.checkpoint export.out export.format export.dtype export.shard_gib
  import.path import.format import.tokenizer
  plan.topology plan.slices plan.sweep plan.search_mesh plan.search_s
""".split()


def _cfg(**changes):
  changes = {k.replace('__', '.'): v for k, v in changes.items()}
  return config.replace(config.Config(), **changes)


def test_json_round_trip():
  cfg = config.replace(config.Config(), **OTHER)
  assert config.from_json(config.to_json(cfg)) == cfg
  for name, value in OTHER.items():
    assert config.get(cfg, name) == value
  changed = [n for n in config.fields() if config.get(_cfg(), n) !=
             config.get(cfg, n)]  # fmt: skip
  assert sorted(changed) == sorted(OTHER)


def test_json_of_an_older_program_keeps_new_defaults():
  sections = json.loads(config.to_json(_cfg(heads__n=2)))
  del sections['inspect'], sections['train']['keep_every']
  assert config.from_json(json.dumps(sections)) == _cfg(heads__n=2)


def test_a_rate_of_0_of_an_older_program_is_a_frozen_group():
  sections = json.loads(config.to_json(_cfg()))
  sections['optim']['trunk_lr'] = 0
  cfg = config.from_json(json.dumps(sections))
  assert (cfg.optim.trunk_lr, cfg.train.freeze) == (1.0, 'trunk')


def test_json_of_another_program_is_refused():
  sections = json.loads(config.to_json(_cfg()))
  with pytest.raises(TypeError, match='d_modle'):
    config.from_json(
      json.dumps(sections | dict(model=dict(d_modle=3)))
    )  # fmt: skip
  for version in (config.VERSION + 1, None):
    with pytest.raises(ValueError, match=f'config version {version}'):
      config.from_json(json.dumps(sections | dict(version=version)))


def test_the_defaults_are_valid():
  validate.validate(config.Config())


def test_every_field_has_help_and_a_type_that_a_flag_can_have():
  for name, field in config.fields().items():
    assert field.type in (int, float, str, bool, tuple), name
    assert isinstance(field.default, field.type), name
    assert field.metadata['help'], name


def test_what_may_change_when_a_run_goes_on():
  def other(field):
    if field.type is bool:
      return not field.default
    more = {int: 1, float: 1, str: 'x', tuple: ('x',)}
    return field.default + more[field.type]

  free = []
  for name, field in config.fields().items():
    new = config.replace(config.Config(), **{name: other(field)})
    found = config.changed(config.Config(), new)
    if not found:
      free.append(name)
      continue
    assert found == [(name, field.default, other(field))]
  assert sorted(free) == sorted(FREE)


@pytest.mark.parametrize(
  'text, phases',
  [
    ('0:1', ((0, (1.0,)),)),
    ('0:1,.3;50000:1,.1', ((0, (1.0, 0.3)), (50_000, (1.0, 0.1)))),
    ('0:2;10:3;20:1', ((0, (2.0,)), (10, (3.0,)), (20, (1.0,)))),
  ],
)
def test_parse_steps(text, phases):
  assert config.parse_steps(text) == phases


@pytest.mark.parametrize(
  'text', ['', '1', '1:1', '0:', '0:a', '0:1;', '0:1;5', '0:1;5:1;5:2',
           '0:1;9:1;5:1', '0.5:1', '0:1;-1:1', '0:1:2'],
)  # fmt: skip
def test_parse_steps_refuses(text):
  with pytest.raises(ValueError):
    config.parse_steps(text)


@pytest.mark.parametrize(
  'text, weights',
  [
    ('0:1', ((0, (1, 1, 1, 1)),)),
    ('0:1,.3', ((0, (1, 0.3, 0.3, 0.3)),)),
    ('0:1;7:4,3,2,1', ((0, (1, 1, 1, 1)), (7, (4, 3, 2, 1)))),
  ],
)
def test_head_weights(text, weights):
  assert config.head_weights(_cfg(heads__n=4, loss__weights=text)) == weights


def test_active_heads():
  cfg = _cfg(heads__n=4, loss__curriculum='0:1;3:2;10:4')
  steps = (0, 2, 3, 9, 10, 10**6)
  assert [config.active_heads(cfg, s) for s in steps] == [1, 1, 2, 2, 4, 4]
  assert config.active_heads(_cfg(heads__n=4), 0) == 4


def test_derived_shapes():
  m = _cfg(model__d_model=96, model__n_attn_heads=4).model
  assert (m.head_width, m.kv_heads, m.ff_width) == (24, 4, 256)
  m = dataclasses.replace(m, d_model=288, n_kv_heads=2)
  assert (m.head_width, m.kv_heads, m.ff_width) == (72, 2, 768)
  assert dataclasses.replace(m, d_model=4096).ff_width == 11_008  # Llama 7B
  assert dataclasses.replace(m, d_ff=100).ff_width == 100


def test_a_config_is_frozen_and_hashable():
  assert hash(_cfg(heads__n=2)) == hash(_cfg(heads__n=2))
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.Config().model.d_model = 3


def test_every_option_is_in_the_ledger_of_equalities():
  text = pathlib.Path(runs.ROOT, 'docs/STATUS.md').read_text()
  ledger = text.split('### Every option and what it equals')[1]
  for name, field in config.fields().items():
    choices = field.metadata.get('choices', ())
    for word in (name, *choices):
      assert f'`{word}`' in ledger, f'--{name}: {word} equals what?'
