"""Converts tokenizers to files for transformers, with the same ids."""

import json
import os
import re

from mtp_jax.data import ranks, tokenizers

MODEL = 'tokenizer.model'  # Llama's name for a SentencePiece model, and Llama 3's
# for a file of base64 tokens
JSON = 'tokenizer.json'


def files_of(tokenizer: tokenizers.Tokenizer) -> dict[str, bytes]:
  """Returns the tokenizer files of an export, by name.

  A tokenizer.json is exported unchanged, with the files next to it, whether or
  not it prepends BOS to a text, as documents here have it. For bytes and
  SentencePiece models a tokenizer.json is built that does, and that encodes
  special tokens in a text as text, as here. A SentencePiece model with
  user-defined symbols, or without space markers, has only MODEL. (The built one
  decodes a literal space marker in a text as a space.)
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
    add_prefix_space=prefix,  # llama.cpp prepends a space by default
  )
  files[tokenizers.ENDS] = json.dumps(about, indent=2).encode()
  return files


def warning(kind: str, form: str, tokenizer: tokenizers.Tokenizer | None) -> str:
  """Returns a line where AutoTokenizer of transformers ignores the class that the files
  state; '' elsewhere. kind: model_type."""
  if (
    kind != 'qwen2' or form not in ('hf', 'medusa') or tokenizer is None or JSON in tokenizer.files
  ):
    return ''
  return (
    "transformers' AutoTokenizer reads any tokenizer of a qwen2 as Qwen's own; this one needs"
    ' PreTrainedTokenizerFast.from_pretrained'
  )


def _of_bytes():
  """Builds a tokenizer of 256 bytes without merges, and BOS and EOS."""
  import tokenizers as library
  from tokenizers import decoders, models, pre_tokenizers

  # The characters of bytes in a byte-level vocabulary, in order.
  letters = ranks.byte_letters()
  fast = library.Tokenizer(models.BPE({letter: b for b, letter in enumerate(letters)}, []))
  fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  fast.decoder = decoders.ByteLevel()
  fast.add_special_tokens(['<bos>', '<eos>'])
  return fast


# Piece types in SentencePiece's ModelProto.
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
NEVER = -1e6  # the score of pieces that must not be used


def model_proto(model: bytes):
  """Parses a SentencePiece model: pieces, and how they are used."""
  from sentencepiece import sentencepiece_model_pb2

  proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
  proto.ParseFromString(model)
  return proto


def _of_pieces(model: bytes, tokenizer):
  """Returns (a fast tokenizer with the ids of a SentencePiece model, BOS, EOS,
  whether the model prepends a space to a text); None for the first if the model
  has pieces of other types.

  transformers' own conversion ignores the whitespace rules of a model.
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
    pattern = _split_pattern(names, kinds)
    if pattern:
      fast.pre_tokenizer = pre_tokenizers.Split(library.Regex(pattern), 'isolated')
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


def _split_pattern(names, kinds) -> str:
  """Returns a regular expression that splits special pieces, as '</s>' in a text,
  for a Unigram model. An unknown letter costs more than NEVER, so that it would
  use the piece; no other piece has that letter, hence none spans the split."""
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
  """Returns the merges of two pieces to a third one, by descending score."""
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
  """Loads the tokenizer of a folder; None if there is none.

  ours: its name in mtp_jax.json, '' for none; None if there is no such file.
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
  """Whether the first line of a file is a base64 token and a number."""
  with open(path, 'rb') as file:
    return bool(re.fullmatch(rb'[A-Za-z0-9+/]+=* [0-9]+\s*', file.readline(999)))


def fitted(tokenizer: tokenizers.Tokenizer, rows: int) -> tuple[tokenizers.Tokenizer, list[str]]:
  """Returns (the tokenizer without added tokens beyond the rows of the model, their
  names); unchanged if other tokens are out of range too."""
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
