"""The Config: JSON, versions, limits, schedules, derived shapes."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from mtp_jax.cli import flags
from mtp_jax.config import draft_vocab, fields, parse, schedule, schema, validate
from tests.support import values

# Every field that may differ when a run is resumed; all others may not.
FREE = """
  data.store data.documents data.valid_fraction data.overwrite data.verify
  data.teacher data.teacher_top_k data.teacher_seq_len
  data.read_threads data.workers data.max_shard_gib data.max_document_mib
  model.attention
  mesh.data mesh.fsdp mesh.tensor
  train.workdir train.steps
  train.log_every train.eval_every train.checkpoint_every train.max_to_keep
  model.max_position_embeddings train.keep_every train.profile_start train.profile_steps
  train.eval_tasks_every train.watchdog_s train.spike_sigma train.compilation_cache
  eval.split eval.stores eval.batches eval.tasks eval.limit
  eval.data eval.num_fewshot eval.samples eval.temperatures eval.pass_at_k
  eval.allow_code_execution eval.sandbox eval.timeout_s
""".split()


def _cfg(**changes):
  changes = {k.replace('__', '.'): v for k, v in changes.items()}
  return schema.replace(schema.CommandConfig(), **changes)


def test_json_round_trip():
  cfg = schema.replace(schema.CommandConfig(), **values.OTHER)
  for name, value in values.OTHER.items():
    assert schema.get(cfg, name) == value
  of_a_run = parse.from_json(parse.to_json(cfg))
  assert of_a_run == schema.run_config(cfg) and type(of_a_run) is schema.Config
  assert schema.command_config(of_a_run) == schema.replace(cfg, **{'plan.sweep': ()})
  changed = [n for n in schema.fields() if schema.get(_cfg(), n) != schema.get(cfg, n)]
  assert sorted(changed) == sorted(values.OTHER)


def test_json_without_new_fields_uses_defaults():
  sections = json.loads(parse.to_json(_cfg(heads__n=2)))
  del sections['eval'], sections['train']['keep_every']
  assert parse.from_json(json.dumps(sections)) == schema.run_config(_cfg(heads__n=2))


def test_json_with_options_of_commands_is_read_without_them():
  sections = json.loads(parse.to_json(_cfg(heads__n=2)))
  saved_before = sections | {'decode': {'top_k': 3}, 'plan': {'sweep': ['a']}, 'import_': {}}
  assert parse.from_json(json.dumps(saved_before)) == schema.run_config(_cfg(heads__n=2))


def test_version_1_rate_of_0_is_a_frozen_group():
  sections = json.loads(parse.to_json(_cfg()))
  sections |= dict(version=1, optim=dict(trunk_lr=0))
  cfg = parse.from_json(json.dumps(sections))
  assert (cfg.optim.trunk_lr_mult, cfg.train.freeze) == (1.0, 'trunk')


@pytest.mark.parametrize(
  'family, expected',
  [('sequential', 'pre_norm'), ('recursive', 'pre_norm'), ('causal', 'post_norm')],
)
def test_version_2_modules_read_states_before_the_norm(family, expected, tmp_path):
  """So do those of a run.flags of before; other families do not use the state."""
  cfg = _cfg(heads__family=family)
  sections = json.loads(parse.to_json(cfg))
  del sections['heads']['trunk_state']
  assert parse.from_json(json.dumps(sections | dict(version=2))).heads.trunk_state == expected
  path = tmp_path / 'run.flags'
  path.write_text(parse.to_flag_file(cfg))
  assert flags.parse([f'--flagfile={path}']).config().heads.trunk_state == 'post_norm'
  lines = [line for line in path.read_text().splitlines() if 'trunk_state' not in line]
  path.write_text('\n'.join(lines))
  assert flags.parse([f'--flagfile={path}']).config().heads.trunk_state == expected


def test_json_of_another_version_is_refused():
  sections = json.loads(parse.to_json(_cfg()))
  for more, expected in (
    (dict(model=dict(d_modle=3)), 'model.d_modle: no such field'),
    (dict(modle=dict(n=3)), 'modle.n: no such field'),
    *(
      (dict(version=version), f'config version {version}, this program reads 3')
      for version in (parse.VERSION + 1, None, 'x', [1])
    ),
  ):
    with pytest.raises(parse.OtherVersion) as error:
      parse.from_json(json.dumps(sections | more))
    assert str(error.value).startswith(expected)


@pytest.mark.parametrize(
  'text, expected',
  [
    ('', 'is not JSON: '),
    ('[' * 10**5, 'is not JSON: nested too deep'),
    (b'\xff', 'is not JSON: it is not UTF-8'),
    ('[]', 'it=[]: must be an object'),
    ('{"version": 1, "model": []}', 'model=[]: must be an object'),
    ('{"version": 1, "model": {"d_model": null}}', 'model.d_model=null: must be an integer'),
    ('{"version": 1, "model": {"d_model": true}}', 'model.d_model=true: must be an integer'),
    ('{"version": 1, "model": {"d_model": 1e2}}', 'model.d_model=100.0: must be an integer'),
    (
      f'{{"version": 1, "model": {{"d_model": {2**63}}}}}',
      'model.d_model=9223372036854775808: must be an integer',
    ),
    ('{"version": 1, "optim": {"lr": "fast"}}', 'optim.lr="fast": must be a number, at most 1e100'),
    ('{"version": 1, "optim": {"lr": NaN}}', 'optim.lr=null: must be a number, at most 1e100'),
    (
      '{"version": 1, "optim": {"lr": 1e999}}',
      'optim.lr=Infinity: must be a number, at most 1e100',
    ),
    ('{"version": 1, "data": {"store": "\\ud800"}}', 'data.store="\\ud800": must be text'),
    ('{"version": 1, "data": {"verify": 0}}', 'data.verify=0: must be true or false'),
  ],
)
def test_json_of_a_wrong_type_names_the_field(text, expected):
  with pytest.raises(ValueError) as error:
    parse.from_json(text)
  assert str(error.value).startswith(expected) and '\n' not in str(error.value)
  assert not isinstance(error.value, parse.OtherVersion)


def test_every_number_has_limits():
  """Limits are beyond any use, and below overflow."""
  for name, field in schema.fields().items():
    if field.type in (int, float):
      limits = field.metadata
      assert {'min', 'above'} & limits.keys(), name
      assert {'max', 'below'} & limits.keys(), name
      assert limits.get('max', 1) < (2**32 if field.type is int else 1e31), name


@pytest.mark.parametrize(
  'given, blamed, expected',
  [
    (dict(mesh__tensor=-1), 'mesh.tensor', '--mesh.fsdp is -1'),
    (dict(mesh__data=-1), 'mesh.data', '--mesh.fsdp is -1'),
    (dict(mesh__data=-1, mesh__tensor=-1, mesh__fsdp=1), 'mesh.data', '--mesh.tensor is -1'),
    (dict(mesh__fsdp=0), 'mesh.fsdp', 'at least 1, or -1'),
    (dict(mesh__fsdp=-2), 'mesh.fsdp', 'must be at least -1'),
    (dict(optim__eps=1e300), 'optim.eps', 'must be at most 1'),
    (dict(train__watchdog_s=1e300), 'train.watchdog_s', 'must be at most'),
    (dict(data__workers=10**20), 'data.workers', 'must be at most 4096'),
    (dict(data__seq_len=10**23), 'data.seq_len', 'must be at most'),
    (dict(inspect__step=10**23), 'inspect.step', 'must be at most'),
    (dict(loss__weights='0:0'), 'loss.weights', 'no head that is active'),
    (dict(loss__weights='0:0;2000:1'), 'loss.weights', 'no head that is'),
    (dict(loss__weights='0:0,1', loss__curriculum='0:1'), 'loss.weights', 'no head that is active'),
    (dict(loss__weights=f'0:1;{10**23}:0'), 'loss.weights', 'steps that'),
    (dict(loss__weights='0:1e7'), 'loss.weights', 'at most 1e6'),
    (dict(decode__tree=','.join(['9' * 4000] * 2)), 'decode.tree', 'at most'),
    (dict(bench__batches=f'1,{10**23}'), 'bench.batches', 'from 1 to'),
    (dict(data__store='a:' + '9' * 5000), 'data.store', 'weights above 0'),
    (dict(data__store='a:1,b:1' + '0' * 99), 'data.store', 'weights above 0'),
    (dict(data__store='a\0b'), 'data.store', 'NUL'),
    (dict(plan__sweep=('a\0',)), 'plan.sweep', 'NUL'),
    (dict(train__workdir='run\udcff'), 'train.workdir', 'must be UTF-8'),
    (dict(plan__sweep=('\udcff',)), 'plan.sweep', 'must be UTF-8'),
  ],
)
def test_error_names_the_given_flag(given, blamed, expected):
  with pytest.raises(fields.ConfigError) as error:
    validate.validate(_cfg(**given))
  assert error.value.args[0] == blamed and expected in str(error.value)
  assert len(str(error.value)) < 1500


@pytest.mark.parametrize(
  'given',
  [
    dict(loss__weights='0:0;5:1'),
    dict(loss__weights='0:0,1'),
    dict(loss__weights='0:0,1', loss__curriculum='0:1;9:2'),
    dict(loss__weights='0:0', loss__token_order_weight=0.5),
  ],
)
def test_some_active_head_needs_a_weight(given):
  validate.validate(_cfg(**given))


def test_config_error_is_one_bounded_line():
  error = fields.ConfigError('out', 'a\nb\x00\udcff\u2028', 'x\ny')
  assert str(error) == r'--out=a\nb\x00\udcff\u2028: x\ny'
  long = str(fields.ConfigError('prompt', 'y' * 3_000_000, 'too long'))
  assert len(long) < 300 and '(3,000,000 characters)' in long


def test_defaults_are_valid():
  validate.validate(schema.CommandConfig())


def test_every_field_has_help_and_a_type_that_a_flag_can_have():
  for name, field in schema.fields().items():
    assert field.type in (int, float, str, bool, tuple), name
    assert isinstance(field.default, field.type), name
    assert field.metadata['help'], name


def test_fields_that_may_change_on_resume():
  def other(field):
    if field.type is bool:
      return not field.default
    more = {int: 1, float: 1, str: 'x', tuple: ('x',)}
    return field.default + more[field.type]

  free = []
  for name, field in schema.fields(schema.Config).items():
    new = schema.replace(schema.CommandConfig(), **{name: other(field)})
    found = schema.changed(schema.CommandConfig(), new)
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
  assert schedule.parse_steps(text) == phases


@pytest.mark.parametrize(
  'text',
  [
    '',
    '1',
    '1:1',
    '0:',
    '0:a',
    '0:1;',
    '0:1;5',
    '0:1;5:1;5:2',
    '0:1;9:1;5:1',
    '0.5:1',
    '0:1;-1:1',
    '0:1:2',
  ],
)
def test_parse_steps_refuses(text):
  with pytest.raises(ValueError):
    schedule.parse_steps(text)


@pytest.mark.parametrize(
  'text, weights',
  [
    ('0:1', {0: (1, 1, 1, 1)}),
    ('0:1,.3', {9: (1, 0.3, 0.3, 0.3)}),
    ('0:1;7:4,3,2,1', {6: (1, 1, 1, 1), 7: (4, 3, 2, 1)}),
    ('0:0~4:4', {1: (1, 1, 1, 1), 9: (4, 4, 4, 4)}),
    ('0:beta=1', {0: (0.25,) * 4}),
  ],
)
def test_head_weights(text, weights):
  cfg = _cfg(heads__n=4, loss__weights=text)
  assert {step: schedule.head_weights(cfg, step) for step in weights} == weights


@pytest.mark.parametrize(
  'text', ['0:1~', '0:1~0:2', '~0:1', '0:1~5', '0:beta=0', '0:beta=2', '0:beta=', '0:1,beta=.5']
)
def test_head_weights_refuses(text):
  with pytest.raises(fields.ConfigError, match='loss.weights'):
    validate.validate(_cfg(heads__n=4, loss__weights=text))


@pytest.mark.parametrize(
  'flag, changes',
  [
    ('heads.isolated', dict(heads__isolated=True, heads__family='anticausal')),
    ('loss.head_loss', dict(loss__head_loss='e2e_tv', heads__stride=2)),
    ('loss.head_ce_weight', dict(loss__head_ce_weight=0.5)),
    ('loss.lk_eta', dict(loss__lk_eta=1.0, loss__head_loss='lk')),
    ('loss.curriculum', dict(loss__curriculum='0:1~5:2')),
    ('loss.head_loss', dict(loss__head_loss='nll')),
    ('heads.markov_rank', dict(heads__markov_rank=4, heads__family='sequential')),
    ('heads.markov_rank', dict(heads__markov_rank=4, heads__stride=2)),
    ('heads.draft_vocab', dict(heads__draft_vocab='9', heads__unembedding='replicated')),
    ('heads.draft_vocab', dict(heads__draft_vocab='0')),
    ('heads.draft_vocab', dict(heads__draft_vocab='33', model__vocab_size=32)),
    ('heads.draft_vocab', dict(heads__draft_vocab='many')),
    ('heads.draft_vocab', dict(heads__draft_vocab='9' * 5000)),
    ('heads.confidence', dict(heads__confidence=True, loss__head_loss='kl')),
    ('heads.draft_vocab', dict(heads__draft_vocab='9:AAAA')),
    ('heads.draft_vocab', dict(heads__draft_vocab='9:eJw', model__vocab_size=32)),
  ],
)
def test_losses_refused(flag, changes):
  with pytest.raises(fields.ConfigError, match=flag):
    validate.validate(_cfg(heads__n=2, **changes))


def test_draft_vocabulary_is_recorded_in_the_flag():
  ids = [3, 4, 17, 40]
  value = draft_vocab.recorded(np.array(ids), 41)
  assert value.startswith('4:')
  assert draft_vocab.parse(value, 41).tolist() == ids
  assert draft_vocab.parse('4', 41).tolist() == [0, 1, 2, 3]  # of a plan, before a store
  assert draft_vocab.parse('', 41) is None
  with pytest.raises(fields.ConfigError, match='not 5 tokens'):
    draft_vocab.parse(value.replace('4:', '5:'), 41)
  with pytest.raises(fields.ConfigError, match='not 4 tokens'):
    draft_vocab.parse(value, 64)  # of another vocabulary


def test_active_heads():
  cfg = _cfg(heads__n=4, loss__curriculum='0:1;3:2;10:4')
  steps = (0, 2, 3, 9, 10, 10**6)
  assert [schedule.active_heads(cfg, s) for s in steps] == [1, 1, 2, 2, 4, 4]
  assert schedule.active_heads(_cfg(heads__n=4), 0) == 4


def test_derived_shapes():
  m = _cfg(model__d_model=96, model__n_attn_heads=4).model
  assert (m.head_width, m.kv_heads, m.ff_width) == (24, 4, 256)
  m = dataclasses.replace(m, d_model=288, n_kv_heads=2)
  assert (m.head_width, m.kv_heads, m.ff_width) == (72, 2, 768)
  assert dataclasses.replace(m, d_model=4096).ff_width == 11_008  # Llama 7B
  assert dataclasses.replace(m, d_ff=100).ff_width == 100


def test_config_is_frozen_and_hashable():
  assert hash(_cfg(heads__n=2)) == hash(_cfg(heads__n=2))
  with pytest.raises(dataclasses.FrozenInstanceError):
    schema.CommandConfig().model.d_model = 3


def test_every_option_is_in_equalities_md():
  ledger = (pathlib.Path(__file__).parents[1] / 'equalities.md').read_text()
  for name, field in schema.fields().items():
    choices = field.metadata.get('choices', ())
    for word in (name, *choices):
      assert f'`{word}`' in ledger, f'--{name}: {word} equals what?'
