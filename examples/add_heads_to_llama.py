"""Adds prediction heads to a Llama that predicts one token: python
examples/add_heads_to_llama.py LLAMA STORE OUT [FLAG …]

LLAMA is a Hugging Face folder, STORE a token store of its tokenizer (`mtp prepare
--data.tokenizer=hf:LLAMA/tokenizer.json`). The trunk stays frozen, so that the next
token is predicted as before and only the new heads train; OUT/model is the run, and
OUT/faster the same model for engines that draft with its heads.
"""

import sys

from mtp_jax.cli import main as cli


def run(*args: str) -> None:
  print('mtp', *args, flush=True)
  status = cli.main([*args])
  if status:
    sys.exit(status)


def main(llama: str, store: str, out: str, *flags: str) -> None:
  run('import', f'--import.path={llama}', f'--train.workdir={out}/base')
  run(
    'train',
    f'--flagfile={out}/base/run.flags',
    f'--train.init_from={out}/base',
    f'--train.workdir={out}/model',
    f'--data.store={store}',
    '--heads.family=sequential',
    '--heads.n=3',
    '--train.freeze=trunk',
    '--train.steps=200',
    '--optim.warmup_steps=20',
    '--data.tokenizer=',
    *flags,
  )
  run('export', f'{out}/model', f'--export.out={out}/faster', '--export.format=transformers_mtp')


if __name__ == '__main__':
  main(*sys.argv[1:])
