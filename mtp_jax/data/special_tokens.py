"""What a tokenizer.json puts around a text, and its special tokens within one."""

import functools

from mtp_jax.data import tokenizers


def begins(tokenizer: tokenizers.Tokenizer) -> bool:
  """Whether other tools, given its files, prepend BOS to a text: stated in a
  tokenizer.json, always for other kinds (interop/tokens.py)."""
  if 'tokenizer.json' not in tokenizer.files:
    return True
  letter, whole = of_a_letter(tokenizer)
  return whole[: 1 + len(letter)] == [tokenizer.bos, *letter]


@functools.lru_cache(2)
def with_special_tokens(model: bytes):
  """Returns the library's tokenizer of a tokenizer.json, for which the text of a special
  token is that token."""
  import tokenizers as library

  fast = library.Tokenizer.from_buffer(model)
  fast.no_padding()
  fast.no_truncation()
  return fast


def of_a_letter(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
  """Returns (ids of a letter, the same with the special tokens of tokenizer.json).
  For an empty text, a token after it would look like one before it."""
  fast = with_special_tokens(tokenizer.files['tokenizer.json'])
  return fast.encode('x', add_special_tokens=False).ids, fast.encode('x').ids
