"""GSM8K: grade-school math problems, answered with a chain of thought.

Cobbe et al. 2021, arXiv 2110.14168; prompted as in Wei et al. 2022, arXiv
2201.11903: their eight few-shot examples (appendix G, table 20) before each
problem, greedy, exact match of the number that follows "The answer is".
"""

import decimal
import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

from mtp_jax.config import fields, schema
from mtp_jax.data import records
from mtp_jax.evals import intervals, suites
from mtp_jax.evals import subject as subject_lib

STOP = ('Q:', 'Question:')  # the start of a further problem, made up by the model


class Example(NamedTuple):
  """A problem with its worked solution."""

  question: str
  worked: str


class Problem(NamedTuple):
  """A question and its numeric answer."""

  id: int  # index in the file
  question: str
  answer: decimal.Decimal


def check(arg: str, cfg: schema.CommandConfig) -> None:
  """Raises ConfigError unless there are problems, and enough examples."""
  if arg:
    raise fields.ConfigError('eval.tasks', f'gsm8k:{arg}', 'gsm8k takes no argument')
  if cfg.eval.num_fewshot > len(SHOTS):
    raise fields.ConfigError(
      'eval.num_fewshot', cfg.eval.num_fewshot, f'gsm8k has {len(SHOTS)} few-shot examples'
    )
  problems(cfg.eval.data)


def problems(path: str) -> list[Problem]:
  """Reads a file in the official format: question, and answer with `#### 42`."""
  fail = functools.partial(fields.ConfigError, 'eval.data', path)
  if not path:
    raise fail('gsm8k needs its problems, a .jsonl or .jsonl.gz file')
  found = []
  for line, (question, worked) in records.of_file(path, ['question', 'answer'], fail):
    _, mark, rest = worked.rpartition('####')
    answer = number(mark + rest) if mark else None
    if answer is None:
      raise fail(f"{path}:{line}: no number after '####' in answer")
    found.append(Problem(len(found), question, answer))
  if not found:
    raise fail('contains no problem')
  return found


ANSWER_MARK = re.compile(r'The answer is|####')
NUMBER = re.compile(r'(?:(?<![0-9])-)?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)')


def number(text: str) -> decimal.Decimal | None:
  """Extracts the final number of a solution; None if there is none.

  This is the last number of the sentence after the first "The answer is" or
  `####`: later text is a further problem, made up by the model. The strict match
  of lm-evaluation-harness (gsm8k_cot) uses the first match as well. Commas, also
  LaTeX's {,}, and dollar signs are ignored.
  """
  _, *after = ANSWER_MARK.split(text, maxsplit=1)
  if not after:
    return None
  sentence = re.split(r'\.(?=\s|$)|\n', after[0].strip(), maxsplit=1)[0]
  found = NUMBER.findall(re.sub(r'\{,\}|[,$]', '', sentence))
  return decimal.Decimal(found[-1]) if found else None


def prompt(question: str, examples: Sequence[Example]) -> str:
  shots = [f'Q: {e.question}\nA: {e.worked}\n\n' for e in examples]
  return ''.join([*shots, f'Q: {question}\nA:'])


def run(subject: subject_lib.Subject, arg: str) -> suites.Result:
  """Evaluates all problems, or the first --eval.limit.

  A solution has up to --decode.max_new_tokens tokens. If prompt and solution
  exceed the context, examples are dropped, the first ones first, and this is
  reported; a question without examples is evaluated at any length.
  """
  del arg
  cfg = subject.cfg
  selected = problems(cfg.eval.data)[: cfg.eval.limit or None]
  n = len(SHOTS) if cfg.eval.num_fewshot < 0 else cfg.eval.num_fewshot
  budget = subject_lib.context(cfg) - cfg.decode.max_new_tokens
  examples = [_fitting_examples(p, SHOTS[:n], subject, budget) for p in selected]
  prompts = [prompt(p.question, e) for p, e in zip(selected, examples, strict=True)]
  found = subject_lib.continuations(
    subject, prompts, subject_lib.GenerationConfig(max_new=cfg.decode.max_new_tokens, stop=STOP)
  )
  items = []
  for p, e, (text,) in zip(selected, examples, found, strict=True):
    answer = number(text.text)
    items.append(
      dict(
        id=p.id,
        question=p.question,
        shots=len(e),
        text=text.text,
        finish=text.finish,
        answer=_shown(answer),
        expected=_shown(p.answer),
        correct=answer == p.answer,
      )
    )
  warnings = subject_lib.context_warnings(subject, prompts, cfg.decode.max_new_tokens)
  return _result(items, n, cfg, [text for (text,) in found], warnings)


def _fitting_examples(problem, examples, subject, budget: int) -> Sequence[Example]:
  for first in range(len(examples)):
    text = prompt(problem.question, examples[first:])
    if 1 + len(subject.tokenizer.encode(text)) <= budget:
      return examples[first:]
  return ()


def _shown(answer: decimal.Decimal | None) -> str | None:
  return None if answer is None else str(answer)


def _result(items, n: int, cfg, texts, warnings) -> suites.Result:
  right = sum(item['correct'] for item in items)
  tokens = sum(len(text.ids) for text in texts)
  scalars = intervals.share('accuracy', right, len(items)) | dict(
    shots=sum(item['shots'] for item in items) / len(items),
    tokens_per_forward=tokens / max(sum(text.forwards for text in texts), 1),
  )
  fewer = sum(item['shots'] < n for item in items)
  lines = [
    f'  {len(items):,} problems, accuracy {intervals.shown(scalars, "accuracy")},'
    f' {"up to " * bool(fewer)}{n} few-shot examples,'
    f' {scalars["tokens_per_forward"]:.2f} tokens per forward pass',
    *warnings,
  ]
  if fewer:
    lines.append(
      f'  {fewer:,} had fewer examples ({scalars["shots"]:.1f} per problem on average):'
      f' with --decode.max_new_tokens={cfg.decode.max_new_tokens}, more do not fit into'
      f' the context of {subject_lib.context(cfg)} tokens'
    )
  truncated = sum(item['finish'] == 'length' for item in items)
  if truncated:
    lines.append(
      f'  {truncated:,} texts truncated at --decode.max_new_tokens={cfg.decode.max_new_tokens}'
    )
  return suites.Result(lines, scalars, items)


SHOTS = (
  Example(
    'There are 15 trees in the grove. Grove workers will plant trees in the '
    'grove today. After they are done, there will be 21 trees. How many trees'
    ' did the grove workers plant today?',
    'There are 15 trees originally. Then there were 21 trees after some more '
    'were planted. So there must have been 21 - 15 = 6. The answer is 6.',
  ),
  Example(
    'If there are 3 cars in the parking lot and 2 more cars arrive, how many '
    'cars are in the parking lot?',
    'There are originally 3 cars. 2 more cars arrive. 3 + 2 = 5. The answer is 5.',
  ),
  Example(
    'Leah had 32 chocolates and her sister had 42. If they ate 35, how many '
    'pieces do they have left in total?',
    'Originally, Leah had 32 chocolates. Her sister had 42. So in total they '
    'had 32 + 42 = 74. After eating 35, they had 74 - 35 = 39. The answer is '
    '39.',
  ),
  Example(
    'Jason had 20 lollipops. He gave Denny some lollipops. Now Jason has 12 '
    'lollipops. How many lollipops did Jason give to Denny?',
    'Jason started with 20 lollipops. Then he had 12 after giving some to '
    'Denny. So he gave Denny 20 - 12 = 8. The answer is 8.',
  ),
  Example(
    'Shawn has five toys. For Christmas, he got two toys each from his mom '
    'and dad. How many toys does he have now?',
    'Shawn started with 5 toys. If he got 2 toys each from his mom and dad, '
    'then that is 4 more toys. 5 + 4 = 9. The answer is 9.',
  ),
  Example(
    'There were nine computers in the server room. Five more computers were '
    'installed each day, from monday to thursday. How many computers are now '
    'in the server room?',
    'There were originally 9 computers. For each of 4 days, 5 more computers '
    'were added. So 5 * 4 = 20 computers were added. 9 + 20 is 29. The answer'
    ' is 29.',
  ),
  Example(
    'Michael had 58 golf balls. On tuesday, he lost 23 golf balls. On '
    'wednesday, he lost 2 more. How many golf balls did he have at the end of'
    ' wednesday?',
    'Michael started with 58 golf balls. After losing 23 on tuesday, he had '
    '58 - 23 = 35. After losing 2 more, he had 35 - 2 = 33 golf balls. The '
    'answer is 33.',
  ),
  Example(
    'Olivia has $23. She bought five bagels for $3 each. How much money does she have left?',
    'Olivia had 23 dollars. 5 bagels for 3 dollars each will be 5 x 3 = 15 '
    'dollars. So she has 23 - 15 dollars left. 23 - 15 is 8. The answer is 8.',
  ),
)
