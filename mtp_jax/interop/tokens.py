"""Tokenizer files that transformers reads, with the same ids. Floor 4."""

import json

from mtp_jax.data import tokenizers

MODEL = 'tokenizer.model'  # what Llama calls a SentencePiece model


def files_of(tokenizer: tokenizers.Tokenizer) -> dict[str, bytes]:
  """The files of an export's folder. A text is encoded with the begin token
  before it, as documents are."""
  about = dict(
    tokenizer_class='PreTrainedTokenizerFast', add_bos_token=True,
    add_eos_token=False, clean_up_tokenization_spaces=False,
    model_max_length=10**30,
  )  # fmt: skip
  files = dict(tokenizer.files)
  if tokenizers.PIECES in files:
    pieces = files.pop(tokenizers.PIECES)
    about |= dict(
      tokenizer_class='LlamaTokenizer', legacy=False,
      bos_token=tokenizer.piece(tokenizer.bos),
      eos_token=tokenizer.piece(tokenizer.eos),
    )  # fmt: skip
    files[MODEL] = pieces
  elif not files:
    files['tokenizer.json'] = _bytes_tokenizer(tokenizer)
    about |= dict(bos_token='<bos>', eos_token='<eos>')
  else:
    about |= json.loads(files.get(tokenizers.ENDS, b'{}'))
  files[tokenizers.ENDS] = json.dumps(about, indent=2).encode()
  return files


def _bytes_tokenizer(tokenizer) -> bytes:
  """A tokenizer.json of 256 bytes without merges, and the two ends."""
  import tokenizers as library
  from tokenizers import decoders, models, pre_tokenizers, processors

  # The letters that a byte-level vocabulary writes for bytes, in their order.
  letters = _byte_letters()
  fast = library.Tokenizer(
    models.BPE({letter: b for b, letter in enumerate(letters)}, [])
  )
  fast.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  fast.decoder = decoders.ByteLevel()
  fast.add_special_tokens(['<bos>', '<eos>'])
  fast.post_processor = processors.TemplateProcessing(
    single='<bos> $A', pair='<bos> $A $B',
    special_tokens=[('<bos>', tokenizer.bos)],
  )  # fmt: skip
  return fast.to_str().encode()


def _byte_letters() -> list[str]:
  """GPT-2's: a printable Latin-1 byte is itself, the n-th other one 256 + n."""
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [b for b in range(256) if b not in plain]
  return [chr(b if b in plain else 256 + others.index(b)) for b in range(256)]


def read(folder_files: dict[str, bytes]) -> tokenizers.Tokenizer | None:
  """The tokenizer of a folder's files; None if there is none."""
  if MODEL in folder_files:
    pieces = {tokenizers.PIECES: folder_files[MODEL]}
    return tokenizers.of_files('sentencepiece', pieces)
  if 'tokenizer.json' in folder_files:
    names = ('tokenizer.json', tokenizers.ENDS)
    return tokenizers.of_files(
      'hf', {n: folder_files[n] for n in names if n in folder_files}
    )
  return None
