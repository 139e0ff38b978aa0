"""A teacher's answers to prompts: sampled once, kept as lines, learned from.

A line is one answer in JSON: its tokens behind those of the prompt, when each slot
was revealed, and the network calls that it took. The first line says how they were
asked for. Answers depend on the seed and the prompt's number alone, so that what
was cut off is gone on with.
"""

from collections.abc import Iterator, Sequence
import json
from typing import Any, NamedTuple
import zlib

import jax
from jaxtyping import Int
import numpy as np

from dllm_jax.core.files import keep_lines, Lines, read_lines
from dllm_jax.core.paths import Path
from dllm_jax.core.progress import progress_bar
from dllm_jax.data.order import shuffled
from dllm_jax.parallel import distributed
from dllm_jax.parallel.sharding import RowShare
from dllm_jax.posttraining.distillation.certainty import Answers
from dllm_jax.run.run import Run
from dllm_jax.sampling.presets import SamplerConfig
from dllm_jax.sampling.requests import continuation

FILE = "answers.jsonl"


class Answer(NamedTuple):
  """What a teacher said.

  Attributes:
    tokens: the prompt and the answer, its end included.
    given: tokens of the prompt.
    revealed_at: of each slot of the canvas behind the prompt, the teacher's step
      at which it was revealed; -1 for never.
    calls: network calls that it took.
    ended: whether it has an end, or is one that needs none.
  """

  tokens: list[int]
  given: int
  revealed_at: list[int]
  calls: int
  ended: bool


def ask(
  teacher: Run,
  prompts: Sequence[Sequence[int]],
  folder: Path,
  *,
  length: int,
  sampler: SamplerConfig,
  batch_size: int,
  seed: int,
) -> list[Answer]:
  """Returns the teacher's answers, of which a folder keeps those it has.

  Args:
    teacher: the run to be asked.
    prompts: token ids.
    folder: where the answers are kept.
    length: slots of the canvas: of the prompt and the answer.
    sampler: how it answers.
    batch_size: how many it is asked at once.
    seed: of the answers.

  Raises:
    ValueError: the folder has answers to something else; a prompt leaves no room
      for an answer; the sampler is illegal.
  """
  check_room(prompts, length)
  told = {
    "teacher": str(teacher.workdir),
    "step": int(teacher.state.step),
    "prompts": len(prompts),
    "checksum": _checksum(prompts),
    "length": length,
    "seed": seed,
    "sampler": vars(sampler),
  }
  path = folder / FILE
  with distributed.together():
    kept = _kept(path, told)
    if kept is None and jax.process_index() == 0:
      _add(path, [told])
  found = list(kept or [])
  with progress_bar(
    len(prompts), "answer", done=len(found), shown=jax.process_index() == 0
  ) as bar:
    for start in range(len(found), len(prompts), batch_size):
      rows = prompts[start : start + batch_size]
      new = _sampled(teacher, rows, start, batch_size, length, sampler, seed)
      with distributed.together():
        if jax.process_index() == 0:
          _add(path, [answer._asdict() for answer in new])
      found += new
      bar.update(len(new))
  return found


def check_room(prompts: Sequence[Sequence[int]], length: int) -> None:
  """Checks that there are prompts, and that answers have room.

  Raises:
    ValueError: there is none, or one has not.
  """
  if not prompts:
    raise ValueError("no prompt is left to ask the teacher")
  for number, prompt in enumerate(prompts):
    if len(prompt) >= length:
      raise ValueError(
        f"prompt {number} has {len(prompt)} tokens and leaves no room for an "
        f"answer in rows of {length}: raise config.data.length, or leave it out"
      )


def _sampled(teacher, rows, start, batch_size, length, sampler, seed):
  """Returns the answers to some prompts, filled up to a batch of one shape."""
  filled = [*rows, *[rows[-1]] * (batch_size - len(rows))]
  sampled = teacher.sample_rows(
    [continuation([int(i) for i in row], length=length) for row in filled],
    length=length,
    seed=seed,
    sampler=sampler,
    numbers=range(start, start + batch_size),
  )
  made = jax.device_get(sampled.generation)
  ends = teacher.tokenizer.end_ids
  return [
    answer(tokens, len(row), revealed, calls, ends)
    for row, tokens, revealed, calls in zip(
      rows,
      made.tokens,
      made.revealed_at,
      made.function_evaluations,
      strict=False,
    )
  ]


def answer(
  tokens: Int[np.ndarray, "T"],
  given: int,
  revealed_at: Int[np.ndarray, "T"],
  calls: int,
  ends: Sequence[int],
) -> Answer:
  """Returns what stands on a canvas behind a prompt, up to its end."""
  where = np.flatnonzero(np.isin(tokens[given:], ends))
  size = given + int(where[0]) + 1 if len(where) else len(tokens)
  return Answer(
    tokens=tokens[:size].tolist(),
    given=given,
    revealed_at=revealed_at[given:].tolist(),
    calls=int(calls),
    ended=bool(len(where)) or not ends,
  )


def _checksum(prompts: Sequence[Sequence[int]]) -> int:
  found = 0
  for prompt in prompts:
    found = zlib.crc32(np.asarray(prompt, "<i4").tobytes() + b";", found)
  return found


def _add(path: Path, records: Sequence[dict[str, Any]]) -> None:
  lines = Lines(path)
  lines.add("".join(json.dumps(record) + "\n" for record in records))
  lines.close()


def _whole(line: str) -> bool:
  try:
    json.loads(line)
  except ValueError:
    return False
  return True


def _kept(path: Path, told: dict[str, Any]) -> list[Answer] | None:
  """Returns the answers of a file that was begun the same way.

  Raises:
    ValueError: it was begun otherwise.
  """
  keep_lines(path, _whole)  # A kill may have cut the last one short.
  lines = [json.loads(line) for line in read_lines(path)]
  if not lines:
    return None
  told = json.loads(json.dumps(told))
  changed = [
    f"{key}: {lines[0].get(key)!r} -> {told[key]!r}"
    for key in told
    if lines[0].get(key) != told[key]
  ]
  if changed:
    raise ValueError(
      f"{path} holds answers that were asked for otherwise ("
      f"{'; '.join(changed[:3])}); use another --output, or remove it"
    )
  return [Answer(**line) for line in lines[1:]]


class AnswerRows:
  """Batches of answers by number, for `batches`.

  Args:
    answers: what is learned.
    length: tokens a row.
    fill: the token behind an answer.
    counted: whether what fills a row counts.
  """

  def __init__(
    self,
    answers: Sequence[Answer],
    *,
    length: int,
    fill: int | None,
    counted: bool,
  ):
    self._answers, self._length = answers, length
    self._fill, self._counted = fill, counted

  def batch(self, numbers: Sequence[int]) -> Answers:
    """Returns the batch of some answers."""
    shape = len(numbers), self._length
    tokens, before = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    given, size = np.zeros(shape[:1], int), np.zeros(shape[:1], np.int32)
    for row, number in enumerate(numbers):
      one = self._answers[number]
      given[row], size[row] = one.given, len(one.tokens)
      tokens[row] = one.tokens[-1] if self._fill is None else self._fill
      tokens[row, : size[row]] = one.tokens
      before[row, one.given :] = stood_before(np.asarray(one.revealed_at))
    slots = np.broadcast_to(np.arange(self._length, dtype=np.int32), shape)
    used = slots < (self._length if self._counted else size[:, None])
    return Answers(
      tokens=tokens,
      loss_mask=used & (slots >= given[:, None]),
      segment_ids=used.astype(np.int32),
      positions=np.where(used, slots, 0),
      length=size - given.astype(np.int32),
      before=before,
    )


def stood_before(revealed_at: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
  """Returns how many slots stood when each was revealed; all for never."""
  last = np.iinfo(np.int64).max
  step = np.where(revealed_at < 0, last, revealed_at)
  return np.searchsorted(np.sort(step), step).astype(np.int32)


def batches(
  rows: AnswerRows, count: int, *, batch_size: int, seed: int, share: RowShare
) -> Iterator[Answers]:
  """Returns endless batches of answers, shuffled anew in each epoch.

  Args:
    rows: the answers as rows.
    count: how many there are.
    batch_size: rows of a whole batch.
    seed: of the order.
    share: which rows of each batch are this process's.
  """
  return shuffled(
    count,
    rows.batch,
    batch_size=batch_size,
    seed=seed,
    process_index=share.index,
    process_count=share.count,
  )
