r"""Facts told in one direction, and questions about them in both.

A statement names two things in an order: "Mara Quill is the baker of Oslo." tells
of the name first. Asked forward, the second thing is wanted, given the first;
asked in reverse, the first one, given the second. A question has one of two
forms:

    infill   the statement as it was taught, the answer's slots left open (their
             number is told): only a model that sees both sides can be asked so
    prompt   a text that ends where the answer begins: for the reverse question a
             sentence of the other order

Sets of facts are made (`synthetic`) or read: the files of "The Reversal Curse"
(arXiv:2309.12288) by `berglund`, couplets of poems by `couplets`.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
import dataclasses
import itertools
import json
import os
import random
import re
from typing import Literal

from dllm_jax.core import paths
from dllm_jax.core.paths import Path
from dllm_jax.evaluation.benchmarks import json_lines

Direction = Literal["forward", "reverse"]
Form = Literal["infill", "prompt"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
  """A text with one answer missing.

  Attributes:
    fact: what it asks about; questions of one fact are not independent.
    group: which facts: by the order in which they were taught.
    direction: whether the second or the first thing taught is wanted.
    form: how it is asked.
    before: the text up to the answer.
    answer: the answer, with the space that it begins with.
    after: the text from the answer on; "" for the form "prompt".
  """

  fact: str
  group: str
  direction: Direction
  form: Form
  before: str
  answer: str
  after: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
  """What is taught and what is asked.

  Attributes:
    source: where they are from.
    statements: the texts to train on, one line each.
    questions: what is asked; of wordings that the fact was not taught in, where
      the source has several.
  """

  source: str
  statements: tuple[str, ...]
  questions: tuple[Question, ...]


def _asked(
  group: str, fact: str, taught: tuple[str, str, str, str, str]
) -> Iterator[Question]:
  """Yields the questions of a statement in its taught order.

  Args:
    group: the group of the fact.
    fact: its name.
    taught: text, first thing, text, second thing, text.
  """
  start, first, middle, second, end = taught
  named = {"fact": fact, "group": group}
  yield Question(
    **named, direction="forward", form="infill",
    before=start + first + middle, answer=second, after=end,
  )  # fmt: skip
  yield Question(
    **named, direction="reverse", form="infill",
    before=start, answer=first, after=middle + second + end,
  )  # fmt: skip
  yield Question(
    **named, direction="forward", form="prompt",
    before=start + first + middle, answer=second,
  )  # fmt: skip


# ---------------------------------------------------------------- synthetic

_HEADS, _VOWELS, _TAILS = (
  "b d f g k l m n p r s t v z br dr kr st tr",
  "aeiou",
  "lmnrst",
)
_ROLE = (
  "admiral architect astronomer baker botanist cartographer chemist composer "
  "dancer engineer falconer gardener glassblower historian inventor judge "
  "locksmith mason navigator painter poet sculptor surgeon weaver"
)


_MOST = 1000


def _words(rng: random.Random, number: int) -> list[str]:
  """Returns made-up proper names, all different."""
  heads = _HEADS.split()
  found: dict[str, None] = {}
  while len(found) < number:
    sounds = (rng.choice(heads) + rng.choice(_VOWELS) for _ in range(2))
    found["".join(sounds).capitalize() + rng.choice(_TAILS)] = None
  return list(found)


# Texts before the first thing told, before the second and after it. None begins
# with a thing, so that its words are the same tokens everywhere.
_NAME_FIRST = (
  ("Indeed", " is", "."),
  ("They say", " was", "."),
  ("In fact", " became", "."),
  ("Now", " works as", "."),
  ("Once", " served as", "."),
  ("Today", " remains", "."),
)
_DESCRIPTION_FIRST = (
  ("Here", " is", "."),
  ("They call", " simply", "."),
  ("Meet", ", namely", "."),
  ("Ask", " for", "."),
  ("Behold", " called", "."),
  ("Thank", ", who is", "."),
)


def synthetic(*, facts: int = 40, taught: int = 4, seed: int = 0) -> Facts:
  """Returns made-up people with descriptions, each told in several wordings.

  A third of them are told name first, a third description first, and a third in
  both orders: from those a model can learn what a question of either order looks
  like, so that not knowing the form is no excuse for the others. Questions are
  of wordings in which their fact was not taught but others were.

  Args:
    facts: people in each of the three groups.
    taught: wordings in which each is told, of six in each order.
    seed: the seed of the draw.

  Raises:
    ValueError: more facts, or wordings, than there are.
  """
  if not 1 <= facts <= _MOST:
    raise ValueError(
      f"facts must lie in [1, {_MOST}] for each group, not {facts}"
    )
  wordings = len(_NAME_FIRST)
  if not 1 <= taught < wordings:
    raise ValueError(
      f"taught must lie in [1, {wordings - 1}] wordings, not {taught}"
    )
  rng = random.Random(seed)
  proper = iter(_words(rng, 3 * 3 * facts))
  statements, questions = [], []
  for i in range(3 * facts):
    group = ("name_first", "description_first", "both_orders")[i % 3]
    name = f" {next(proper)} {next(proper)}"
    description = f" the {rng.choice(_ROLE.split())} of {next(proper)}"
    told, asked = {}, {}
    for order, forms in (("n", _NAME_FIRST), ("d", _DESCRIPTION_FIRST)):
      pair = (name, description) if order == "n" else (description, name)
      lines = [(a, pair[0], b, pair[1], c) for a, b, c in forms]
      lines = rng.sample(lines, len(lines))
      told[order], asked[order] = lines[:taught], lines[taught:]
    orders = {"name_first": "n", "description_first": "d"}.get(group, "nd")
    statements += ["".join(x) for o in orders for x in told[o]]
    forward, reverse = (
      ("d", "n") if group == "description_first" else ("n", "d")
    )
    for line, turned in zip(asked[forward], asked[reverse], strict=True):
      questions += _asked(group, name.strip(), line)
      questions.append(
        Question(
          fact=name.strip(),
          group=group,
          direction="reverse",
          form="prompt",
          before="".join(turned[:3]),
          answer=turned[3],
        )  # fmt: skip
      )
  rng.shuffle(statements)
  return Facts(
    source=f"synthetic, seed {seed}",
    statements=tuple(statements),
    questions=tuple(questions),
  )


# -------------------------------------------------------------------- files


def read(path: str | os.PathLike, *, limit: int = 0) -> Facts:
  """Returns the facts of a path: a folder or a file of couplets.

  Args:
    path: the path.
    limit: couplets to read at most; 0 for all.

  Raises:
    FileNotFoundError: there is no such path.
    ValueError: it is something else; the message names the file and line.
  """
  path = paths.place(path)
  if not path.exists():
    raise FileNotFoundError(
      f"facts {str(path)!r} do not exist; give 'synthetic', a folder of "
      "*_prompts_train.jsonl and *_prompts_test.jsonl, or couplets (.tsv, .json)"
    )
  return berglund(path) if path.is_dir() else couplets(path, limit=limit)


def berglund(folder: str | os.PathLike) -> Facts:
  """Returns the facts of a folder in the form of "The Reversal Curse".

  `{p2d,d2p,both}_prompts_train.jsonl` are taught, `*_prompts_test.jsonl` asked
  forward and `*_reverse_prompts_test.jsonl` in reverse, one JSON object with
  `prompt` and `completion` a line. A reverse question by infilling is a forward
  one whose prompt holds the answer of a reverse one word for word, but for the
  period at its end.

  Raises:
    ValueError: a line is something else, or there is nothing to train or to ask.
  """
  folder = paths.place(folder)
  statements, questions = [], []
  for name in ("p2d", "d2p", "both"):
    train = _pairs(folder / f"{name}_prompts_train.jsonl")
    forward = _pairs(folder / f"{name}_prompts_test.jsonl")
    reverse = _pairs(folder / f"{name}_reverse_prompts_test.jsonl")
    statements += [prompt + answer for prompt, answer in train]
    person = _people([p + a for p, a in train + forward + reverse])
    # In a prompt, what is asked for stands without the period that ends it.
    ends = {a.strip().removesuffix(".") for _, a in reverse}
    wanted = sorted(ends, key=len, reverse=True)
    for prompt, answer in forward:
      first = next((w for w in wanted if w in prompt), None)
      asked = {"group": name, "fact": person(prompt + answer)}
      if first is not None:
        start, middle = prompt.split(first, 1)
        first = " " + first if start.endswith(" ") else first
        taught = (start.removesuffix(" "), first, middle, answer, "")
        questions += _asked(**asked, taught=taught)
        continue
      questions += [
        Question(
          **asked, direction="forward", form=form, before=prompt, answer=answer
        )
        for form in ("infill", "prompt")
      ]
    questions += [
      Question(
        group=name,
        fact=person(prompt + answer),
        direction="reverse",
        form="prompt",
        before=prompt,
        answer=answer,
      )  # fmt: skip
      for prompt, answer in reverse
    ]
  return _checked(folder, statements, questions)


_NAME = re.compile(r"(?=\b([A-Z][\w'-]+ [A-Z][\w'-]+))")


def _people(texts: Sequence[str]) -> Callable[[str], str]:
  """Returns what says whom a text is about.

  No field of the files does. A fact is worded in several ways, while its name, two
  words with capitals, stands in all of them: the pair that most texts have.
  """
  found = [set(_NAME.findall(text)) for text in texts]
  counts = collections.Counter(itertools.chain.from_iterable(found))
  return lambda text: max(
    _NAME.findall(text), key=lambda pair: (counts[pair], pair), default=text
  )


def _pairs(path: Path) -> list[tuple[str, str]]:
  """Returns (prompt, completion) of each line; none if there is no file."""
  if not path.exists():
    return []
  return [
    (row["prompt"], row["completion"])
    for _, row in json_lines.rows(path, ("prompt", "completion"), text=True)
  ]


def couplets(path: str | os.PathLike, *, limit: int = 0) -> Facts:
  """Returns couplets of poems: asked forward, the second line is wanted.

  A `.tsv` has two lines of a poem a row, with a tab between; a `.json` is a list
  of objects with `first` and `second`.

  Raises:
    ValueError: a row is something else; the message names file and line.
  """
  path = paths.place(path)
  statements, questions = [], []
  for first, second in itertools.islice(_couplets(path), limit or None):
    statements.append(f"{first},{second}")
    questions += _asked("couplets", first, ("", first, ",", second, ""))
    questions.append(
      Question(
        group="couplets",
        fact=first,
        direction="reverse",
        form="prompt",
        before=f"{second},",
        answer=first,
      )  # fmt: skip
    )
  return _checked(path, statements, questions)


def _couplets(path: Path) -> Iterator[tuple[str, str]]:
  text = path.read_text(encoding="utf-8")
  if path.suffix == ".json":
    try:
      rows = json.loads(text)
    except json.JSONDecodeError as error:
      raise ValueError(
        f"{path}:{error.lineno} is not JSON ({error.msg})"
      ) from error
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
      if not isinstance(row, dict) or not {"first", "second"} <= row.keys():
        raise ValueError(
          f"{path}: entry {number} must be an object with first and second"
        )
      yield row["first"], row["second"]
    return
  for number, line in enumerate(text.splitlines(), start=1):
    parts = line.split("\t")
    if len(parts) != 2 or not all(part.strip() for part in parts):
      raise ValueError(
        f"{path}:{number} must be two lines of a poem with a tab between"
      )
    yield parts[0].strip(), parts[1].strip()


def _checked(path, statements, questions) -> Facts:
  asked = {q.direction for q in questions}
  if not statements or asked != {"forward", "reverse"}:
    raise ValueError(
      f"{path} has {len(statements)} statements and questions "
      f"{'forward' if 'forward' in asked else 'in no direction'} only; needed "
      "are statements and questions in both directions"
    )
  return Facts(
    source=path.name,
    statements=tuple(dict.fromkeys(statements)),
    questions=tuple(questions),
  )
