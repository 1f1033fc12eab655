"""Tokenizer files that transformers reads, with the same ids. Floor 4."""

import json
import os
import re

from mtp_jax.data import ranks, tokenizers

MODEL = 'tokenizer.model'  # what Llama calls a SentencePiece model, or Llama 3
# its file of tokens in base64
JSON = 'tokenizer.json'


def files_of(tokenizer: tokenizers.Tokenizer) -> dict[str, bytes]:
  """The files of an export's folder, by name.

  A tokenizer.json leaves as it came, with what lay beside it: whether it puts a
  begin token before a text, as documents here have it, is its own affair. For
  bytes and SentencePiece models one is made, which does, and to which what
  looks like a special token in a text is text, as here. A SentencePiece model
  with symbols of its user, or without marks of spaces, has only MODEL. (In a
  text, the mark itself is a space to the one that is made.)
  """
  files = dict(tokenizer.files)
  if JSON in files:
    about = dict(
      tokenizer_class='PreTrainedTokenizerFast',
      bos_token=tokenizer.piece(tokenizer.bos),
      eos_token=tokenizer.piece(tokenizer.eos),
    )
    made = {tokenizers.ENDS: json.dumps(about, indent=2).encode()}
    return made | files
  bos, eos = '<bos>', '<eos>'
  if tokenizers.PIECES in files:
    pieces = files.pop(tokenizers.PIECES)
    files[MODEL] = pieces
    fast, bos, eos, prefix = _of_pieces(pieces, tokenizer)
  else:
    fast, prefix = _of_bytes(), False
  if fast:
    from tokenizers import processors

    fast.post_processor = processors.TemplateProcessing(
      single=f'{bos} $A', pair=f'{bos} $A $B', special_tokens=[(bos, tokenizer.bos)]
    )
    files[JSON] = fast.to_str().encode()
  about = dict(
    tokenizer_class='PreTrainedTokenizerFast' if fast else 'LlamaTokenizer',
    bos_token=bos,
    eos_token=eos,
    add_bos_token=True,
    add_eos_token=False,
    split_special_tokens=True,
    clean_up_tokenization_spaces=False,
    model_max_length=10**30,
    add_prefix_space=prefix,  # llama.cpp puts a space before, unless told
  )
  files[tokenizers.ENDS] = json.dumps(about, indent=2).encode()
  return files


def _of_bytes():
  """256 bytes without merges, and the two ends."""
  import tokenizers as library
  from tokenizers import decoders, models, pre_tokenizers

  # The letters that a byte-level vocabulary writes for bytes, in their order.
  letters = ranks.byte_letters()
  fast = library.Tokenizer(models.BPE({letter: b for b, letter in enumerate(letters)}, []))
  fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  fast.decoder = decoders.ByteLevel()
  fast.add_special_tokens(['<bos>', '<eos>'])
  return fast


# Kinds of a piece in SentencePiece's ModelProto.
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
NEVER = -1e6  # the score of what no text may be cut into


def model_proto(model: bytes):
  """What stands in a SentencePiece model: pieces, and how they are used."""
  from sentencepiece import sentencepiece_model_pb2

  proto = sentencepiece_model_pb2.ModelProto()
  proto.ParseFromString(model)
  return proto


def _of_pieces(model: bytes, tokenizer):
  """(a fast tokenizer with the ids of a SentencePiece model, BOS, EOS, whether
  the model puts a space before a text); None for the first if the model has
  pieces of other kinds.

  transformers' own conversion leaves out what a model does with white space.
  """
  import tokenizers as library
  from tokenizers import decoders, models, normalizers, pre_tokenizers

  proto = model_proto(model)
  kinds = [piece.type for piece in proto.pieces]
  names = [piece.piece for piece in proto.pieces]
  bos, eos = names[tokenizer.bos], names[tokenizer.eos]
  spec, about = proto.normalizer_spec, proto.trainer_spec
  if (
    not {NORMAL, UNKNOWN, CONTROL, BYTE}.issuperset(kinds)
    or about.treat_whitespace_as_suffix
    or not spec.escape_whitespaces
  ):
    return None, bos, eos, spec.add_dummy_prefix
  if about.model_type == about.UNIGRAM:
    scores = [(p.piece, p.score if p.type == NORMAL else NEVER) for p in proto.pieces]
    fast = library.Tokenizer(models.Unigram(scores, kinds.index(UNKNOWN), about.byte_fallback))
    cut = _cuts(names, kinds)
    if cut:
      fast.pre_tokenizer = pre_tokenizers.Split(library.Regex(cut), 'isolated')
  elif about.model_type == about.BPE:
    fast = library.Tokenizer(
      models.BPE(
        {name: i for i, name in enumerate(names)},
        _merges(proto.pieces),
        unk_token=names[kinds.index(UNKNOWN)],
        fuse_unk=True,
        byte_fallback=about.byte_fallback,
      )
    )
  else:
    return None, bos, eos, spec.add_dummy_prefix
  steps = []
  if spec.precompiled_charsmap:
    steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
  if spec.remove_extra_whitespaces:
    steps += [
      normalizers.Replace(library.Regex(' +'), ' '),
      normalizers.Replace(library.Regex('^ | $'), ''),
    ]
  if spec.add_dummy_prefix:
    steps.append(normalizers.Prepend(' '))
  steps.append(normalizers.Replace(' ', tokenizers.SPACE))
  fast.normalizer = normalizers.Sequence(steps)
  last = [decoders.Strip(' ', 1, 0)] if spec.add_dummy_prefix else []
  fast.decoder = decoders.Sequence(
    [decoders.Replace(tokenizers.SPACE, ' '), decoders.ByteFallback(), decoders.Fuse(), *last]
  )
  fast.add_special_tokens(
    [n for n, kind in zip(names, kinds, strict=True) if kind in (CONTROL, UNKNOWN)]
  )
  return fast, bos, eos, spec.add_dummy_prefix


def _cuts(names, kinds) -> str:
  """Where a Unigram model must cut a text that has '</s>' in it, as a regular
  expression. An unknown letter costs it more than NEVER, so it would take the
  piece; no other piece has that letter, hence none reaches over the cut."""
  known = {n for n, kind in zip(names, kinds, strict=True) if kind == NORMAL}
  found = []
  for name, kind in zip(names, kinds, strict=True):
    unknown = [i for i, letter in enumerate(name) if letter not in known]
    if kind == NORMAL or not unknown:
      continue
    before, letter, after = (
      re.escape(x) for x in (name[: unknown[0]], name[unknown[0]], name[unknown[0] + 1 :])
    )
    found.append(f'(?<={before}){letter}(?={after})')
  return '|'.join(found)


def _merges(pieces) -> list[tuple[str, str]]:
  """Of two pieces to a third one, that of the highest score first."""
  score = {p.piece: p.score for p in pieces if p.type == NORMAL}
  found = [
    (whole, whole[:i], whole[i:])
    for whole in score
    for i in range(1, len(whole))
    if whole[:i] in score and whole[i:] in score
  ]
  found.sort(key=lambda m: (-score[m[0]], -score[m[1]], -score[m[2]]))
  return [(left, right) for _, left, right in found]


def read(folder: str, ours: str | None) -> tokenizers.Tokenizer | None:
  """The tokenizer of a folder; None if there is none.

  ours: its name in mtp_jax.json, if we wrote the folder, '' for none.
  """
  if ours is not None and not ours.startswith(('hf', 'sentencepiece')):
    return tokenizers.get('bytes') if ours else None
  kinds = [('hf', JSON), ('sentencepiece', MODEL)]
  if ours and ours.startswith('sentencepiece'):
    kinds.reverse()
  for kind, name in kinds:
    path = os.path.join(folder, name)
    if os.path.exists(path):
      is_ranks = name == MODEL and _is_ranks(path)
      return tokenizers.get(f'{"tiktoken" if is_ranks else kind}:{path}')
  return None


def _is_ranks(path: str) -> bool:
  """Whether a file's first line is a token in base64 and a number."""
  with open(path, 'rb') as file:
    return bool(re.fullmatch(rb'[A-Za-z0-9+/]+=* [0-9]+\s*', file.readline(999)))


def fitted(tokenizer: tokenizers.Tokenizer, rows: int) -> tuple[tokenizers.Tokenizer, list[str]]:
  """(a tokenizer without the added tokens that a model of so many rows has no
  row for, their names). As it is if that is not all that is too much."""
  model = tokenizer.files.get(JSON)
  if model is None or tokenizer.vocab_size <= rows:
    return tokenizer, []
  about = json.loads(model)
  ends = {tokenizer.bos, *tokenizer.stop_ids}
  beyond = [x for x in about['added_tokens'] if x['id'] >= rows]
  if any(x['id'] in ends for x in beyond) or any(
    i >= rows for i in about['model']['vocab'].values()
  ):
    return tokenizer, []
  about['added_tokens'] = [x for x in about['added_tokens'] if x['id'] < rows]
  files = tokenizer.files | {JSON: json.dumps(about, ensure_ascii=False).encode()}
  return (tokenizers.of_files(tokenizer.name, files), [x['content'] for x in beyond])
