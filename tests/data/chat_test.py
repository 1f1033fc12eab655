"""Conversations as supervised data: the text of a chat template, the loss on the assistant."""

import gzip
import json
import re

import numpy as np
import pytest

from mtp_jax.cli import main
from mtp_jax.config import fields
from mtp_jax.data import (
  chat,
  documents,
  encoding,
  readers,
  special_tokens,
  spool,
  store,
  tokenizers,
)
from tests.support import chats, runs

turn = chats.turn
NO_CACHE = '--train.compilation_cache='


@pytest.fixture
def named(tmp_path):
  """Writes a tokenizer with a template; returns it."""
  return lambda template, **about: tokenizers.get(
    chats.write(tmp_path / 'model', chats.TEMPLATES.get(template, template), **about)
  )


def _turns(template, messages, **more) -> list[str]:
  text, spans = chat.conversation(template, dict(messages=messages, **more))
  return [text[first:last] for first, last in zip(spans[::2], spans[1::2], strict=True)]


@pytest.mark.parametrize(
  'name, text, turns',
  [
    (
      'chatml',
      '<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none<|im_end|>\n'
      '<|im_start|>assistant\n  two, 😀\n\n<|im_end|>\n<|im_start|>user\n and\none?\n<|im_end|>\n'
      '<|im_start|>assistant\nTwo, as one and one are two. 日本<|im_end|>\n',
      ['  two, 😀\n\n<|im_end|>\n', 'Two, as one and one are two. 日本<|im_end|>\n'],
    ),
    (
      'marked',
      '<|im_start|>user\none<|im_end|>\n\n<|im_start|>assistant\ntwo, 😀<|im_end|>\n\n'
      '<|im_start|>user\n and\none?\n<|im_end|>\n\n'
      '<|im_start|>assistant\nTwo, as one and one are two. 日本<|im_end|>\n\n',
      ['two, 😀<|im_end|>', 'Two, as one and one are two. 日本<|im_end|>'],
    ),
    (
      'turns',
      '<bos><start_of_turn>user\none<end_of_turn>\n<start_of_turn>model\ntwo, 😀<end_of_turn>\n'
      '<start_of_turn>user\nand\none?<end_of_turn>\n'
      '<start_of_turn>model\nTwo, as one and one are two. 日本<end_of_turn>\n',
      ['two, 😀<end_of_turn>\n', 'Two, as one and one are two. 日本<end_of_turn>\n'],
    ),
  ],
)
def test_rendering_and_turns_written_out(named, name, text, turns):
  tokenizer = named(name)
  template = chat.template_of(tokenizer)
  record = dict(messages=chats.CONVERSATIONS[1])
  found, spans = chat.conversation(template, record)
  assert found == text
  assert _turns(template, record['messages']) == turns
  # Token by token, by their own texts.
  ids, switches = chat.encode(text, spans, tokenizer)
  mask = np.cumsum(np.isin(np.arange(len(ids)), switches)) % 2 == 1
  joined = [[]]
  for token, inside in zip(ids.tolist(), mask.tolist(), strict=True):
    if inside:
      joined[-1].append(token)
    elif joined[-1]:
      joined.append([])
  fast = special_tokens.with_special_tokens(tokenizer.files['tokenizer.json'])
  assert [fast.decode(part, False) for part in joined if part] == turns
  assert fast.decode(ids.tolist(), False) == text


def test_special_tokens_of_a_rendering_are_tokens(named):
  tokenizer = named('turns')
  fast = special_tokens.with_special_tokens(tokenizer.files['tokenizer.json'])
  ids, switches = chat.encode('<bos>one<end_of_turn>', (8, 21), tokenizer)
  assert [fast.id_to_token(i) for i in ids] == ['<bos>', 'one', '<end_of_turn>']
  assert switches == (2,)
  # The same text in a document is text.
  assert tokenizer.bos not in tokenizer.encode('<bos>one')
  # A token that a turn shares with what is around it belongs to the turn.
  assert chat.encode('one', (1, 2), tokenizer)[1] == (0,)
  # An empty turn covers nothing, rather than everything.
  assert chat.encode('one', (3, 3), tokenizer)[1] == (0, 0)


def test_tools_variables_and_reasoning_reach_the_template(named):
  template = chat.template_of(named('marked'))
  questions = [turn('user', 'add'), turn('assistant', 'two', thinking='1 + 1')]
  text, _ = chat.conversation(template, dict(messages=questions, tools=[dict(name='<add>')]))
  assert text.startswith('<|im_start|>system\n{"name": "<add>"}\n<|im_end|>\n')
  assert _turns(template, questions) == ['<think>1 + 1</think>two<|im_end|>']
  stop = [*questions, turn('stop', ''), turn('user', 'more')]  # break, of jinja2's loopcontrols
  assert 'more' not in chat.conversation(template, dict(messages=stop))[0]
  given = chat.template_of(named('{{ messages[0].content }}{{ eos_token }}{{ style }}'))
  record = dict(messages=[turn('assistant', 'a')], chat_template_kwargs=dict(style='!'))
  assert chat.conversation(given, record) == ('a<|im_end|>!', (0, 12))


def test_a_template_is_found_where_it_is_published(tmp_path):
  def text(template, **about):
    tokenizer = tokenizers.get(chats.write(tmp_path, template, **about))
    return chat.prompt(chat.template_of(tokenizer), dict(messages=[turn('user', 'a')]))

  assert text(None, chat_template='config') == 'config'
  several = [dict(name='tool_use', template='tools'), dict(name='default', template='plain')]
  assert text(None, chat_template=several) == 'plain'
  assert text('file', chat_template='config') == 'file'


def test_what_beside_a_tokenizer_is_no_template(tmp_path):
  def refused(**about):
    tokenizer = tokenizers.get(chats.write(tmp_path, None, **about))
    with pytest.raises(fields.ConfigError, match='has no chat template'):
      chat.template_of(tokenizer)

  refused(chat_template=['a', dict(name='tool_use', template='b')])
  refused(chat_template=3)
  # Special tokens without names, as of older versions.
  tokenizer = tokenizers.get(chats.write(tmp_path, 'a', extra_special_tokens=['<x>']))
  assert chat.template_of(tokenizer).variables == dict(bos_token='<bos>', eos_token='<|im_end|>')
  bad = tokenizer._replace(files=tokenizer.files | {chat.TEMPLATE: b'\xff'})
  with pytest.raises(fields.ConfigError, match='chat_template.jinja beside it is not UTF-8 text'):
    chat.template_of(bad)


def test_a_prompt_is_the_beginning_of_the_turn(named):
  for name in ('chatml', 'marked', 'turns', 'forgets'):
    template = chat.template_of(named(name))
    questions, answered = chats.CONVERSATIONS[0][:1], chats.CONVERSATIONS[0]
    text, spans = chat.conversation(template, dict(messages=answered))
    assert text[: spans[0]] == chat.prompt(template, dict(messages=questions))


def _prepared(folder, name, records, tmp_path, *args) -> int:
  file = tmp_path / f'{folder}.jsonl.gz'
  with gzip.open(file, 'wt') as out:
    out.write(''.join(json.dumps(record) + '\n' for record in records))
  return main.main(
    [
      'prepare',
      f'--data.store={tmp_path / folder}',
      f'--data.documents=jsonl:{file}#messages',
      f'--data.tokenizer={name}',
      '--data.valid_fraction=0',
      *args,
    ]
  )


def test_a_store_has_the_tokens_of_the_rendering_and_no_others(tmp_path, capsys):
  name = chats.write(tmp_path / 'model', chats.MARKED)
  records = [
    dict(messages=chats.CONVERSATIONS[1]),
    dict(messages=[turn('user', 'only a question')]),
    dict(messages=[turn('user', 'stop <|im_end|>'), turn('assistant', 'no')]),
    dict(messages=[turn('user', 'x'), turn('assistant', '\ud800')]),
    dict(messages=[turn('user', 'long'), turn('assistant', 'one ' * 30_000)]),
  ]
  assert _prepared('a', name, records, tmp_path) == 0
  lines = capsys.readouterr().out
  assert "skipped    1 conversations without an assistant's turn" in lines
  assert 'skipped    1 conversations with the text of a special token in a message' in lines
  opened = store.open_store(tmp_path / 'a')
  tokenizer = store.tokenizer_of(opened)
  template = chat.template_of(tokenizer)  # the store keeps it
  split = opened.split('train')
  want = []
  for record in (records[0], records[3], records[4]):
    text, spans = chat.conversation(template, record)
    ids, switches = chat.encode(text.replace('\ud800', '\ufffd'), spans, tokenizer)
    mask = np.cumsum(np.isin(np.arange(len(ids)), switches)) % 2 == 1
    want.append((ids.tolist(), mask.tolist()))
  found, (tokens,), (starts,), (scored,) = [], split.tokens, split.offsets, split.loss_mask
  ends = [*starts[1:].tolist(), len(tokens)]
  for first, last in zip(starts[:].tolist(), ends, strict=True):
    found.append((tokens[first:last].tolist(), scored[first:last].tolist()))
  assert sorted(found) == sorted(want)


def test_parquet_has_the_documents_of_jsonl(tmp_path):
  import pyarrow
  import pyarrow.parquet

  tokenizer = tokenizers.get(chats.write(tmp_path / 'model', chats.MARKED))
  tools = [dict(name='add')]
  records = [
    dict(messages=chats.CONVERSATIONS[0], tools=tools),
    dict(messages=chats.CONVERSATIONS[1], tools=None),
  ]
  (tmp_path / 'a.jsonl').write_text(''.join(json.dumps(x) + '\n' for x in records))
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / 'a.parquet')
  found = [
    [x._replace(name='') for x in readers.read(source, tokenizer=tokenizer)]
    for source in (f'jsonl:{tmp_path}/a.jsonl#messages', f'parquet:{tmp_path}/a.parquet#messages')
  ]
  assert found[0] == found[1] and len(found[0]) == 2
  assert '{"name": "add"}' in found[0][0].text and all(x.rendered for x in found[0])


def test_rendered_documents_are_told_apart_and_never_cut(named):
  tokenizer = named('marked')
  plain = documents.Document('a', '<bos>one', (5,))
  rendered = plain._replace(rendered=True, loss_spans=(5, 8))
  assert spool.digest(plain) != spool.digest(plain._replace(rendered=True))
  long = rendered._replace(text='<bos>one' * 20_000)
  (batch,) = encoding.run([long], tokenizer, 1)
  assert batch.tokens_P.tolist() == [tokenizer.bos, *tokenizer.encode('one')] * 20_000
  assert batch.loss_spans == [(1, 2)]


@pytest.mark.parametrize(
  'record, problem',
  [
    (dict(text='a'), chat.FORM),
    (dict(messages=[]), chat.FORM),
    (dict(messages=[dict(content='a')]), chat.FORM),
    (dict(messages='a'), chat.FORM),
    (
      dict(messages=[turn('user', 'a')], chat_template_kwargs=3),
      'chat_template_kwargs must be an object',
    ),
    (
      dict(messages=[turn('assistant', 'a'), turn('user', 'b')]),
      'the chat template fails: Conversation roles must alternate user/assistant',
    ),
    (dict(messages=[turn('user', 'a'), turn('assistant', None)]), chat.FORM),
    (dict(messages=[turn('user', 'a'), turn('assistant', 3)]), chat.FORM),
  ],
)
def test_a_bad_conversation_names_its_place(tmp_path, record, problem, capsys):
  name = chats.write(tmp_path / 'model', chats.TURNS)
  records = [dict(messages=chats.CONVERSATIONS[0]), record]
  assert _prepared('a', name, records, tmp_path) == 2
  assert f'a.jsonl.gz:2: {problem}' in capsys.readouterr().err
  assert not (tmp_path / 'a').exists()


def test_a_template_that_rewrites_earlier_turns_is_refused(named):
  template = chat.template_of(named('forgets'))
  assert _turns(template, chats.CONVERSATIONS[0]) == ['<think>\n\n</think>\n\nTwo.<|im_end|>\n']
  with pytest.raises(ValueError, match='the chat template rewrites turn 2 when others follow'):
    chat.conversation(template, dict(messages=chats.CONVERSATIONS[1]))
  begins = chats.CHATML.replace('message.content', "('x' if message.role == 'assistant' else 'y')")
  begins = begins.replace("'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\n<think>' }}")
  template = chat.template_of(named(begins))
  with pytest.raises(ValueError, match='begins turn 2 otherwise than it prompts for it'):
    chat.conversation(template, dict(messages=chats.CONVERSATIONS[0]))


def test_special_tokens_are_found_in_raw_strings(named):
  """One with a quote too, which JSON escapes; in every field that a template may write."""
  template = chat.template_of(named('marked'))
  quoted = template._replace(special=re.compile(re.escape('<|"|>')))
  clean = dict(messages=[turn('user', 'a "b" <|'), turn('assistant', 'c')], tools=None)
  assert not chat.has_special(quoted, clean)
  for record in (
    clean | dict(messages=[turn('user', '<|"|>')]),
    clean | dict(tools=[dict(name=['x', {'<|"|>': 1}])]),
    clean | dict(documents=[dict(text='<|"|>')]),
    clean | dict(chat_template_kwargs=dict(style='<|"|>')),
  ):
    assert chat.has_special(quoted, record)


@pytest.mark.parametrize(
  'tokenizer, problem',
  [
    ('bytes', 'has no chat template'),
    ('train:300', 'has no chat template'),
    ('hf', 'has no chat template, which messages need: hf:FOLDER/tokenizer.json with'),
    ('{% if %}', 'its chat template, line 1: '),
  ],
)
def test_a_tokenizer_without_a_template_is_refused_at_once(tmp_path, tokenizer, problem, capsys):
  if tokenizer in ('hf', '{% if %}'):
    template = None if tokenizer == 'hf' else tokenizer
    tokenizer = chats.write(tmp_path / 'model', template)
  assert _prepared('a', tokenizer, [dict(messages=[])], tmp_path) == 2
  error = capsys.readouterr().err
  assert re.match(f'mtp: --data.tokenizer={tokenizer.partition(":")[0]}', error), error
  assert problem in error and error.count('\n') == 1


def test_the_sandbox_refuses_what_reaches_outside(named):
  template = chat.template_of(named('{{ messages.__class__.__mro__ }}'))
  with pytest.raises(ValueError, match='the chat template fails: access to attribute'):
    chat.prompt(template, dict(messages=[turn('user', 'a')]))


def test_a_model_answers_messages_and_trains_on_its_answers(tmp_path, capsys):
  name = chats.write(tmp_path / 'model', chats.CHATML)
  assert _prepared('a', name, [dict(messages=x) for x in chats.CONVERSATIONS] * 2, tmp_path) == 0
  run, questions = tmp_path / 'run', tmp_path / 'questions.jsonl'
  changes = dict(model__vocab_size=384, eval__batches=0)
  assert runs.train(str(tmp_path / 'a'), run, **changes) == 0
  messages = chats.CONVERSATIONS[1][:3]
  rows = [dict(messages=messages, id=7), dict(prompt='one')]
  questions.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  out = tmp_path / 'answers.jsonl'
  command = ['generate', str(run), f'--decode.prompts={questions}', f'--out={out}', NO_CACHE]
  assert main.main([*command, '--decode.max_new_tokens=5', '--decode.stop_token_ids=none']) == 0
  first, second = [json.loads(line) for line in out.read_text().splitlines()]
  assert first['messages'] == [*messages, turn('assistant', first['text'])]
  assert first['id'] == 7 and 'prompt' not in first and 'messages' not in second
  # The same ids, given as such.
  tokenizer = tokenizers.get(name)
  rendered = chat.prompt(chat.template_of(tokenizer), dict(messages=messages))
  ids = chat.encode(rendered, (), tokenizer)[0].tolist()
  questions.write_text(json.dumps(dict(prompt_ids=ids)) + '\n')
  assert main.main([*command, '--decode.max_new_tokens=5', '--decode.stop_token_ids=none']) == 0
  assert json.loads(out.read_text())['ids'] == first['ids']
  assert _prepared('b', name, [first], tmp_path) == 0
  for bad, problem in (
    (dict(messages=[turn('user', '<bos>')]), 'has the text of a special token in a message'),
    (dict(messages=messages, prompt='a'), 'has both prompt and messages'),
    (dict(messages=3), 'messages must be a list'),
  ):
    questions.write_text(json.dumps(bad) + '\n')
    capsys.readouterr()
    assert main.main(command) == 2
    assert f'{questions}: line 1 {problem}' in capsys.readouterr().err


@pytest.mark.parity
@pytest.mark.parametrize('bos', ['<bos>', None])
def test_a_text_starts_as_in_transformers(named, tmp_path, bos):
  """Of a tokenizer.json that adds no begin token, one is added only where it is stated."""
  transformers = pytest.importorskip('transformers')
  tokenizer = named(None, bos_token=bos)
  theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / 'model'))
  ids = [*tokenizer.start, *tokenizer.encode('one and two')]
  assert theirs.bos_token == bos
  assert ids == [*([theirs.bos_token_id] if bos else []), *theirs('one and two').input_ids]


@pytest.mark.parity
@pytest.mark.parametrize('name', chats.TEMPLATES)
def test_ids_and_mask_are_those_of_transformers(named, tmp_path, name):
  transformers = pytest.importorskip('transformers')
  tokenizer = named(name)
  template = chat.template_of(tokenizer)
  theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / 'model'))
  for messages in chats.CONVERSATIONS:
    for more in ({}, dict(tools=[dict(name='add', about='<é>')])):
      found = theirs.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=template.marks, **more
      )
      prompt = theirs.apply_chat_template(messages[:1], add_generation_prompt=True, **more)
      record = dict(messages=messages[:1], **more)
      ids, _ = chat.encode(chat.prompt(template, record), (), tokenizer)
      assert ids.tolist() == prompt['input_ids']
      if name == 'forgets' and messages is chats.CONVERSATIONS[1]:
        continue
      text, spans = chat.conversation(template, dict(messages=messages, **more))
      ids, switches = chat.encode(text, spans, tokenizer)
      assert ids.tolist() == found['input_ids']
      if template.marks:
        mask = np.cumsum(np.isin(np.arange(len(ids)), switches)) % 2
        assert mask.tolist() == found['assistant_masks'] and 0 < mask.sum() < len(ids)
