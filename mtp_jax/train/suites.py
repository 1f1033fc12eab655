"""The suites of --eval.suite while a run goes on. Floor 5."""

from collections.abc import Callable

import jax

from mtp_jax import config, processes
from mtp_jax.data import tokenizers
from mtp_jax.decode import decoder as decoder_lib
from mtp_jax.evals import registry, suites
from mtp_jax.evals import subject as subject_lib


def check(cfg: config.Config) -> None:
  """Raises ConfigError where `registry.asked` does, or where suites beside
  held-out windows are to be evaluated by several processes."""
  registry.asked(cfg)
  if named(cfg) and processes.several():
    raise config.ConfigError(
      'eval.suite',
      cfg.eval.suite,
      'one process; on several, give these to `mtp eval` beside the run',
    )


def named(cfg: config.Config) -> list[tuple[str, str]]:
  """(name, argument) of the suites beside held-out windows."""
  return [s for s in registry.named(cfg) if s[0] != registry.HELDOUT]


def evaluate(
  name: str,
  arg: str,
  model,
  cfg: config.Config,
  mesh,
  tokenizer: tokenizers.Tokenizer,
  step: int,
  alive: Callable[[], None],
) -> suites.Result:
  """What a suite finds of the parameters after `step` steps; alive() is called
  while it runs.

  Raises:
    ConfigError: it cannot be evaluated after all.
  """
  active = config.active_heads(cfg, max(step - 1, 0))
  with jax.transfer_guard('allow'):  # prompts come from the host
    subject = subject_lib.Subject(
      f'{cfg.train.workdir}, step {step}',
      cfg,
      model,
      mesh,
      tokenizer,
      step,
      decoder_lib.Decoder(model, cfg, mesh, active),
      lambda line: alive(),
    )
    return registry.SUITES[name].run(subject, arg)
