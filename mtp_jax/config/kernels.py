"""What each attention kernel supports, and where the reference takes its place."""

from mtp_jax.config import fields, layer_types, schema


def problem(m: schema.ModelConfig, T: int, kernel: str) -> fields.ConfigError | None:
  """Returns the error of an attention kernel that does not support a model's heads, or
  rows of T positions."""
  name, width = 'model.attention', m.head_width
  if kernel in schema.KERNELS and T % schema.TILE:
    return fields.ConfigError(
      name, kernel, f'needs a multiple of {schema.TILE} as --data.seq_len, not {T}'
    )
  if kernel == 'splash' and m.attn_sink:
    return fields.ConfigError(name, kernel, 'does not support --model.attn_sink')
  # Triton's products need at least 16; above 256 shared memory is exhausted.
  if kernel == 'flash' and not 16 <= width <= 256:
    return fields.ConfigError(
      name, kernel, f'needs d_model / n_attn_heads of 16 to 256, not {width}'
    )
  return None


def fallbacks(cfg: schema.Config, platform: str) -> list[str]:
  """Returns a line for each window of layers whose attention, with --model.attention=auto,
  computes all pairs of scores on an accelerator, as its kernel does not support them."""
  lines = []
  for kernel in schema.KERNELS if cfg.model.attention == 'auto' else ():
    found = problem(cfg.model, cfg.data.seq_len, kernel)
    for window in sorted({t.window for t in layer_types.distinct(cfg)}):
      if found and schema.KERNELS[kernel] == platform:
        layers = f'layers with a window of {window}' if window else 'layers without a window'
        lines.append(
          f'attention of {layers}: all pairs of scores ({cfg.data.seq_len} x'
          f' {cfg.data.seq_len} per head) are in memory, as the kernel {kernel}'
          f' {found.args[2]}'
        )
  return lines
