"""Peak memory of an import: at most one stacked leaf above its result."""

import json

import numpy as np

from mtp_jax.config import parse, schema
from mtp_jax.interop import files, hf_folder, mapping
from mtp_jax.model import lm, params
from tests.support import runs, tiny

# Anonymous memory only: pages of mapped files can be reclaimed.
READ = """
import re, sys, threading, time
import jax
from mtp_jax.config import schema
from mtp_jax.interop import hf_folder
from mtp_jax.parallel import sharding

def held():
  with open('/proc/self/status') as file:
    return 1024 * int(re.search(r'RssAnon:\\s+(\\d+) kB', file.read())[1])

def watch():
  global peak
  while True:
    peak = max(peak, held())
    time.sleep(0.001)

cfg, _ = hf_folder.find(sys.argv[1], {})
cfg = schema.replace(cfg, **{'mesh.fsdp': -1})
mesh = sharding.make_mesh(cfg)
jax.block_until_ready(jax.numpy.ones(8) + 1)
before = peak = held()
threading.Thread(target=watch, daemon=True).start()
model = jax.block_until_ready(hf_folder.read(sys.argv[1], cfg, mesh))
print(peak - before - sum(x.nbytes for x in jax.tree.leaves(model)))
"""


def _folder(path) -> schema.Config:
  """Writes a Llama of 240 MB, most of it in three arrays."""
  c = tiny.cfg(
    heads__n=1,
    model__d_model=512,
    model__d_ff=2048,
    model__n_layers=14,
    model__n_attn_heads=8,
    model__n_kv_heads=8,
    model__vocab_size=512,
    heads__family='linear',
  )
  leaves = params.by_path(lm.specs(c))
  arrays = {}
  for name, place in mapping.tensors(c).items():
    shape = leaves[place.path].shape
    shape = place.form.shape(shape if place.index is None else shape[1:])
    arrays[name] = np.ones(shape, np.float32)
  path.mkdir()
  files.write(str(path / 'model.safetensors'), arrays)
  (path / hf_folder.OURS).write_text(parse.to_json(c))
  (path / 'config.json').write_text(json.dumps(dict(model_type='llama')))
  return c


def test_import_peak_memory_is_one_stacked_leaf_above_result(tmp_path):
  c = _folder(tmp_path / 'in')
  specs = lm.specs(c).trunk
  leaf = 4 * np.prod(specs.gate.shape)
  process = runs.process(['-c', READ, str(tmp_path / 'in')], devices=1)
  out, error = process.communicate()
  assert process.returncode == 0, error
  one_tensor = leaf / c.model.n_layers
  # Runtime overhead: 23 MiB here, independent of the size of a leaf.
  slack = 32 * 2**20
  print(f'above the result: {int(out) / leaf:.2f} stacked leaves')
  assert int(out) <= leaf + one_tensor + slack
