"""Instructions on words of a few letters: generated, and marked by exact match.

    user       sort d b c a
    assistant  a b c d

A model that was taught one group of kinds, `FIRST`, knows the form of an answer,
can point at letters, and says "no" to instructions that it does not know; the
other group, `LATER`, is what fine-tuning teaches it. Every word of a held-out
question is one that no taught question has.
"""

from collections.abc import Callable, Sequence
import dataclasses
import json
import os
import random
import string
from typing import Any

from dllm_jax.core import paths
from dllm_jax.core.files import write_whole
from dllm_jax.evaluation.benchmarks import finetune
from dllm_jax.run.run import Run
from dllm_jax.sampling import requests
from dllm_jax.sampling.presets import SamplerConfig

_LETTERS = string.ascii_lowercase[:12]
_LENGTHS = range(3, 7)
_END = "<|end|>"
SLOTS = 16
"""For an answer and its end."""
_TEMPLATE = (
  "{% for message in messages %}"
  "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
  "{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

KINDS: dict[str, Callable[[str], str]] = {
  "reverse": lambda word: word[::-1],
  "double": lambda word: "".join(2 * letter for letter in word),
  "first": lambda word: word[0],
  "last": lambda word: word[-1],
  "length": lambda word: str(len(word)),
  "copy": lambda word: word,
  "sort": lambda word: "".join(sorted(word)),
  "other": lambda word: "no",
}
"""What is asked of a word, and its answer.

"other" stands for instructions of random letters.
"""

FIRST = ("reverse", "double", "first", "last", "other")
LATER = ("copy", "sort", "length")


@dataclasses.dataclass(frozen=True)
class Question:
  """An instruction with its answer.

  Attributes:
    kind: a key of `KINDS`.
    word: what it is asked of.
    told: the instruction in words; the kind's name, most often.
  """

  kind: str
  word: str
  told: str

  @property
  def messages(self) -> list[dict[str, str]]:
    """The conversation, answered."""
    asked = f"{self.told} {self.word}"
    return [
      {"role": "user", "content": asked},
      {"role": "assistant", "content": self.answer},
    ]

  @property
  def answer(self) -> str:
    """What is right."""
    return KINDS[self.kind](self.word)


def questions(
  kinds: Sequence[str], number: int, *, seed: int, held_out: bool = False
) -> list[Question]:
  """Returns distinct questions, as many of each kind as of any other.

  Args:
    kinds: which.
    number: how many in all, far below the millions of words.
    seed: with the kinds it determines the questions.
    held_out: whether they are of words that are never taught.
  """
  rng = random.Random(f"{seed} {held_out}")
  found: dict[Question, None] = {}
  while len(found) < number:
    word = "".join(rng.choices(_LETTERS, k=rng.choice(_LENGTHS)))
    if _is_held_out(word) == held_out:
      kind = kinds[len(found) % len(kinds)]
      told = kind if kind != "other" else _unknown(rng)
      found[Question(kind, word, told)] = None
  return list(found)


def _unknown(rng: random.Random) -> str:
  """Returns an instruction that means nothing."""
  told = "".join(rng.choices(string.ascii_lowercase, k=rng.choice((4, 5, 6))))
  return told if told not in KINDS else _unknown(rng)


def _is_held_out(word: str) -> bool:
  """Whether a word is among the tenth that is never taught."""
  return random.Random(word).random() < 0.1


def write(asked: Sequence[Question], path: str | os.PathLike) -> None:
  """Writes questions with their answers as conversations, JSON lines."""
  path = paths.place(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = (json.dumps({"messages": q.messages}) for q in asked)
  write_whole(path, "\n".join(lines) + "\n")


def write_tokenizer(folder: str | os.PathLike) -> str:
  """Writes a tokenizer of letters with its chat template; returns its path."""
  import tokenizers  # noqa: PLC0415

  special = ["<|mask|>", _END, "<|user|>", "<|assistant|>"]
  plain = [*string.ascii_lowercase, *string.digits, " "]
  vocabulary = {token: i for i, token in enumerate([*plain, *special])}
  made = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocabulary, unk_token=" ")
  )
  made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
  made.decoder = tokenizers.decoders.Fuse()
  made.add_special_tokens(special)
  folder = paths.place(folder)
  folder.mkdir(parents=True, exist_ok=True)
  settings = {
    "chat_template": _TEMPLATE,
    "eos_token": _END,
    "pad_token": _END,
    "mask_token": "<|mask|>",
  }
  write_whole(folder / "tokenizer.json", made.to_str())
  write_whole(folder / "tokenizer_config.json", json.dumps(settings))
  return str(folder / "tokenizer.json")


def answers(
  run: Run,
  asked: Sequence[Question],
  *,
  sampler: SamplerConfig,
  use_ema: bool = True,
  rows: int = 0,
) -> list[str]:
  """Returns what a model answers.

  Args:
    run: its tokenizer has a chat template.
    asked: the questions.
    sampler: how to sample.
    use_ema: whether to use averaged parameters.
    rows: rows of the compiled batch, see `finetune.fill`.
  """
  templates = [
    [*map(int, run.tokenizer.chat(q.messages[:1])), *[None] * SLOTS]
    for q in asked
  ]
  filled, _ = finetune.fill(
    run,
    templates,
    length=max(run.config.data.length, *map(len, templates)),
    sampler=sampler,
    use_ema=use_ema,
    rows=rows,
  )
  ends = run.tokenizer.end_ids
  new = (
    requests.answered(found, template, ends)
    for found, template in zip(filled, templates, strict=True)
  )
  return [run.tokenizer.decode(ids).strip() for ids in new]


def right(run: Run, asked: Sequence[Question], **how: Any) -> list[bool]:
  """Returns which questions a model answers right; see `answers`."""
  texts = answers(run, asked, **how)
  return [t == q.answer for t, q in zip(texts, asked, strict=True)]
