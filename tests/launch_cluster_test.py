"""Launch scripts of clusters: their commands, whether flags arrive, whether files
match the schemas, and that processes initialize jax.distributed.

No cluster is contacted. Programs that would contact one are replaced by stubs in a
folder that is first on PATH, which record their arguments.
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time

import jsonschema
import pytest
import yaml

from mtp_jax.train import loop
from tests.support import runs

ROOT = pathlib.Path(runs.ROOT)
LAUNCH = ROOT / 'launch'
LIMIT_S = 240.0

FLAGFILE = 'experiments/smoke.flags'
WHERE = ['--data.store=gs://b/store', '--train.workdir=gs://b/run']
# Flags that every shell on their way might change.
HARD = ['--a=b c', "--b=it's", '--c="$HOME" `id` $(id) $$ \\ * {x} ; & # ~', '']
REQUIRED = [FLAGFILE, *WHERE, *HARD]
TRAIN = ['train', f'--flagfile={FLAGFILE}', '--distributed.coordinator_address=auto', *WHERE, *HARD]
PLAIN = f'train --flagfile={FLAGFILE} --distributed.coordinator_address=auto'

AT = ['--name=run', '--zone=z1', '--project=p1']
TPU = 'gcloud compute tpus queued-resources'
XPK = [*AT, '--cluster=c1', '--type=v5litepod-16', '--image=reg/i:1']
JOBSET = [
  '--name=run',
  '--context=c1',
  '--image=reg/i:1',
  '--topology=4x4',
  '--accelerator=tpu-v5-lite-podslice',
]


@pytest.fixture
def log(tmp_path):
  return tmp_path / 'calls.jsonl'


@pytest.fixture
def stand_in(tmp_path, log):
  """stand_in(NAMES, code) -> PATH on which these are Python programs."""
  folder = tmp_path / 'bin'
  folder.mkdir()

  def make(names, code=''):
    for name in names.split():
      program = folder / name
      program.write_text(
        f'#!{sys.executable} -IS\n'
        'import json, os, sys\n'
        f'call = [{name!r}, *sys.argv[1:]]\n'
        f'if {name!r} == "kubectl": call.append(sys.stdin.read())\n'
        f'with open({str(log)!r}, "a") as f:\n'
        '  f.write(json.dumps(call) + "\\n")\n'
        f'{code}\n'
      )
      program.chmod(0o755)
    return f'{folder}:/usr/bin:/bin'

  return make


@pytest.fixture
def path(stand_in):
  return stand_in('gcloud xpk kubectl srun scontrol git mkdir mtp python sky')


def _calls(log) -> list[list[str]]:
  if not log.exists():
    return []
  return [json.loads(line) for line in log.read_text().splitlines()]


def _run(command, path, cwd=ROOT, **variables):
  return subprocess.run(
    command,
    cwd=cwd,
    text=True,
    capture_output=True,
    timeout=60,
    env=dict(PATH=path, HOME='/nowhere', **variables),
  )


def _stdout_lines(script, *args, path, **kwargs) -> list[str]:
  """Returns the stdout lines of a script."""
  done = _run(['bash', f'launch/{script}', *args], path, **kwargs)
  assert (done.returncode, done.stderr) == (0, ''), done.stderr
  return done.stdout.splitlines()


# The scripts as such.


@pytest.mark.parametrize(
  'script',
  [p for p in sorted(LAUNCH.iterdir()) if p.suffix in ('.sh', '.sbatch')],
  ids=lambda p: p.name,
)
def test_shellcheck(script):
  # A file that is made later; what is expanded elsewhere; ASCII is meant.
  off = 'SC1091,SC2016,SC2018'
  if script.name == 'venv.sh':
    off += ',SC2154'  # $python is the caller's
  done = subprocess.run(
    [
      f'{sysconfig.get_path("scripts")}/shellcheck',
      '--shell=bash',
      '--external-sources',
      '--source-path=SCRIPTDIR',
      f'--exclude={off}',
      f'launch/{script.name}',
    ],
    cwd=ROOT,
    text=True,
    capture_output=True,
  )
  assert (done.returncode, done.stdout + done.stderr) == (0, '')


# Commands.

SAYS = {
  'create': (
    ['tpu_vm.sh', 'create', *AT, '--type=v5litepod-16', '--runtime=r1'],
    [
      f'{TPU} create run --accelerator-type=v5litepod-16 --runtime-version=r1'
      ' --node-id=run --zone=z1 --project=p1'
    ],
  ),
  'create-slices': (
    ['tpu_vm.sh', 'create', *AT, '--type=v6e-256', '--runtime=r1'] + ['--slices=2', '--spot'],
    [
      f'{TPU} create run --accelerator-type=v6e-256 --runtime-version=r1'
      ' --node-count=2 --node-prefix=run --spot --zone=z1 --project=p1'
    ],
  ),
  'status': (['tpu_vm.sh', 'status', *AT], [f'{TPU} describe run --zone=z1 --project=p1']),
  'setup': (
    ['tpu_vm.sh', 'setup', *AT],
    [
      'mkdir -p build',
      'git archive --prefix=mtp_jax/ --output=build/mtp_jax.tar.gz HEAD',
      f'{TPU} scp build/mtp_jax.tar.gz run: --node=all --worker=all --zone=z1 --project=p1',
      f"{TPU} ssh run --node=all --worker=all '--command=set -e;"
      ' tar xzf mtp_jax.tar.gz; cd mtp_jax;'
      ' curl -LsSf https://astral.sh/uv/install.sh | sh;'
      ' ~/.local/bin/uv python install 3.12;'
      ' PYTHON=$(~/.local/bin/uv python find --managed-python 3.12);'
      " source launch/venv.sh tpu,gcs' --zone=z1 --project=p1",
    ],
  ),
  'run': (
    ['tpu_vm.sh', 'run', *AT, FLAGFILE, *WHERE],
    [
      f"{TPU} ssh run --node=all --worker=all '--command=cd mtp_jax &&"
      ' source .venv/bin/activate && source launch/xla_flags.sh tpu &&'
      f' {{ nohup mtp {PLAIN} {" ".join(WHERE)} >mtp.log 2>&1 </dev/null &'
      " echo $! >mtp.pid; }' --zone=z1 --project=p1"
    ],
  ),
  'logs': (
    ['tpu_vm.sh', 'logs', *AT, '--worker=3'],
    [
      f'{TPU} ssh run --node=0 --worker=3'
      " '--command=tail -n 100 -f mtp_jax/mtp.log' --zone=z1 --project=p1"
    ],
  ),
  'stop': (
    ['tpu_vm.sh', 'stop', *AT],
    [
      f'{TPU} ssh run --node=all --worker=all'
      ' \'--command=kill -TERM "$(cat mtp_jax/mtp.pid)"\''
      ' --zone=z1 --project=p1'
    ],
  ),
  'delete': (['tpu_vm.sh', 'delete', *AT], [f'{TPU} delete run --force --zone=z1 --project=p1']),
  'xpk': (
    ['xpk.sh', *XPK, '--slices=2', '--spot', FLAGFILE, *WHERE],
    [
      'xpk workload create --workload=run --cluster=c1 --project=p1 --zone=z1'
      ' --tpu-type=v5litepod-16 --num-slices=2 --docker-image=reg/i:1 --spot'
      ' --max-restarts=100 --restart-on-exit-codes=75'
      ' --termination-grace-period-seconds=300'
      " '--command=source launch/xla_flags.sh tpu && exec mtp"
      f" {PLAIN} {' '.join(WHERE)}'"
    ],
  ),
  'slurm': (
    ['slurm.sbatch', FLAGFILE, *WHERE],
    [
      f'srun --export=ALL --gpu-bind=none --kill-on-bad-exit=0 mtp {PLAIN} {" ".join(WHERE)}',
      '# status 75: scontrol requeue $SLURM_JOB_ID',
    ],
  ),
}


def _dry(args):
  """The option goes behind the name of an action, in front of FLAGFILE."""
  at = 2 if args[0] == 'tpu_vm.sh' else 1
  return [*args[:at], '--dry-run', *args[at:]]


@pytest.mark.parametrize('args, lines', SAYS.values(), ids=SAYS)
def test_dry_run_prints_commands_and_runs_nothing(args, lines, path, log):
  assert _stdout_lines(*_dry(args), path=path) == lines
  assert _calls(log) == []


@pytest.mark.parametrize('name', [name for name in SAYS if name != 'slurm'])
def test_commands_equal_the_dry_run(name, path, log):
  args, lines = SAYS[name]
  assert _stdout_lines(*args, path=path) == []
  assert _calls(log) == [shlex.split(line) for line in lines]


@pytest.mark.parametrize('args, lines', SAYS.values(), ids=SAYS)
def test_missing_option_is_refused_by_name(args, lines, path, log):
  for option in args:
    name = option.split('=')[0]
    optional = {'--slices', '--spot', '--worker'}
    if not name.startswith('--') or name in optional:
      continue
    rest = [a for a in args if a != option]
    done = _run(['bash', f'launch/{rest[0]}', *rest[1:]], path)
    line = f'{args[0]}: missing {name}\n'
    assert (done.returncode, done.stderr, done.stdout) == (2, line, '')
  assert _calls(log) == []


REFUSED = [
  (['tpu_vm.sh'], 'give create|status|setup|run|logs|stop|delete, not: '),
  (['tpu_vm.sh', 'logs'], 'missing --name --zone --project'),
  (['tpu_vm.sh', 'logs', '--zone'], '--zone: give --zone=VALUE'),
  (['tpu_vm.sh', 'logs', *AT, '--zones=z'], '--zones=z: not an option'),
  (['tpu_vm.sh', 'run', *AT], 'missing FLAGFILE'),
  (['tpu_vm.sh', 'run', *AT, 'no.flags'], 'no.flags: no such flag file'),
  (['xpk.sh'], 'missing --name --cluster --project --zone --type --image'),
  (['xpk.sh', *XPK, FLAGFILE], 'missing --data.store --train.workdir'),
  (['xpk.sh', *XPK, *WHERE], '--data.store=gs://b/store: not an option'),
  (['jobset.sh'], 'missing --name --context --image --accelerator --topology'),
  (['jobset.sh', *JOBSET, '--topology=44', *REQUIRED], '--topology=44: chips'),
  (['jobset.sh', *JOBSET, '--chips=5', *REQUIRED], '--chips=5: a 4x4 slice has'),
  (['jobset.sh', *JOBSET, '--name=a b', *REQUIRED], '--name=a b: no such name'),
  (['slurm.sbatch'], 'missing FLAGFILE'),
  (['slurm.sbatch', FLAGFILE, WHERE[0]], 'missing --train.workdir'),
  (['processes.sh', '2'], 'give N train|eval [--section.field=VALUE …], not: '),
]


@pytest.mark.parametrize('args, line', REFUSED)
def test_invalid_options_are_refused(args, line, path, log):
  done = _run(['bash', f'launch/{args[0]}', *args[1:]], path)
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr.startswith(f'{args[0]}: {line}')
  assert done.stderr.count('\n') == 1 and _calls(log) == []


# Whether flags arrive unchanged.


def _wait_for(log):
  limit = time.monotonic() + 30
  while not _calls(log) and time.monotonic() < limit:
    time.sleep(0.05)
  return _calls(log)


def test_flags_reach_a_tpu_vm(path, log, tmp_path):
  (line,) = _stdout_lines('tpu_vm.sh', 'run', '--dry-run', *AT, *REQUIRED, path=path)
  (command,) = [w for w in shlex.split(line) if w.startswith('--command=')]
  copy = tmp_path / 'mtp_jax'
  (copy / '.venv/bin').mkdir(parents=True)
  (copy / '.venv/bin/activate').touch()
  (copy / 'launch').symlink_to(LAUNCH)
  command = command.removeprefix('--command=')
  done = _run(['bash', '-c', command], path, cwd=tmp_path)
  assert (done.returncode, done.stderr) == (0, '')
  assert _wait_for(log) == [['mtp', *TRAIN]]
  assert (copy / 'mtp.pid').read_text().strip().isdigit()


def test_flags_reach_a_pod_of_xpk(path, log):
  (line,) = _stdout_lines('xpk.sh', '--dry-run', *XPK, *REQUIRED, path=path)
  command = shlex.split(line)[-1].removeprefix('--command=')
  done = _run(['bash', '-c', f'({command}) & wait'], path)
  assert (done.returncode, done.stderr) == (0, '')
  assert _calls(log) == [['mtp', *TRAIN]]


def test_flags_reach_slurm_tasks(path, log):
  first, _ = _stdout_lines('slurm.sbatch', '--dry-run', *REQUIRED, path=path)
  assert shlex.split(first)[4:] == ['mtp', *TRAIN]


def test_flags_reach_a_pod_of_a_jobset(path, log):
  container = _pod(_manifest(path))['containers'][0]
  # As Kubernetes does, of which the variables exist or not: $$ is $.
  args = [arg.replace('$$', '$') for arg in container['args']]
  done = _run([*container['command'], *args], path)
  assert (done.returncode, done.stderr) == (0, '')
  assert _calls(log) == [['mtp', *TRAIN]]


def test_flags_reach_the_nodes_of_sky(path, log, tmp_path):
  (tmp_path / '.venv/bin').mkdir(parents=True)
  (tmp_path / '.venv/bin/activate').touch()
  (tmp_path / 'launch').symlink_to(LAUNCH)
  done = _run(
    ['bash', '-c', _sky()['run']],
    path,
    cwd=tmp_path,
    FLAGFILE=FLAGFILE,
    STORE='gs://b/store',
    WORKDIR='gs://b/run',
    FLAGS=shlex.join(HARD),
    SKYPILOT_NODE_IPS='10.0.0.1\n10.0.0.2',
    SKYPILOT_NUM_NODES='2',
    SKYPILOT_NODE_RANK='1',
  )
  assert (done.returncode, done.stderr) == (0, '')
  where = [
    '--distributed.coordinator_address=10.0.0.1:8476',
    '--distributed.num_processes=2',
    '--distributed.process_id=1',
  ]
  expected = ['mtp', 'train', f'--flagfile={FLAGFILE}', *WHERE, *where, *HARD]
  assert _calls(log) == [expected]


# N processes, M devices.


def test_processes_have_disjoint_devices(path, log):
  given = ['--dry-run', '2', 'train', *WHERE, '--a=b c']
  variables = dict(DEVICES='4', PORT='1234', XLA_FLAGS='--xla_z=1')
  lines = _stdout_lines('processes.sh', *given, path=path, **variables)
  flag = '--xla_force_host_platform_device_count=4'
  assert lines == [
    f"env JAX_PLATFORMS=cpu 'XLA_FLAGS=--xla_z=1 {flag}' python -m mtp_jax"
    f" train {' '.join(WHERE)} '--a=b c' --distributed.coordinator_address=localhost:1234"
    f' --distributed.num_processes=2 --distributed.process_id={i} &'
    for i in (1, 0)
  ]
  assert _calls(log) == []
  done = _run(['launch/processes.sh', *given[1:]], path, **variables)
  assert (done.returncode, done.stderr) == (0, '')
  expected = [shlex.split(line)[3:-1] for line in lines]
  assert sorted(_calls(log)) == sorted(expected)


def test_processes_without_devices(path):
  given = ['--dry-run', '1', 'eval', '--a=b']
  lines = _stdout_lines('processes.sh', *given, path=path, PORT='1234')
  assert lines == [
    'python -m mtp_jax eval --a=b --distributed.coordinator_address=localhost:1234'
    ' --distributed.num_processes=1 --distributed.process_id=0 &'
  ]


def test_number_of_devices_is_validated(path):
  done = _run(['launch/processes.sh', '1', 'train'], path, DEVICES='x')
  assert done.returncode == 2
  assert done.stderr == 'processes.sh: DEVICES=x: a number\n'


# JobSet. The schemas know what these files use and no more, so that a name that
# is spelt wrongly is found; where Kubernetes demands something, it is required.


def _object(required, **properties):
  return dict(
    type='object', required=required.split(), properties=properties, additionalProperties=False
  )


def _list(items):
  return dict(type='array', items=items, minItems=1)


TEXT = dict(type='string', minLength=1, pattern=r'^[^\n]*$')
NUMBER = dict(type='integer', minimum=1)
LABEL = dict(type='object', additionalProperties=TEXT)
CONTAINER = _object(
  'name image command args resources',
  name=TEXT,
  image=TEXT,
  command=_list(TEXT),
  args=dict(type='array', items=dict(type='string')),
  ports=_list(_object('containerPort', containerPort=NUMBER)),
  resources=_object('limits', limits=_object('google.com/tpu', **{'google.com/tpu': NUMBER})),
)
POD = _object(
  'restartPolicy containers nodeSelector terminationGracePeriodSeconds',
  restartPolicy=dict(const='Never'),  # podFailurePolicy demands it
  serviceAccountName=TEXT,
  terminationGracePeriodSeconds=NUMBER,
  nodeSelector=LABEL,
  hostNetwork=dict(type='boolean'),
  dnsPolicy=dict(const='ClusterFirstWithHostNet'),
  containers=_list(CONTAINER),
)
JOB = _object(
  'parallelism completions completionMode backoffLimit podFailurePolicy template',
  parallelism=NUMBER,
  completions=NUMBER,
  completionMode=dict(const='Indexed'),
  backoffLimit=dict(const=0),
  podFailurePolicy=_object(
    'rules',
    rules=_list(
      _object(
        'action',
        action=dict(enum=['FailJob', 'FailIndex', 'Ignore', 'Count']),
        onExitCodes=_object(
          'operator values',
          containerName=TEXT,
          operator=dict(enum=['In', 'NotIn']),
          values=_list(dict(type='integer', minimum=1, maximum=255)),
        ),
        onPodConditions=_list(
          _object('type status', type=TEXT, status=dict(enum=['True', 'False']))
        ),
      )
    ),
  ),
  template=_object('spec', spec=POD),
)
ACTIONS = ['FailJobSet', 'RestartJobSet', 'RestartJobSetAndIgnoreMaxRestarts']
JOBSET_SCHEMA = _object(
  'apiVersion kind metadata spec',
  apiVersion=dict(const='jobset.x-k8s.io/v1alpha2'),
  kind=dict(const='JobSet'),
  metadata=_object('name', name=TEXT, annotations=LABEL),
  spec=_object(
    'replicatedJobs failurePolicy',
    failurePolicy=_object(
      'maxRestarts',
      maxRestarts=NUMBER,
      restartStrategy=dict(enum=['Recreate', 'BlockingRecreate']),
      rules=_list(
        _object(
          'name action',
          name=dict(pattern='^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$'),
          action=dict(enum=ACTIONS),
          onJobFailureReasons=_list(dict(enum=['PodFailurePolicy', 'BackoffLimitExceeded'])),
          onJobFailureMessagePatterns=_list(TEXT),
        )
      ),
    ),
    replicatedJobs=_list(
      _object('name template', name=TEXT, replicas=NUMBER, template=_object('spec', spec=JOB))
    ),
  ),
)


def _manifest(path, *options):
  lines = _stdout_lines('jobset.sh', '--dry-run', *JOBSET, *options, *REQUIRED, path=path)
  assert lines[0] == "kubectl --context=c1 apply -f - <<'EOF'"
  assert lines[-1] == 'EOF'
  return yaml.safe_load('\n'.join(lines[1:-1]))


def _job(manifest):
  return manifest['spec']['replicatedJobs'][0]['template']['spec']


def _pod(manifest):
  return _job(manifest)['template']['spec']


@pytest.mark.parametrize(
  'options, changed',
  [
    ([], {}),
    (['--spot'], dict(spot='true')),
    (['--slices=4'], dict(slices=4)),
    (['--topology=2x4x4'], dict(topology='2x4x4', hosts=8)),
    (['--topology=2x4', '--chips=8'], dict(topology='2x4', hosts=1, chips=8)),
    (['--max-restarts=3', '--grace-s=60'], dict(max_restarts=3, grace_s=60)),
    (['--service-account=ksa'], dict(account='ksa')),
  ],
)
def test_jobset_manifest(path, options, changed):
  wanted = (
    dict(
      spot=None,
      slices=1,
      topology='4x4',
      hosts=4,
      chips=4,
      max_restarts=10,
      grace_s=300,
      account='default',
    )
    | changed
  )
  manifest = _manifest(path, *options)
  jsonschema.validate(manifest, JOBSET_SCHEMA)
  job, pod = _job(manifest), _pod(manifest)
  container = pod['containers'][0]
  spot = pod['nodeSelector'].pop('cloud.google.com/gke-spot', None)
  assert pod['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': 'tpu-v5-lite-podslice',
    'cloud.google.com/gke-tpu-topology': wanted['topology'],
  }
  assert manifest['metadata']['name'] == 'run'
  assert container['image'] == 'reg/i:1'
  assert job['completions'] == job['parallelism']
  assert wanted == dict(
    spot=spot,
    slices=manifest['spec']['replicatedJobs'][0]['replicas'],
    topology=wanted['topology'],
    hosts=job['parallelism'],
    chips=container['resources']['limits']['google.com/tpu'],
    max_restarts=manifest['spec']['failurePolicy']['maxRestarts'],
    grace_s=pod['terminationGracePeriodSeconds'],
    account=pod['serviceAccountName'],
  )
  assert '${' not in json.dumps(manifest)


def test_manifest_is_passed_to_kubectl(path, log):
  assert _stdout_lines('jobset.sh', *JOBSET, *REQUIRED, path=path) == []
  ((*command, given),) = _calls(log)
  assert command == ['kubectl', '--context=c1', 'apply', '-f', '-']
  assert yaml.safe_load(given) == _manifest(path)


def test_jobset_schema_rejects_errors(path):
  wrong = _manifest(path)
  _pod(wrong)['containers'][0]['arg'] = []
  with pytest.raises(jsonschema.ValidationError, match="'arg' was unexpected"):
    jsonschema.validate(wrong, JOBSET_SCHEMA)


def _after(manifest, exit_code=None) -> str:
  """What becomes of the set when a process ends so; None: its node is taken.

  As the controllers of Job and JobSet do it: the first pod rule that matches
  fails the job, with a message that the rules of the set are then read for.
  """
  reason, message = 'BackoffLimitExceeded', ''
  for i, rule in enumerate(_job(manifest)['podFailurePolicy']['rules']):
    codes = rule.get('onExitCodes')
    kinds = [c['type'] for c in rule.get('onPodConditions', [])]
    if codes and exit_code in codes['values']:
      message = f'Container mtp for pod x/y failed with exit code {exit_code}'
    elif exit_code is None and 'DisruptionTarget' in kinds:
      message = 'Pod x/y has condition DisruptionTarget'
    else:
      continue
    reason = 'PodFailurePolicy'
    message += f' matching {rule["action"]} rule at index {i}'
    break
  for rule in manifest['spec']['failurePolicy']['rules']:
    patterns = rule['onJobFailureMessagePatterns']
    if reason in rule['onJobFailureReasons'] and any(re.search(p, message) for p in patterns):
      return rule['action']
  return 'RestartJobSet'  # until max_restarts


def test_jobset_restart_policy(path):
  manifest = _manifest(path)
  again = 'RestartJobSetAndIgnoreMaxRestarts'
  assert _after(manifest, None) == again
  assert _after(manifest, loop.EXIT_INTERRUPTED) == again
  assert _after(manifest, loop.EXIT_REPLACED) == 'FailJobSet'
  assert _after(manifest, 76) == 'FailJobSet'
  for crash in (1, 2, 137):
    assert _after(manifest, crash) == 'RestartJobSet'


# SkyPilot.

SKY_SCHEMA = _object(
  'name resources envs setup run',
  name=TEXT,
  workdir=TEXT,
  num_nodes=NUMBER,
  resources=_object(
    'accelerators',
    accelerators=TEXT,
    use_spot=dict(type='boolean'),
    job_recovery=_object(
      '',
      strategy=TEXT,
      max_restarts_on_errors=dict(type='integer', minimum=0),
      recover_on_exit_codes=_list(dict(type='integer', maximum=255)),
    ),
  ),
  envs=dict(
    type='object',
    patternProperties={'^[a-zA-Z_]\\w*$': dict(type=['string', 'null'])},
    additionalProperties=False,
  ),
  setup=dict(type='string'),
  run=dict(type='string'),
)


def _sky():
  return yaml.safe_load((LAUNCH / 'sky.yaml').read_text())


def test_sky_task():
  task = _sky()
  jsonschema.validate(task, SKY_SCHEMA)
  recovery = task['resources']['job_recovery']
  assert recovery == dict(recover_on_exit_codes=[loop.EXIT_INTERRUPTED])
  needed = [name for name, value in task['envs'].items() if value is None]
  assert needed == ['FLAGFILE', 'STORE', 'WORKDIR']
  for part in ('setup', 'run'):
    done = subprocess.run(['bash', '-n', '-c', task[part]])
    assert done.returncode == 0


# Slurm.


def test_slurm_resource_options():
  lines = (LAUNCH / 'slurm.sbatch').read_text().splitlines()
  options = [line for line in lines if line.startswith('#SBATCH')]
  assert options == [
    '#SBATCH --job-name=mtp',
    '#SBATCH --ntasks-per-node=1',
    '#SBATCH --requeue',
    '#SBATCH --open-mode=append',
    '#SBATCH --signal=TERM@300',
  ]
  # Slurm stops parsing options at the first command.
  first = next(i for i, line in enumerate(lines) if line[:1] not in ('#', ''))
  assert max(lines.index(line) for line in options) < first


@pytest.mark.parametrize(
  'gpus, tasks, own',
  [
    ('8', '1', 'env JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7 '),
    ('h100:2', '1', 'env JAX_LOCAL_DEVICE_IDS=0,1 '),
    ('8', '8', ''),
    ('1', '1', ''),
  ],
)
def test_slurm_one_process_per_node_or_gpu(path, gpus, tasks, own):
  says, _ = _stdout_lines(
    'slurm.sbatch',
    '--dry-run',
    FLAGFILE,
    *WHERE,
    path=path,
    SLURM_GPUS_PER_NODE=gpus,
    SLURM_NTASKS_PER_NODE=tasks,
  )
  assert says.startswith(f'{own}srun ')


def test_wrong_number_of_processes_is_refused(path):
  done = _run(
    ['bash', 'launch/slurm.sbatch', '--dry-run', FLAGFILE, *WHERE],
    path,
    SLURM_GPUS_PER_NODE='8',
    SLURM_NTASKS_PER_NODE='4',
  )
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr == ('slurm.sbatch: --ntasks-per-node=4: 1, or as many as --gpus-per-node=8\n')


@pytest.fixture
def submitted(tmp_path):
  """Where `sbatch` was called, with the copy that Slurm runs."""
  for name in ('launch', 'experiments', 'mtp_jax'):
    (tmp_path / name).symlink_to(ROOT / name)
  (tmp_path / '.venv/bin').mkdir(parents=True)
  (tmp_path / '.venv/bin/activate').touch()
  (tmp_path / 'spool').mkdir()
  copy = tmp_path / 'spool/slurm_script'
  shutil.copy(LAUNCH / 'slurm.sbatch', copy)
  return ['bash', str(copy)]


@pytest.mark.parametrize('status', [0, loop.EXIT_INTERRUPTED, 76, 77, 1])
def test_only_status_75_is_requeued(submitted, stand_in, log, tmp_path, status):
  stand_in('scontrol')
  path = stand_in('srun', f'sys.exit({status})')
  done = _run([*submitted, *REQUIRED], path, cwd=tmp_path, SLURM_JOB_ID='17')
  assert (done.returncode, done.stderr) == (status, '')
  (first, *then) = _calls(log)
  assert first[4:] == ['mtp', *TRAIN]
  again = [['scontrol', 'requeue', '17']]
  assert then == again * (status == loop.EXIT_INTERRUPTED)


# Processes that join by jax's cluster detection.


def _job_id() -> int:
  """A number from which jax makes a port that is free."""
  for number in range(os.getpid() % 4096, 10**6):
    with socket.socket() as s:
      try:
        s.bind(('localhost', 61440 + number % 4096))
      except OSError:
        continue
      return number


def _slurm(index: int, number: int) -> dict:
  return dict(
    SLURM_JOB_ID=str(number),
    SLURM_STEP_NODELIST='localhost',
    SLURM_NTASKS='2',
    SLURM_PROCID=str(index),
    SLURM_LOCALID=str(index),
    SLURM_STEP_NUM_NODES='1',
  )


def _open_mpi(index: int, number: int) -> dict:
  return dict(
    OMPI_MCA_orte_hnp_uri=f'{number * 4096}.0;tcp://127.0.0.1:34911',
    OMPI_COMM_WORLD_SIZE='2',
    OMPI_COMM_WORLD_RANK=str(index),
    OMPI_COMM_WORLD_LOCAL_RANK=str(index),
  )


JOIN = """
import sys
import jax
from mtp_jax.cli import flags
from mtp_jax.parallel import distributed

def report():
  here = jax.process_index(), jax.process_count(), jax.device_count()
  print('joined', *here, distributed.broadcast_one_to_all(str(here[0])), file=sys.stderr)
  return 0

sys.exit(distributed.run(flags.parse(sys.argv[1:]).config(), report))
"""


@pytest.mark.parametrize('cluster', [_slurm, _open_mpi])
def test_processes_join_by_cluster_detection(cluster):
  number = _job_id()
  flags = ['--distributed.coordinator_address=auto', '--distributed.heartbeat_timeout_s=10']
  running = [runs.process(['-c', JOIN, *flags], 2, cluster(index, number)) for index in (0, 1)]
  limit = time.monotonic() + LIMIT_S
  try:
    ends = [p.communicate(timeout=limit - time.monotonic()) for p in running]
  finally:
    for p in running:
      p.kill()
  assert [p.returncode for p in running] == [0, 0], ends
  for index, (_, error) in enumerate(ends):
    assert f'joined {index} 2 4 0' in error.splitlines(), error


# Four devices, two of either process: without the other there is no such mesh.
MESH = dict(
  mesh__data=2, mesh__fsdp=2, model__n_layers=2, heads__n=1, distributed__heartbeat_timeout_s=10
)


# Emulates srun: N tasks with their ranks; forwards SIGTERM to all; exits with the
# highest status. After two steps it sends Slurm's signal once.
SRUN = """
import signal, subprocess
command, mark = sys.argv[4:], {mark!r}
tasks = []
for i in (0, 1):
  own = {{k: v for k, v in zip({names!r}, ({job!r}, 'localhost', '2', str(i), str(i)))}}
  tasks.append(subprocess.Popen(command, env=os.environ | own, stdout=subprocess.PIPE, text=True))
for line in tasks[0].stdout:
  print(line, end='', flush=True)
  if line.startswith('step 2/') and not os.path.exists(mark):
    open(mark, 'w').close()
    for task in tasks:
      task.send_signal(signal.SIGTERM)
sys.exit(max(task.wait() for task in tasks))
"""  # noqa: E501


@pytest.mark.slow
def test_job_at_its_time_limit_is_requeued_and_resumes(submitted, stand_in, log, store, tmp_path):
  flagfile = tmp_path / 'run.flags'
  workdir = tmp_path / 'run'
  flags = runs.args(store, str(workdir), **MESH, train__steps=40)
  flagfile.write_text('\n'.join(flags))
  names = list(_slurm(0, 0))[:5]
  srun = SRUN.format(mark=str(tmp_path / 'signalled'), job=str(_job_id()), names=names)
  stand_in('scontrol')
  mtp = f'os.execv({sys.executable!r}, [{sys.executable!r}, "-m", "mtp_jax", *sys.argv[1:]])'  # noqa: E501
  path = stand_in('mtp', mtp)
  stand_in('srun', srun)
  where = [f'--data.store={store}', f'--train.workdir={workdir}']

  def job():
    done = subprocess.run(
      [*submitted, str(flagfile), *where],
      cwd=tmp_path,
      text=True,
      capture_output=True,
      timeout=LIMIT_S,
      env=runs.environment(devices=2) | dict(PATH=path, SLURM_JOB_ID='17'),
    )
    queued = _calls(log).count(['scontrol', 'requeue', '17'])
    return done, queued

  done, queued = job()
  assert (done.returncode, queued) == (loop.EXIT_INTERRUPTED, 1), done.stderr
  assert 'interrupted: saved step' in done.stdout
  done, queued = job()
  assert (done.returncode, queued) == (0, 1), done.stderr
  assert 'of 40' in done.stdout and 'step 40/40' in done.stdout


def test_sigterm_reaches_the_process_that_xpk_runs(stand_in, log):
  """xpk signals the shell it put the command into: that must be mtp by then."""
  path = stand_in('mtp', 'import time; time.sleep(60)')
  (line,) = _stdout_lines('xpk.sh', '--dry-run', *XPK, *REQUIRED, path=path)
  command = shlex.split(line)[-1].removeprefix('--command=')
  shell = subprocess.Popen(
    ['bash', '-c', f'({command}) & echo $!; wait $!'],
    cwd=ROOT,
    text=True,
    stdout=subprocess.PIPE,
    env=dict(PATH=path),
  )
  pid = int(shell.stdout.readline())
  assert _wait_for(log) == [['mtp', *TRAIN]]
  os.kill(pid, signal.SIGTERM)
  assert shell.wait(timeout=30) == 128 + signal.SIGTERM
  shell.stdout.close()


# Images.


@pytest.mark.parametrize('name, extra', [('Dockerfile', 'tpu'), ('Dockerfile.cuda', 'cuda')])
def test_container_image(name, extra):
  text = (LAUNCH / name).read_text()
  text = re.sub(r'^#.*\n', '', text, flags=re.MULTILINE).replace('\\\n', ' ')
  steps = [line.split(maxsplit=1) for line in text.splitlines()]
  verbs = [verb for verb, _ in steps]
  assert verbs[0] == 'FROM' and verbs[-1] == 'ENTRYPOINT'
  assert set(verbs) <= {'FROM', 'ENV', 'WORKDIR', 'COPY', 'RUN', 'ENTRYPOINT'}
  of = {verb: [rest for v, rest in steps if v == verb] for verb in verbs}
  assert of['FROM'] == ['python:3.12-slim']  # no private registry
  assert of['ENTRYPOINT'] == ['["mtp"]'] and of['WORKDIR'] == ['/mtp_jax']
  assert f"--editable '.[{extra},gcs]'" in of['RUN'][0]
  copied = [source for copy in of['COPY'] for source in copy.split()[:-1]]
  assert {'mtp_jax', 'experiments', 'launch', 'setup.cfg'} <= set(copied)
  for source in copied:
    assert (ROOT / source).exists(), source


# No private names.


def test_launch_files_name_no_project_or_bucket():
  for file in LAUNCH.iterdir():
    text = file.read_text()
    assert not re.search(r'gs://\w|\w@\w+\.|(gcr\.io|pkg\.dev)/', text), file
    assert not re.search(r'/(home|root|Users|work|tmp)/', text), file


def test_local_processes_dry_run_and_wrong_numbers(path):
  lines = _stdout_lines('local.sh', '--dry-run', '--processes=2x4', '--heads.n=8', path=path)
  assert (
    'env DEVICES=4 launch/processes.sh 2 train'
    ' --flagfile=experiments/smoke.flags'
    ' --data.store=stores/python-stdlib-bytes'
    ' --train.workdir=runs/smoke_heads.n=8 --heads.n=8'
  ) in lines
  assert any(line.startswith('mtp eval runs/smoke') for line in lines)
  plain = _stdout_lines('local.sh', '--dry-run', '--processes=3', path=path)
  assert any(line.startswith('launch/processes.sh 3 train ') for line in plain)
  done = _run(['bash', 'launch/local.sh', '--processes=two'], path)
  assert done.returncode == 2
  assert done.stderr == 'local.sh: --processes=two: give N or NxM\n'


SCRIPTS = (
  'local.sh',
  'test.sh',
  'processes.sh',
  'tpu_vm.sh',
  'xpk.sh',
  'jobset.sh',
  'slurm.sbatch',
)


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_prints_the_head_comment(script, tmp_path):
  """From any folder."""
  found = subprocess.run(
    ['bash', str(LAUNCH / script), '--help'],
    cwd=tmp_path,
    text=True,
    capture_output=True,
    env=dict(PATH='/usr/bin:/bin'),
    timeout=20,
  )
  assert (found.returncode, found.stderr) == (0, '')
  head = (LAUNCH / script).read_text().splitlines()[1]
  assert found.stdout.startswith(head.removeprefix('# ') + '\n')
  assert f'launch/{script}' in found.stdout and 'set -e' not in found.stdout
