r"""Reads how likely labels are at the masks of canvases.

Labels of one token are read from one network call, all questions of a canvas
together. The tokens of longer ones are read from left to right, by the chain
rule log p(x) = \sum_i log p(x_i | x_1 ... x_{i-1}): a row for each beginning that
labels share, the other answers masked.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dllm_jax.core.types import Denoiser
from dllm_jax.sampling import requests
from dllm_jax.sampling.decisions.layout import Layout
from dllm_jax.sampling.launch import Looker
from dllm_jax.sampling.policies.ancestral import Ancestral
from dllm_jax.sampling.sampler import Sampler

_LABELS = 8  # tokens looked up at a slot, at least


class Reader:
  """Reads labels of a model; each shape is compiled once.

  Attributes:
    objective: what the network was trained for.
    rows: canvases in one call.
  """

  def __init__(
    self, objective: Any, denoiser: Denoiser, *, mesh: Any, rows: int = 16
  ):
    if hasattr(objective, "step_law"):
      raise ValueError(
        f"{type(objective).__name__} moves vectors: it has no law of a token to"
        " decide by"
      )
    if objective.opens or objective.two_passes:
      raise ValueError(
        f"{type(objective).__name__} reads text by a pass of its own: decisions"
        " are for networks that read a canvas in one"
      )
    self.objective, self.rows = objective, rows
    self._denoiser, self._mesh = denoiser, mesh
    self._lookers: dict[int, Looker] = {}

  def __call__(
    self, params: Any, process: Any, layouts: Sequence[Layout]
  ) -> list[list[np.ndarray]]:
    """Returns the log-probability of each label of each question, in nats."""
    asked = [_beginnings(layout) for layout in layouts]
    lines = [
      (i, begin, wanted)
      for i, of in enumerate(asked)
      for begin, wanted in of.items()
    ]
    found = self._looked(params, process, layouts, lines)
    known = {
      (i, begin, at): law
      for (i, begin, wanted), laws in zip(lines, found, strict=True)
      for at, law in zip(wanted, laws, strict=True)
    }
    return [
      [_total(i, q, layout, known) for q in range(len(layout.slots))]
      for i, layout in enumerate(layouts)
    ]

  def _looked(self, params, process, layouts, lines):
    """Returns for each line and each of its places {token: log-probability}."""
    rows, places, tokens = [], [], []
    for i, begin, wanted in lines:
      row = list(layouts[i].row)
      if begin is not None:
        q, prefix = begin
        first = layouts[i].slots[q]
        row[first : first + len(prefix)] = prefix
      begun = requests.begun(row, self.objective)
      before = len(begun) - len(row)
      rows.append(begun)
      places.append([at + before for at in wanted])
      tokens.append([sorted(wanted[at]) for at in wanted])
    out = []
    for start in range(0, len(rows), self.rows):
      part = slice(start, start + self.rows)
      out.extend(
        self._call(params, process, rows[part], places[part], tokens[part])
      )
    return [
      [
        dict(zip(t, law, strict=False))
        for t, law in zip(ts, laws, strict=False)
      ]
      for ts, laws in zip(tokens, out, strict=True)
    ]

  def _call(self, params, process, rows, places, tokens):
    multiple = self.objective.block_length or 1
    length = requests.bucket(max(map(len, rows)), multiple=multiple)
    wide = _power(max(map(len, places)), 1)
    many = _power(
      max((len(t) for ts in tokens for t in ts), default=1), _LABELS
    )
    count = self.rows if len(rows) > 1 else 1
    at = np.zeros((count, wide), np.int32)
    ids = np.zeros((count, wide, many), np.int32)
    for r, (slots, wanted) in enumerate(zip(places, tokens, strict=True)):
      at[r, : len(slots)] = slots
      for j, some in enumerate(wanted):
        ids[r, j, : len(some)] = some
    rows = [*rows, *[rows[0]] * (count - len(rows))]
    batch = requests.build(rows, objective=self.objective, length=length)
    with jax.set_mesh(self._mesh):
      law = self._looker(length)(params, process, batch, at, ids)
    return np.asarray(jax.device_get(law), np.float64)[: len(places)]

  def _looker(self, length: int) -> Looker:
    if length not in self._lookers:
      sampler = Sampler(
        policy=Ancestral(objective=self.objective, steps=1), length=length
      )
      self._lookers[length] = Looker(sampler, self._denoiser)
    return self._lookers[length]


def _power(size: int, least: int) -> int:
  return max(1 << (size - 1).bit_length(), least)


def _beginnings(layout: Layout):
  """Returns rows by what of a label stands: {place: tokens that are asked for}.

  The first of them, None, is that of no token, with all questions in it.
  """
  found = {None: {}}
  for q, (slot, labels) in enumerate(
    zip(layout.slots, layout.labels, strict=True)
  ):
    for label in labels:
      for i, token in enumerate(label):
        begin = None if i == 0 else (q, label[:i])
        places = found.setdefault(begin, {})
        places.setdefault(slot + i, set()).add(token)
  return found


def _total(i, q, layout, known) -> np.ndarray:
  """Returns the log-probability of each label of a question."""
  slot = layout.slots[q]
  of = lambda label: sum(
    known[i, None if j == 0 else (q, label[:j]), slot + j][token]
    for j, token in enumerate(label)
  )
  return np.array([of(label) for label in layout.labels[q]])
