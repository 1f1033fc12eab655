"""The vocabulary of a gguf file: which tokenizers llama.cpp reproduces, and their
tables.
"""

import json

from mtp_jax.config import schema
from mtp_jax.data import ranks, special_tokens, tokenizers
from mtp_jax.interop import tokens

# The vocabulary.

# Token types, as SentencePiece numbers them.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def check(tokenizer) -> str:
  """Returns why llama.cpp would tokenize texts differently; '' if it does not."""
  if tokenizer is None:
    return ''
  if not {tokenizers.PIECES, tokens.JSON} & tokenizer.files.keys():
    return (
      'does not support --data.tokenizer=bytes: llama.cpp has SentencePiece models'
      ' and byte-level BPE'
    )
  unfit = _unfit_pieces if tokenizers.PIECES in tokenizer.files else _unfit_json
  why = unfit(tokenizer)
  ends = len(tokenizer.stop_ids)
  if not why and ends > 1 + len(ENDS):
    why = f'it has {ends} end tokens, llama.cpp supports {1 + len(ENDS)}'
  if not why and max(tokenizer.stop_ids) >= tokenizer.vocab_size:
    why = f'its end token {max(tokenizer.stop_ids)} is out of range'
  return f'does not support the tokenizer {tokenizer.name}: {why}' if why else ''


ENDS = ('eot', 'eom')  # names of further end tokens


def _unfit_pieces(tokenizer) -> str:
  proto = tokens.model_proto(tokenizer.files[tokenizers.PIECES])
  spec, about = proto.normalizer_spec, proto.trainer_spec
  if about.model_type != about.BPE:
    return 'llama.cpp tokenizes by merges (BPE), not by likelihood (unigram)'
  if spec.precompiled_charsmap:
    return f'it normalizes texts ({spec.name}), which llama.cpp does not'
  if spec.remove_extra_whitespaces:
    return 'it removes spaces, which llama.cpp does not'
  if about.treat_whitespace_as_suffix or not spec.escape_whitespaces:
    return 'it marks spaces differently than llama.cpp'
  if not about.byte_fallback:
    return 'it has no byte pieces, which llama.cpp falls back on'
  kinds = {piece.type for piece in proto.pieces}
  if UNUSED in kinds:
    return 'it has unused pieces, which llama.cpp would use'
  if USER_DEFINED in kinds:
    return 'it has user-defined symbols, which llama.cpp matches in another order'
  names = {piece.piece for piece in proto.pieces}
  for piece in proto.pieces:  # llama.cpp ignores its type
    if piece.type not in (CONTROL, UNKNOWN, BYTE):
      continue
    x = piece.piece
    for parts in ((x[:i], x[i:]) for i in range(1, len(x))):
      if names.issuperset(parts):
        return f'llama.cpp would join its pieces {parts} to the special {x!r}'
  return ''


# llama.cpp's names of pre-tokenizers, by the regular expression of a
# tokenizer.json, and whether a word that is a token is never split.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
QWEN2 = ranks.WORDS.replace(r'\p{N}{1,3}', r'\p{N}')
WORDS = {
  ('', False): 'gpt-2',
  (GPT2 + r'|\s+', False): 'gpt-2',
  (ranks.WORDS, True): 'llama-bpe',
  (ranks.WORDS, False): 'dbrx',
  (QWEN2, False): 'qwen2',
}


def _unfit_json(tokenizer) -> str:
  import tokenizers as library

  about = json.loads(tokenizer.files[tokens.JSON])
  model = about['model']
  if model.get('type', 'BPE') != 'BPE' or model.get('byte_fallback'):
    return 'llama.cpp supports only byte-level BPE of a tokenizer.json'
  for field in 'dropout', 'continuing_subword_prefix', 'end_of_word_suffix':
    if model.get(field):
      return f'llama.cpp does not support {field}={model[field]!r}'
  if about.get('normalizer'):
    return 'it normalizes texts, which llama.cpp does not'
  if _words(about) is None:
    return (
      'its pre-tokenizer is none of the supported ones'
      f' ({", ".join(dict.fromkeys(WORDS.values()))})'
    )
  fast = library.Tokenizer.from_buffer(tokenizer.files[tokens.JSON])
  added = about.get('added_tokens') or ()
  for token in added:
    name = token['content']
    if any(token.get(x) for x in ('single_word', 'lstrip', 'rstrip')):
      return f'its token {name!r} depends on the spaces around it'
    if not token.get('special') and name in NAMED:
      return f'its token {name!r} is not special, but is to llama.cpp'
    whole = model.get('ignore_merges') and name not in model['vocab']
    if whole and len(fast.pre_tokenizer.pre_tokenize_str(name)) == 1:
      return f'llama.cpp would find its token {name!r} in plain text'
  overlap = _overlap([token['content'] for token in added])
  if overlap:
    return f'its tokens {" and ".join(overlap)} may overlap in a text'
  letter, whole = special_tokens.of_a_letter(tokenizer)
  if whole not in (letter, [tokenizer.bos, *letter]):
    return f'it encodes x as {whole}, not as {letter} or BOS and {letter}'
  return ''


# Names of tokens that llama.cpp treats as special in any file.
NAMED = frozenset(
  (
    '</s> <eos> <EOT> _<EOT> [EOS] [EOT] [PAD] <PAD> <PRE> <SUF> <MID> <REPO>'
    ' <end_of_turn> <end_of_utterance> <turn|> <|endoftext|> <|end_of_text|>'
    ' <|end|> <|eot_id|> <|eom_id|> <|im_end|> <|return|> <|call|> <|calls|>'
    ' <|flush|> <|start|> <|message|> <|channel|> <|constrain|> <|tool_response>'
    ' <|prefix|> <|suffix|> <|middle|> <|code_prefix|> <|code_suffix|>'
    ' <|code_middle|> <|fim_prefix|> <|fim_suffix|> <|fim_middle|> <|fim_pad|>'
    ' <|fim_repo|> <|repo_name|> <|file_sep|> <fim-prefix> <fim-suffix>'
    ' <fim-middle> <fim-pad> <fim-repo> <fim_prefix> <fim_suffix> <fim_middle>'
    ' <fim_pad> <reponame> [e~['
  ).split()
) | {'<｜end▁of▁sentence｜>', '<｜fim▁begin｜>', '<｜fim▁end｜>', '<｜fim▁hole｜>'}


def _overlap(contents: list[str]) -> tuple[str, str] | None:
  """Returns two tokens of which one may start within the other: programs differ in
  which of them they match first."""
  ends = {(x[i:]): x for x in contents for i in range(1, len(x))}
  for x in contents:
    for i in range(1, len(x)):
      if x[:i] in ends:
        return repr(ends[x[:i]]), repr(x)
  return None


def _words(about: dict) -> str | None:
  """Returns llama.cpp's name for the pre-tokenizer of a tokenizer.json, or None."""
  before = about.get('pre_tokenizer') or {}
  steps = before.get('pretokenizers', [before]) or [{}]
  *splits, level = steps
  if level.get('type') != 'ByteLevel' or level.get('add_prefix_space', True):
    return None
  expression = ''
  if splits:
    (split,) = splits if len(splits) == 1 else (None,)
    if not split or split.get('type') != 'Split' or split.get('invert'):
      return None
    if split.get('behavior') != 'Isolated' or level.get('use_regex', True):
      return None
    expression = split['pattern'].get('Regex', None)
  elif not level.get('use_regex', True):
    return None
  whole = bool(about['model'].get('ignore_merges'))
  return WORDS.get((expression, whole))


def vocabulary(tokenizer, cfg: schema.CommandConfig) -> dict:
  """Returns the metadata of a tokenizer that passed `check`, or of None; rows of the
  model without a token become unused tokens."""
  if tokenizer is None:
    return {'tokenizer.ggml.model': 'none'}
  if tokenizers.PIECES in tokenizer.files:
    found = _of_pieces(tokenizer)
  else:
    found = _of_json(tokenizer)
  names = found['tokens']
  names += [''] * (cfg.model.vocab_size - len(names))
  taken = set(names)
  for i, name in enumerate(names):
    if not name:  # ids without a token; names must be unique
      free = f'[unused {i}]'
      while free in taken:
        free += '_'
      names[i] = free
      taken.add(free)
  more = len(names) - len(found['token_type'])
  found['token_type'] += [UNUSED] * more
  if 'scores' in found:
    found['scores'] += [0.0] * more
  return {f'tokenizer.ggml.{key}': value for key, value in found.items()} | {
    'tokenizer.ggml.bos_token_id': tokenizer.bos,
    'tokenizer.ggml.eos_token_id': tokenizer.eos,
    'tokenizer.ggml.add_bos_token': special_tokens.begins(tokenizer),
    'tokenizer.ggml.add_eos_token': False,
    **{
      f'tokenizer.ggml.{key}_token_id': token
      for key, token in zip(ENDS, tokenizer.more_eos, strict=False)
    },
  }


def _of_pieces(tokenizer) -> dict:
  proto = tokens.model_proto(tokenizer.files[tokenizers.PIECES])
  pieces = proto.pieces
  return {
    'model': 'llama',
    'pre': 'default',
    'tokens': [piece.piece for piece in pieces],
    'scores': [float(piece.score) for piece in pieces],
    'token_type': (kinds := [int(piece.type) for piece in pieces]),
    'unknown_token_id': kinds.index(UNKNOWN),
    'add_space_prefix': proto.normalizer_spec.add_dummy_prefix,
  }


def _of_json(tokenizer) -> dict:
  about = json.loads(tokenizer.files[tokens.JSON])
  model = about['model']
  found = [''] * tokenizer.vocab_size
  kinds = [UNUSED] * len(found)
  for token, i in model['vocab'].items():
    found[i], kinds[i] = token, NORMAL
  for added in about.get('added_tokens') or ():
    i = added['id']
    found[i] = added['content']
    kinds[i] = CONTROL if added.get('special') else USER_DEFINED
  merges = [merge if isinstance(merge, str) else ' '.join(merge) for merge in model['merges']]
  return {
    'model': 'gpt2',
    'pre': _words(about),
    'tokens': found,
    'token_type': kinds,
    # llama.cpp rejects an empty list; this merge has no effect.
    'merges': merges or ['\u0120 \u0120'],
  }
