"""Actions at a batch of a run."""

from mtp_jax.parallel import sharding


def at_batch(monkeypatch, number, action):
  """Calls action when the run is about to use its number-th batch."""
  put, calls = sharding.put_batch, []

  def patched(mesh, batch):
    calls.append(1)
    if len(calls) == number:
      action()
    return put(mesh, batch)

  monkeypatch.setattr(sharding, 'put_batch', patched)
