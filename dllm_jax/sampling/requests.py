"""What a sampler is asked for: a canvas a row, some of its slots fixed.

A prompt is a run of fixed slots at the start; an infill fixes any others. Rows
of different lengths share one canvas: unused slots lie at the tail.
"""

from collections.abc import Sequence

from flax import struct
from jaxtyping import Array, Bool, Int
import numpy as np

from dllm_jax.core.types import Objective
from dllm_jax.sampling.constraints.arrays import Followed
from dllm_jax.sampling.policies.rows import Options


@struct.dataclass
class Requests:
  """A batch of requests on canvases of T slots.

  Attributes:
    tokens: the token of each fixed slot; read nowhere else.
    fixed: True at prompts and infilled spans, which never change.
    valid: True at slots in use; the others lie at a row's tail (or hold what
      fills it on the left), are hidden from attention and keep their value in
      `tokens`.
    request: the number of each request. With the seed it decides the noise, so
      that a request gets the same tokens alone and in any batch.
    cond: class labels, one a row, or None.
    options: what each row chose (`options.stack`); None where the sampler's own
      numbers hold for all, which are then constants of the program.
    languages: what the text of each row has to be in; None where no row asks.
  """

  tokens: Int[Array, "B T"]
  fixed: Bool[Array, "B T"]
  valid: Bool[Array, "B T"]
  request: Int[Array, "B"]
  cond: Int[Array, "B"] | None = None
  options: Options | None = None
  languages: Followed | None = None


Template = Sequence[int | None]
"""Token ids, with None at each slot to be sampled."""


def build(
  rows: Sequence[Template],
  *,
  objective: Objective,
  length: int,
  request: Sequence[int] | None = None,
  cond: Sequence[int] | None = None,
  options: Options | None = None,
  languages: Followed | None = None,
) -> Requests:
  """Returns requests from rows of token ids, None where a token is wanted.

  Args:
    rows: a template for each request; shorter ones leave slots unused.
    objective: what the tokens must fit.
    length: slots of the canvas (T).
    request: a number for each row; by default 0, 1, 2, ...
    cond: a class label for each row.
    options: what each row chose, or None.
    languages: what the text of each row has to be in, or None.

  Raises:
    ValueError: there is no row, a row does not fit on the canvas, a token is
      not in the vocabulary, is the mask or stands for a picture, or `request`
      has another length.
  """
  if not rows:
    raise ValueError("nothing to sample: give at least one prompt or template")
  request = range(len(rows)) if request is None else request
  if len(request) != len(rows):
    raise ValueError(
      f"{len(rows)} rows need as many request numbers, not {len(request)}"
    )
  tokens = np.zeros((len(rows), length), np.int32)
  fixed = np.zeros(tokens.shape, bool)
  valid = np.zeros(tokens.shape, bool)
  for i, row in enumerate(rows):
    if len(row) > length:
      raise ValueError(
        f"row {i} needs {len(row)} slots but the canvas has {length}: shorten "
        "it, or sample with a longer canvas"
      )
    for j, token in enumerate(row):
      if token is None:
        continue
      if j or token != objective.begin_id:
        _check(token, objective, i, j)
      tokens[i, j], fixed[i, j] = token, True
    valid[i, : len(row)] = True
  if objective.hidden_id is not None:
    valid &= ~(fixed & (tokens == objective.hidden_id))
  return Requests(
    tokens=tokens,
    fixed=fixed,
    valid=valid,
    request=np.asarray(request, np.int32),
    cond=None if cond is None else np.asarray(cond, np.int32),
    options=options,
    languages=languages,
  )


def blank(
  rows: int,
  length: int,
  *,
  options: Options | None = None,
  languages: Followed | None = None,
) -> Requests:
  """Returns requests for nothing: no slot is in use."""
  no = np.zeros((rows, length), bool)
  return Requests(
    tokens=no.astype(np.int32),
    fixed=no,
    valid=no,
    request=np.zeros((rows,), np.int32),
    options=options,
    languages=languages,
  )


def _check(token: int, objective: Objective, row: int, slot: int) -> None:
  if not 0 <= token < objective.vocab_size:
    raise ValueError(
      f"row {row} has token {token} at slot {slot}, outside the vocabulary "
      f"[0, {objective.vocab_size}): use the tokenizer of the model"
    )
  if token == objective.mask_id:
    raise ValueError(
      f"row {row} has the mask token {token} at slot {slot}: a prompt holds "
      "text only; leave slots to be sampled as None"
    )
  if token == objective.image_id:
    raise ValueError(
      f"row {row} has the image token {token} at slot {slot}: this network reads "
      "text alone; leave pictures out of the prompt"
    )


def begun(row: Template, objective: Objective) -> list[int | None]:
  """Returns a template that begins as the objective wants it to.

  An autoregressive network predicts from the token before: a canvas begins with
  the token that its training rows did, or, where they did not, has one only if
  the template gives it none to start from.
  """
  begin = objective.begin_id
  given = bool(row) and row[0] is not None
  if begin is None or (given and (not objective.begins or row[0] == begin)):
    return list(row)
  return [begin, *row]


def whole(row: Template, objective: Objective) -> list[int | None]:
  """Returns a template with free slots behind it, as many as fill its last block.

  Of networks with a pass of its own for finished text, whose blocks are always
  whole: what was asked for may end inside the last one.
  """
  row = list(row)
  if not objective.two_passes:
    return row
  prompt = next((i for i, x in enumerate(row) if x is None), len(row))
  return row + [None] * ((prompt - len(row)) % objective.block_length)


def spare(objective: Objective) -> int:
  """Returns the slots that `whole` may add to a template."""
  return objective.block_length - 1 if objective.two_passes else 0


def text_ids(
  tokens: Sequence[int], template: Template, ends: Sequence[int] = ()
) -> list[int]:
  """Returns the tokens of a finished row that are its text.

  Args:
    tokens: the finished canvas.
    template: what was asked for.
    ends: what ends a text, at the first of which a row stopped; it and what was
      sampled after it are left out.
  """
  kept, over = [], False
  for token, given in zip(tokens, template, strict=False):
    over |= given is None and token in ends
    if given is not None or not over:
      kept.append(int(token))
  return kept


def answered(
  tokens: Sequence[int], template: Template, ends: Sequence[int]
) -> list[int]:
  """Returns what stands after a prompt, up to the first of what ends a text."""
  new = list(tokens[len(template) - list(template).count(None) :])
  stops = (i for i, token in enumerate(new) if token in ends)
  return new[: next(stops, len(new))]


def bucket(slots: int, *, least: int = 32, multiple: int = 1) -> int:
  """Returns the canvas for a number of slots: 32, 48, 64, 96, 128, ...

  A service that rounds up compiles two programs for each doubling of length,
  and wastes at most a third of its slots.

  Args:
    slots: the longest row.
    least: the smallest canvas, a power of 2.
    multiple: the canvas is then rounded up to whole blocks of so many slots.

  Raises:
    ValueError: a number is below 1.
  """
  if slots < 1:
    raise ValueError(f"a canvas needs at least 1 slot, not {slots}")
  if least < 2 or least & (least - 1):
    raise ValueError(f"least must be a power of 2 from 2 on, not {least}")
  size = least
  while size < slots:
    size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
  return -(-size // multiple) * multiple


def continuation(
  prompt: Sequence[int],
  *,
  length: int | None = None,
  new_tokens: int | None = None,
) -> list[int | None]:
  """Returns a template: a prompt, then free slots.

  Args:
    prompt: token ids, possibly none.
    length: slots of the canvas; None for as many as are needed.
    new_tokens: free slots after the prompt; None fills the canvas.

  Raises:
    ValueError: the prompt, with its new tokens, is longer than the canvas, or
      neither `length` nor `new_tokens` was given.
  """
  if length is None:
    if new_tokens is None:
      raise ValueError("give the canvas a length, or say how many new_tokens")
    length = len(prompt) + max(new_tokens, 0)
  if len(prompt) > length:
    raise ValueError(
      f"the prompt has {len(prompt)} tokens but the canvas has {length} slots: "
      "shorten the prompt, or sample with a longer canvas"
    )
  room = length - len(prompt)
  new_tokens = room if new_tokens is None else new_tokens
  if not 0 <= new_tokens <= room:
    raise ValueError(
      f"new_tokens must lie in [0, {room}], the slots that a prompt of "
      f"{len(prompt)} leaves on a canvas of {length}, not {new_tokens}"
    )
  return [*prompt, *[None] * new_tokens]
