"""A trace: what every step of a generation did, and its pictures.

`observe` runs inside the sampling program, and only when a trace is asked for:
it reads the same outputs as the policy, which computes nothing for it.
The rest turns arrays into files on the host: one HTML page that plays the
unmasking, or a still strip of a few panels.
"""

from collections.abc import Callable, Sequence
import dataclasses
import json
import os

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree
import numpy as np

from dllm_jax.core import paths
from dllm_jax.core.types import Guide, ModelOutputs, Objective, Process
from dllm_jax.core.vocabulary import reduce
from dllm_jax.sampling.traces.page import PAGE


@struct.dataclass
class Frame:
  """What steps did, leaves `[steps, B, T]` in a trace; 0 outside the window.

  Attributes:
    tokens: the canvas after the step.
    confidence: the probability of the token that stands there afterwards, or of
      the best one where it is still masked.
    entropy: of the predicted token, in nats.
    committed: whether the slot took a new token.
    remasked: whether it was masked again.
    ran: `[steps, B]`: whether the row took part in the step.
  """

  tokens: Int[Array, "*S B T"]
  confidence: Float[Array, "*S B T"]
  entropy: Float[Array, "*S B T"]
  committed: Bool[Array, "*S B T"]
  remasked: Bool[Array, "*S B T"]
  ran: Bool[Array, "*S B"]


@struct.dataclass
class Trace:
  """A generation, step by step.

  Attributes:
    initial: the canvas before the first step.
    fixed: prompts and infilled spans.
    valid: slots in use.
    frames: the steps, along the first axis.
    mask_id: the mask token, or None.
  """

  initial: Int[Array, "B T"]
  fixed: Bool[Array, "B T"]
  valid: Bool[Array, "B T"]
  frames: Frame
  mask_id: int | None = struct.field(pytree_node=False, default=None)


def observe(
  objective: Objective,
  process: Process,
  out: ModelOutputs | tuple[ModelOutputs, ...],
  z: PyTree,
  new_z: PyTree,
  t: Float[Array, "B 1"],
  *,
  window: Int[Array, "B W"] | None,
  guide: Guide | None = None,
) -> dict[str, Array]:
  """Returns the fields of a `Frame` that a window's step decides."""
  before, after = objective.decode(process, z), objective.decode(process, new_z)
  masked = lambda tokens: (
    jnp.zeros(tokens.shape, bool)
    if objective.mask_id is None
    else tokens == objective.mask_id
  )

  def look(logits, z, t, token):
    if guide is not None:
      logits = guide(logits, z, t)
    log_p = objective.log_x0(process, logits, z, t)
    token = jnp.where(masked(token), jnp.argmax(log_p, axis=-1), token)
    picked = jnp.take_along_axis(log_p, token[..., None], axis=-1)[..., 0]
    p = jnp.exp(log_p)
    entropy = -jnp.sum(p * jnp.where(p > 0, log_p, 0.0), axis=-1)
    return jnp.exp(picked), entropy

  confidence, entropy = reduce(look, out, z, t, after, window=window)
  return {
    "confidence": confidence,
    "entropy": entropy,
    "committed": (before != after) & ~masked(after),
    "remasked": masked(after) & ~masked(before),
  }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
  """A slot that changed at a step.

  Attributes:
    slot: where.
    token: what stands there now; None for a mask.
    confidence: the probability that the network gave to it.
  """

  slot: int
  token: int | None
  confidence: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Film:
  """One sample of a trace as plain Python, unused slots and steps left out.

  Attributes:
    initial: the tokens at the start; None for a mask.
    fixed: whether each slot is fixed.
    steps: the events of each step that the sample took part in.
  """

  initial: tuple[int | None, ...]
  fixed: tuple[bool, ...]
  steps: tuple[tuple[Event, ...], ...]

  def canvas(self, steps: int) -> list[Event]:
    """Returns each slot after so many steps; given tokens have confidence 1."""
    slots = [
      Event(slot=i, token=token, confidence=1.0)
      for i, token in enumerate(self.initial)
    ]
    for events in self.steps[:steps]:
      for event in events:
        slots[event.slot] = event
    return slots

  def moments(self, count: int) -> list[int]:
    """Returns evenly spaced numbers of steps, none and all of them included."""
    steps = np.linspace(0, len(self.steps), count).round().astype(int)
    return list(dict.fromkeys(steps.tolist()))


def films(trace: Trace) -> list[Film]:
  """Returns the samples of a trace, fetched from the device."""
  trace = jax.device_get(trace)
  return [_film(trace, row) for row in range(trace.initial.shape[0])]


def film_of(trace: Trace, sample: int) -> Film:
  """Returns one sample of a trace, fetched from the device.

  Raises:
    ValueError: there is no such sample.
  """
  rows = trace.initial.shape[0]
  if not 0 <= sample < rows:
    raise ValueError(
      f"sample must lie in [0, {rows}), the rows of the trace, not {sample}"
    )
  return _film(jax.device_get(trace), sample)


def _film(trace: Trace, row: int) -> Film:
  known = lambda token: None if token == trace.mask_id else int(token)
  frames = trace.frames
  steps = []
  for i in np.flatnonzero(frames.ran[:, row]):
    changed = frames.committed[i, row] | frames.remasked[i, row]
    steps.append(
      tuple(
        Event(
          slot=int(j),
          token=known(frames.tokens[i, row, j]),
          confidence=round(float(frames.confidence[i, row, j]), 3),
        )
        for j in np.flatnonzero(changed)
      )
    )
  used = int(np.max(np.flatnonzero(trace.valid[row]) + 1, initial=0))
  return Film(
    initial=tuple(known(token) for token in trace.initial[row, :used]),
    fixed=tuple(bool(x) for x in trace.fixed[row, :used]),
    steps=tuple(steps),
  )


def write_page(
  path: str | os.PathLike[str],
  trace: Trace,
  decode: Callable[[Sequence[int]], str],
  *,
  title: str = "Unmasking",
) -> None:
  """Writes one self-contained HTML page that plays the samples step by step.

  Args:
    path: the file to write.
    trace: what to play.
    decode: the tokenizer: token ids to text; called with one id at a time.
    title: the heading of the page.
  """
  text = page(trace, decode, title=title)
  paths.place(path).write_text(text, encoding="utf-8")


def page(
  trace: Trace,
  decode: Callable[[Sequence[int]], str],
  *,
  title: str = "Unmasking",
) -> str:
  """Returns the page that `write_page` writes."""
  samples = films(trace)
  used = {token for film in samples for token in film.initial}
  used |= {e.token for film in samples for step in film.steps for e in step}
  data = {
    "title": title,
    "text": {str(t): decode([t]) for t in sorted(used - {None})},
    "samples": [
      {
        "initial": film.initial,
        "fixed": [int(x) for x in film.fixed],
        "steps": [
          [[e.slot, e.token, e.confidence] for e in step] for step in film.steps
        ],
      }
      for film in samples
    ],
  }
  # Inside a script element "</" and "<!--" would end or swallow the data.
  text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
  return PAGE.replace("@DATA@", text)
