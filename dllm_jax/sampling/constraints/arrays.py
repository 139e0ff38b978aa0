"""Automata of rows as arrays of one shape, so that one program serves any of them."""

from collections.abc import Sequence
import dataclasses

from flax import struct
from jaxtyping import Array, Bool, Int
import numpy as np

from dllm_jax.sampling.constraints.automaton import Automaton

_CELL = 16  # tokens of a class that are reduced at once
_FAN = 8  # arcs of a state that are


@struct.dataclass
class Fan:
  """Where arcs of each state lie, in two levels, so that nothing is scattered.

  Attributes:
    parts: arcs of one state, up to 8; the number of arcs for none.
    wholes: the parts of each state; the number of parts for none.
  """

  parts: Int[Array, "B P F"]
  wholes: Int[Array, "B S Q"]


@struct.dataclass
class Followed:
  """The languages of rows; see `Automaton`.

  Attributes:
    classes: the class of each token.
    cells: tokens of one class, up to 16; V for none.
    cell_class: their class, in order; the number of classes for none.
    members: pairs (set, class) in order; the number of sets for none.
    arcs: triples (from, set, to); -1 in front for none.
    out: arcs by where they come from.
    into: arcs by where they lead to.
    final: states in which the slots of the language may end.
    inside: the slots of the language; nowhere in rows without one.
    end_kind: the class of what ends a text; -1 for none.
    kinds: classes that there is room for (static).
  """

  classes: Int[Array, "B V"]
  cells: Int[Array, "B R c"]
  cell_class: Int[Array, "B R"]
  members: Int[Array, "B N 2"]
  arcs: Int[Array, "B A 3"]
  out: Fan
  into: Fan
  final: Bool[Array, "B S"]
  inside: Bool[Array, "B T"]
  end_kind: Int[Array, "B"]
  kinds: int = struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True, order=True)
class Room:
  """Bounds of arrays, a program's shapes.

  Attributes:
    states: of an automaton.
    kinds: classes of tokens.
    sets: of classes.
    members: pairs of set and class.
    arcs: arrows between states.
    cells: groups of tokens of one class.
    parts: groups of arcs of one state, by either end.
    fans: groups of one state, at most.
  """

  states: int = 1
  kinds: int = 2
  sets: int = 1
  members: int = 1
  arcs: int = 1
  cells: int = 1
  parts: int = 1
  fans: int = 1

  @classmethod
  def of(cls, automata: Sequence[Automaton]) -> "Room":
    """Returns room for some automata: their sizes rounded up, by half at most."""
    sizes = [_sizes(automaton) for automaton in automata]
    most = [max(size, default=1) for size in zip(*sizes, strict=True)]
    return cls(*map(_rounded, most)) if sizes else cls()

  @classmethod
  def for_states(cls, states: int, vocab: int) -> "Room":
    """Returns room for languages of so many states, of any kind that is usual."""
    kinds = max(states // 2, 256)
    return cls(
      states=states,
      kinds=kinds,
      sets=kinds,
      members=4 * kinds,
      arcs=8 * states,
      cells=vocab // _CELL + kinds,
      parts=3 * states,
      fans=64,
    )

  def check(self, automaton: Automaton) -> None:
    """Raises ValueError unless there is room for an automaton."""
    names = [field.name for field in dataclasses.fields(self)]
    for name, size in zip(names, _sizes(automaton), strict=True):
      if size > getattr(self, name):
        raise ValueError(
          f"{automaton.name} needs {size} {name}, more than the"
          f" {getattr(self, name)} that there is room for: make it smaller"
        )


def _rounded(size: int) -> int:
  """Returns 1, 2, 3, 4, 6, 8, 12, ...: the first that is large enough."""
  power = 1 << max(size - 1, 0).bit_length()
  return power * 3 // 4 if size <= power * 3 // 4 and power >= 4 else power


def _sizes(automaton: Automaton) -> tuple[int, ...]:
  arcs = automaton.arcs
  tokens = np.bincount(automaton.classes)[1:]
  fans = [
    -(-np.bincount(arcs[:, end], minlength=automaton.states) // _FAN)
    for end in (0, 2)
  ]
  return (
    automaton.states,
    automaton.kinds,
    automaton.sets,
    len(automaton.members),
    len(arcs),
    int((-(-tokens // _CELL)).sum()),
    max(int(fan.sum()) for fan in fans),
    max(int(fan.max()) for fan in fans),
  )


@dataclasses.dataclass(frozen=True)
class Span:
  """The slots of a language in a row.

  Attributes:
    start: the first.
    stop: the one behind the last.
    closes: whether an end of text may stand in it: nothing follows.
  """

  start: int
  stop: int
  closes: bool

  @classmethod
  def of(cls, template: Sequence[int | None]) -> "Span":
    """Returns what lies between the first and the last slot to be sampled."""
    free = [i for i, token in enumerate(template) if token is None]
    if not free:
      return cls(0, 0, True)
    return cls(free[0], free[-1] + 1, free[-1] + 1 == len(template))


def placed(
  rows: Sequence[Sequence[int | None]],
  languages: Sequence[Automaton | None],
  *,
  spans: Sequence[tuple[int, int] | None],
  vocab: int,
  length: int,
  room: Room | None = None,
) -> Followed | None:
  """Returns the languages of rows on their canvases, if there are any.

  Args:
    rows: a canvas each: token ids, None where one is to be sampled.
    languages: of the rows, None for none.
    spans: (first, behind the last) slot of each; None for those between the
      first and the last that is sampled.
    vocab: tokens.
    length: slots of the canvas.
    room: bounds; None for those that are needed.

  Raises:
    ValueError: a row has no text of its language, or there is no room for one.
  """
  if room is None and not any(languages):
    return None
  made = []
  for row, language, span in zip(rows, languages, spans, strict=True):
    if language is None:
      made.append(None)
      continue
    if span is None:
      at = Span.of(row)
    elif 0 <= span[0] < span[1] <= len(row):
      at = Span(*span, span[1] == len(row))
    else:
      raise ValueError(
        f"the span of a language must lie in the row's {len(row)} slots, not at"
        f" {span}"
      )
    fits(language, row, at)
    made.append((language, at))
  return stack(made, vocab=vocab, length=length, room=room)


def stack(
  rows: Sequence[tuple[Automaton, Span] | None],
  *,
  vocab: int,
  length: int,
  room: Room | None = None,
) -> Followed:
  """Returns the languages of rows, checked by `fits` before, as arrays.

  Args:
    rows: an automaton and where it is to be followed; None for neither.
    vocab: tokens.
    length: slots of the canvas.
    room: bounds; None for those that are needed.

  Raises:
    ValueError: there is no room for one.
  """
  if room is None:
    room = Room.of([row[0] for row in rows if row is not None])
  made = [_row(row, vocab, length, room) for row in rows]
  fields = {
    name: np.stack([row[name] for row in made])
    for name in made[0]
    if not isinstance(made[0][name], tuple)
  }
  for name in ("out", "into"):
    parts, wholes = zip(*(row[name] for row in made), strict=True)
    fields[name] = Fan(parts=np.stack(parts), wholes=np.stack(wholes))
  return Followed(**fields, kinds=room.kinds)


def _row(row, vocab, length, room):
  """Returns the arrays of one row by name, with room behind them."""
  if row is None:
    nothing = np.zeros((0, 2), np.int32)
    automaton = Automaton(
      np.zeros(vocab, np.int32),
      nothing,
      np.zeros((0, 3), np.int32),
      np.ones(1, bool),
    )
    span = Span(0, 0, True)
  else:
    automaton, span = row
    room.check(automaton)
  inside = np.zeros(length, bool)
  inside[span.start : span.stop] = True
  final = automaton.accepting.copy()
  if automaton.ended >= 0 and not span.closes:
    final[automaton.ended] = False
  classes = np.zeros(vocab, np.int32)
  classes[: len(automaton.classes)] = automaton.classes[:vocab]
  cells, cell_class = _grouped(classes, _CELL, vocab, skip=1)
  arcs = automaton.arcs
  return {
    "classes": classes,
    "cells": _padded(cells, room.cells, vocab),
    "cell_class": _padded(cell_class, room.cells, room.kinds),
    "members": _members(automaton.members, room),
    "arcs": _padded(arcs, room.arcs, -1),
    "out": _fan(arcs[:, 0], room),
    "into": _fan(arcs[:, 2], room),
    "final": _padded(final, room.states, False),
    "inside": inside,
    "end_kind": np.int32(automaton.kinds - 1 if automaton.ended >= 0 else -1),
  }


def _members(members, room):
  made = _padded(members, room.members, 0)
  made[len(members) :, 0] = room.sets
  return made


def _padded(x: np.ndarray, size: int, fill) -> np.ndarray:
  made = np.full((size, *x.shape[1:]), fill, x.dtype)
  made[: len(x)] = x
  return made


def _grouped(of: np.ndarray, width: int, none: int, skip: int = 0):
  """Returns members of each group, so many in a row, and the rows' groups."""
  order = np.argsort(of, kind="stable")
  order = order[np.searchsorted(of[order], skip) :]
  group = of[order]
  count = np.bincount(group, minlength=1) if len(group) else np.zeros(1, int)
  begin = np.cumsum(count) - count
  rows = -(-count // width)
  row_begin = np.cumsum(rows) - rows
  rank = np.arange(len(group)) - begin[group]
  made = np.full((int(rows.sum()), width), none, np.int32)
  made[row_begin[group] + rank // width, rank % width] = order
  return made, np.repeat(np.arange(len(count), dtype=np.int32), rows)


def _fan(ends: np.ndarray, room: Room) -> tuple[np.ndarray, np.ndarray]:
  parts, state = _grouped(ends, _FAN, room.arcs)
  wholes = np.full((room.states, room.fans), room.parts, np.int32)
  if len(state):
    rank = np.arange(len(state)) - np.searchsorted(state, state)
    wholes[state, rank] = np.arange(len(state))
  return _padded(parts, room.parts, room.arcs), wholes


def fits(
  automaton: Automaton, template: Sequence[int | None], span: Span
) -> None:
  """Says whether a row has a text of the language, before it is sampled.

  Raises:
    ValueError: it has not; for people to read.
  """
  free = sum(token is None for token in template[span.start : span.stop])
  given = span.stop - span.start - free
  alive = automaton.accepting.copy()
  ended = automaton.ended
  if ended >= 0 and not span.closes:
    alive[ended] = False
  source, group, target = automaton.arcs.T
  has = np.zeros((automaton.sets, automaton.kinds), bool)
  has[automaton.members[:, 0], automaton.members[:, 1]] = True
  for slot in reversed(range(span.start, span.stop)):
    token = template[slot]
    way = alive[target]
    if token is not None:
      way = way & has[group, automaton.classes[token]]
    alive = np.zeros_like(alive)
    alive[source[way]] = True
  if alive[0]:
    return
  name, shortest = automaton.name, automaton.shortest
  if given:
    raise ValueError(
      f"the text that is given between the slots to be sampled is no part of any"
      f" text of {name} on {span.stop - span.start} slots: change one of the two"
    )
  if free < shortest:
    raise ValueError(
      f"no text of {name} fits {free} free slots: the shortest has {shortest}"
      " tokens; leave room for them"
    )
  raise ValueError(
    f"no text of {name} has exactly {free} tokens, the free slots, and no end of"
    f" text can stand behind a shorter one: the shortest has {shortest} tokens"
  )
