"""Compares plain and speculative decoding with Hugging Face transformers.

  python -m tests.baselines.transformers_decode RUN \
    --bench.batches=1,8 --bench.prompt_len=128 --decode.max_new_tokens=128

The same weights (trunk and head 1, exported), prompts (held-out documents) and
machine; greedy, float32, contenders alternating in every round, including prefill.
transformers uses its generate(), with its cache and without gradients.
"""

import statistics
import sys
import tempfile
import time

import numpy as np

from mtp_jax.bench import timing
from mtp_jax.checkpoint import restore
from mtp_jax.cli import flags
from mtp_jax.config import parse
from mtp_jax.decode import decoder, load
from mtp_jax.evals import acceptance
from mtp_jax.interop import hf_folder


def main(args: list[str]) -> None:
  import torch
  import transformers

  parsed = flags.parse(args)
  found = load.find(parsed.rest[0], parsed.given, only_ids=True)
  opened = load.load(found)
  cfg = opened.cfg
  model = restore.restore_model(found.workdir, found.step, cfg, opened.mesh)
  with tempfile.TemporaryDirectory() as parent:
    out = f'{parent}/llama'
    hf_folder.export(model, cfg, None, out, dtype='float32', about='bench')
    llama = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
  del model
  widths = opened.decoder.widths
  print(
    f'{opened.name}: prompts of {cfg.bench.prompt_len} tokens, {cfg.decode.max_new_tokens}'
    f' new, {torch.get_num_threads()} threads of PyTorch {torch.__version__},'
    f' transformers {transformers.__version__}'
  )
  for B in parse.parse_numbers(cfg.bench.batches):
    ids = acceptance.pieces(cfg, max(B, cfg.bench.num_prompts))
    batches = [ids[i : i + B] for i in range(0, len(ids), B)]

    def ours(which, batches=batches):
      decoded = decoder.joined([opened.decoder(batch, widths=which) for batch in batches])
      return decoded.prefill_s + decoded.decode_s, decoded.tokens

    def theirs(batches=batches):
      begin, texts = time.perf_counter(), []
      for batch in batches:
        prompts = torch.tensor(np.stack(batch))
        with torch.inference_mode():
          rows = llama.generate(
            prompts,
            do_sample=False,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=cfg.decode.max_new_tokens,
            eos_token_id=None,
            pad_token_id=0,
          )
        texts += list(rows[:, cfg.bench.prompt_len :].numpy())
      return time.perf_counter() - begin, texts

    contenders = {
      'transformers': theirs,
      'head 1': lambda: ours(()),
      f'{len(widths) + 1} heads': lambda: ours(widths),
    }
    times, texts = {name: [] for name in contenders}, {}
    for r in range(cfg.bench.rounds + 1):
      for name, run in contenders.items():
        seconds, texts[name] = run()
        if r:
          times[name].append(seconds)
    n = len(ids) * cfg.decode.max_new_tokens
    for name in contenders:
      same = sum(
        a.tolist() == b.tolist() for a, b in zip(texts[name], texts['transformers'], strict=True)
      )
      print(
        f'batch {B}, {name}: {n / statistics.median(times[name]):,.0f}'
        ' tokens/s, time over transformers'
        f' {timing.shown(timing.ratio(times[name], times["transformers"]))},'
        f' {same} of {len(ids)} texts identical'
      )


if __name__ == '__main__':
  main(sys.argv[1:])
