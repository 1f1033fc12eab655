"""Statistics of a decoding: acceptance rates and speed, as lines and as JSON."""

from mtp_jax.config import parse, schema
from mtp_jax.decode import decoder as decoder_lib
from mtp_jax.decode import load as load_lib


def stop_ids(cfg: schema.CommandConfig, opened: load_lib.LoadedModel) -> tuple[int, ...]:
  given = parse.parse_stop_ids(cfg.decode.stop_token_ids)
  if given is not None:
    return given
  return opened.tokenizer.stop_ids if opened.tokenizer else ()


def sampled(cfg) -> str:
  t = cfg.decode.temperature
  return f', sampled at temperature {t:g}' if t else ', greedy'


def acceptance_lines(decoded) -> list[str]:
  if not len(decoded.proposed_J) or (decoded.auto and not decoded.proposed_J.any()):
    return []
  rates = ', '.join(
    f't+{j}: {"-" if rate is None else f"{rate:.2f}"}'
    for j, rate in enumerate(decoded.acceptance_J, 2)
  )
  return [f'conditional acceptance rate of drafts: {rates}']


def auto_lines(decoded) -> list[str]:
  """Returns which number of draft tokens was measured to be the fastest, and why."""
  return [decoded.auto.line()] if decoded.auto else []


def summary(decoded: decoder_lib.Decoded) -> dict:
  auto = decoded.auto
  chosen = {}
  if auto is not None:
    chosen = dict(
      auto=dict(
        num_draft_tokens=auto.num_draft_tokens,
        forwards={str(j): n for j, n in sorted(auto.forwards.items())},
        forward_s={str(j): s for j, s in sorted(auto.forward_s.items())},
        reason=auto.line(),
      )
    )
  return dict(
    tokens=decoded.n_tokens,
    forwards=int(decoded.forwards.sum()),
    tokens_per_forward=decoded.tokens_per_forward,
    acceptance=decoded.acceptance_J,
    proposed=decoded.proposed_J.tolist(),
    accepted=decoded.accepted_J.tolist(),
    prefill_s=decoded.prefill_s,
    decode_s=decoded.decode_s,
    compile_s=decoded.compile_s,
    tokens_per_s=decoded.n_tokens / decoded.decode_s,
    **chosen,
  )
