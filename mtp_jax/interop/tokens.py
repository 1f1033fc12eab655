"""Tokenizer files that transformers reads, with the same ids. Floor 4.

An export holds tokenizer.json, SentencePiece's tokenizer.model too if it is
one, and in tokenizer/ the files that a run keeps, as they are.
"""

import json
import os
import re

from mtp_jax.data import tokenizers

MODEL = 'tokenizer.model'  # what Llama calls a SentencePiece model
JSON = 'tokenizer.json'
OWN = 'tokenizer'  # folder


def files_of(tokenizer: tokenizers.Tokenizer) -> dict[str, bytes]:
  """The files of an export's folder, by name.

  A text is encoded with the begin token before it, as documents are, and what
  looks like a special token in it is text, as here. A SentencePiece model with
  symbols of its user, which no tokenizer.json can express, has only MODEL.
  """
  files = {
    f'{OWN}/{name}': data for name, data in tokenizer.files.items()
  } | {'tokenizer_config.json': b''}  # fmt: skip
  bos, eos = '<bos>', '<eos>'
  if tokenizers.PIECES in tokenizer.files:
    pieces = tokenizer.files[tokenizers.PIECES]
    files[MODEL] = pieces
    fast, bos, eos = _of_pieces(pieces, tokenizer)
  elif not tokenizer.files:
    fast = _of_bytes()
  else:
    import tokenizers as library

    fast = library.Tokenizer.from_buffer(tokenizer.files[JSON])
    fast.no_padding()
    fast.no_truncation()
    bos, eos = (fast.id_to_token(i) for i in (tokenizer.bos, tokenizer.eos))
  if fast:
    from tokenizers import processors

    fast.post_processor = processors.TemplateProcessing(
      single=f'{bos} $A', pair=f'{bos} $A $B',
      special_tokens=[(bos, tokenizer.bos)],
    )  # fmt: skip
    files[JSON] = fast.to_str().encode()
  about = dict(
    tokenizer_class='PreTrainedTokenizerFast' if fast else 'LlamaTokenizer',
    bos_token=bos, eos_token=eos, add_bos_token=True, add_eos_token=False,
    split_special_tokens=True, clean_up_tokenization_spaces=False,
    model_max_length=10**30,
  )  # fmt: skip
  files['tokenizer_config.json'] = json.dumps(about, indent=2).encode()
  return files


def _of_bytes():
  """256 bytes without merges, and the two ends."""
  import tokenizers as library
  from tokenizers import decoders, models, pre_tokenizers

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
  return fast


def _byte_letters() -> list[str]:
  """GPT-2's: a printable Latin-1 byte is itself, the n-th other one 256 + n."""
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [b for b in range(256) if b not in plain]
  return [chr(b if b in plain else 256 + others.index(b)) for b in range(256)]


# Kinds of a piece in SentencePiece's ModelProto.
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


def _of_pieces(model: bytes, tokenizer):
  """(a fast tokenizer with the ids of a SentencePiece model, BOS, EOS); None
  for the first if the model has pieces of other kinds.

  transformers' own conversion leaves out what a model does with white space.
  """
  import tokenizers as library
  from sentencepiece import sentencepiece_model_pb2
  from tokenizers import decoders, models, normalizers, pre_tokenizers

  proto = sentencepiece_model_pb2.ModelProto()
  proto.ParseFromString(model)
  kinds = [piece.type for piece in proto.pieces]
  names = [piece.piece for piece in proto.pieces]
  bos, eos = names[tokenizer.bos], names[tokenizer.eos]
  spec, about = proto.normalizer_spec, proto.trainer_spec
  plain = {NORMAL, UNKNOWN, CONTROL, BYTE}.issuperset(kinds)
  if not plain or about.treat_whitespace_as_suffix:
    return None, bos, eos
  if about.model_type == about.UNIGRAM:
    scores = [(piece.piece, piece.score) for piece in proto.pieces]
    fast = library.Tokenizer(
      models.Unigram(scores, kinds.index(UNKNOWN), about.byte_fallback)
    )
    # It would find '</s>' in a text, so such a thing is cut after its '<'.
    odd = [n for n, kind in zip(names, kinds, strict=True) if kind != NORMAL]
    cut = '|'.join(f'{re.escape(n[0])}(?={re.escape(n[1:])})' for n in odd)
    fast.pre_tokenizer = pre_tokenizers.Split(library.Regex(cut), 'isolated')
  elif about.model_type == about.BPE:
    fast = library.Tokenizer(
      models.BPE(
        {name: i for i, name in enumerate(names)}, _merges(proto.pieces),
        unk_token=names[kinds.index(UNKNOWN)], fuse_unk=True,
        byte_fallback=about.byte_fallback,
      )
    )  # fmt: skip
  else:
    return None, bos, eos
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
  fast.decoder = decoders.Sequence([
    decoders.Replace(tokenizers.SPACE, ' '), decoders.ByteFallback(),
    decoders.Fuse(), *last,
  ])  # fmt: skip
  fast.add_special_tokens(
    [name for name, kind in zip(names, kinds, strict=True) if kind == CONTROL]
  )
  return fast, bos, eos


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

  ours: the name in mtp_jax.json, if we wrote the folder.
  """
  if ours == 'bytes':
    return tokenizers.get('bytes')
  own = os.path.join(folder, OWN)
  if ours and os.path.isdir(own):
    return tokenizers.load(own)
  for kind, name in (('sentencepiece', MODEL), ('hf', JSON)):
    path = os.path.join(folder, name)
    if os.path.exists(path):
      return tokenizers.get(f'{kind}:{path}')
  return None
