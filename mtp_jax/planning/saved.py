"""Reads a plan that `mtp plan --out=FILE.json` wrote."""

from mtp_jax.io import jsonl

NUMBER = (float, None)
SCOPE = {'scope': str, 'cycles': int, 'flops': float, 'memory_bytes': float, ...: object}
BUFFER = {'shape': str, 'bytes': float, 'scope': str, ...: object}
# What readers of a plan use; others may be missing, as in a file of an earlier version.
FORM = {
  'device_kind': str,
  'params_bytes': float,
  'temp_bytes': NUMBER,
  'total_bytes': NUMBER,
  'estimated_cycles?': (int, None),
  'estimated_s?': NUMBER,
  'clock_hz?': NUMBER,
  'executed_flops_per_step?': NUMBER,
  'memory_bytes_per_step?': NUMBER,
  'step_s?': NUMBER,
  'topology?': (str, None),
  'collectives?': ({...: {'count': int, 'sent_bytes': float}}, None),
  'operations?': ([SCOPE], None),
  'peak_buffers?': ([BUFFER], None),
  ...: object,
}


def parse(text: bytes) -> dict:
  """Returns the plan of a file.

  Raises:
    ValueError: it is not JSON, not a plan, or the rows of a sweep or search; in one line.
  """
  found = jsonl.loads(text)
  if not isinstance(found, dict):
    raise ValueError('is not a plan: must be an object')
  for kind in 'sweep', 'candidates':
    if kind in found and 'rows' in found:
      command = 'sweep' if kind == 'sweep' else 'search_mesh'
      raise ValueError(f'is of --plan.{command}, which has no single plan')
  try:
    return jsonl.check(found, FORM)
  except ValueError as error:
    raise ValueError(f'is not a plan: {error}') from error
