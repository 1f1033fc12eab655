"""Small chat models' tokenizers, with templates of the forms that are published."""

import json

import tokenizers as library

CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# Its assistant's text and end token are marked; tools come before the first message.
MARKED = """\
{% if tools %}{{ '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}
{% for message in messages %}
{% if message.role == 'assistant' %}
{{ '<|im_start|>assistant\\n' }}{% generation %}{% if message.reasoning_content %}
{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}
{{ message.content | trim }}{{ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{% elif message.role == 'stop' %}{% break %}
{% else %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
# As Gemma's: a begin token, roles that alternate, another name for the assistant.
TURNS = """\
{{ bos_token }}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant') }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""
# As Qwen3's: reasoning stays in the last turn only.
FORGETS = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if loop.last and message.role == 'assistant' %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
TEMPLATES = dict(chatml=CHATML, marked=MARKED, turns=TURNS, forgets=FORGETS)

SPECIAL = '<|endoftext|> <|im_start|> <|im_end|> <bos> <start_of_turn> <end_of_turn>'.split()
TEXTS = ['user assistant system model\n', 'What is one and one? Two, as one and one are two.'] * 4


def write(folder, template: str | None, **about) -> str:
  """Writes tokenizer.json, tokenizer_config.json and the template; returns the name."""
  fast = library.Tokenizer(library.models.BPE())
  fast.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
  fast.decoder = library.decoders.ByteLevel()
  trainer = library.trainers.BpeTrainer(
    vocab_size=330,
    special_tokens=SPECIAL,
    initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  fast.train_from_iterator(TEXTS, trainer)
  fast.add_tokens(['<think>', '</think>'])  # as in published models: not special
  folder.mkdir(parents=True, exist_ok=True)
  fast.save(str(folder / 'tokenizer.json'))
  ends = dict(bos_token='<bos>', eos_token='<|im_end|>', tokenizer_class='PreTrainedTokenizerFast')
  (folder / 'tokenizer_config.json').write_text(json.dumps(ends | about))
  if template is not None:
    (folder / 'chat_template.jinja').write_text(template)
  return f'hf:{folder}/tokenizer.json'


def turn(role: str, content: str, **more) -> dict:
  return dict(role=role, content=content, **more)


CONVERSATIONS = [
  [turn('user', 'What is one and one?'), turn('assistant', 'Two.')],
  [
    turn('user', 'one'),
    turn('assistant', '  two, 😀\n\n', name=None),
    turn('user', ' and\none?\n'),
    turn('assistant', 'Two, as one and one are two. 日本'),
  ],
]
