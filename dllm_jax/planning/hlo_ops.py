"""Single operations of compiled programs: what they multiply, read and write."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
import math
import re

import numpy as np

from dllm_jax.planning.hlo_text import bytes_of, dims_of, Op


def ragged(operands: Sequence[Sequence[int]], out: Sequence[int]) -> float:
  """Returns 2 m k n of [m, k] by [groups, k, n], or of [m, k] and [m, n]."""
  inner = operands[-1][0] if len(out) > 2 else operands[0][1]
  return 2.0 * inner * math.prod(out[-2:])


def convolution(op: Op, left: Sequence[int], kernel: Sequence[int]) -> float:
  """Returns the FLOPs of a convolution; TPUs write matrix products as such.

  Only places of the window that lie on the input count, not those on padding or
  in holes: batched products are convolutions with little else.
  """
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest).groups()
  shapes = (left, kernel, dims_of(op.shape))
  left, kernel, out = (
    dict(zip(names, dims, strict=True))
    for names, dims in zip(labels, shapes, strict=True)
  )
  window = re.search(r"window=\{([^}]*)\}", op.rest)
  window = dict(part.split("=") for part in window[1].split()) if window else {}
  total = 2.0 * out["b"] * out["f"] * kernel["i"]
  for d in range(len(left) - 2):
    of = lambda name, none, d=d: window.get(name, "x".join([none] * 9)).split(
      "x"
    )[d]
    low = int(of("pad", "0_0").split("_")[0])
    stride, hole = int(of("stride", "1")), int(of("lhs_dilate", "1"))
    apart, d = int(of("rhs_dilate", "1")), str(d)
    at = np.arange(out[d])[:, None] * stride - low
    at = at + np.arange(kernel[d])[None] * apart
    inside = (at >= 0) & (at <= (left[d] - 1) * hole) & (at % hole == 0)
    total *= int(inside.sum())
  return total


_BY_PLACE = frozenset({
  "add", "convert", "divide", "exponential", "log", "maximum", "minimum",
  "multiply", "negate", "select", "subtract", "tanh",
})  # fmt: skip

Computations = Mapping[str, Mapping[str, Op]]


def called(op: Op) -> str:
  """Returns the computation that an operation consists of."""
  return re.search(r"(?:calls|to_apply|body)=%?([\w.\-~]+)", op.rest)[1]


def read(computations: Computations, fused: str, number: int) -> float:
  """Returns the bytes of a fusion's parameter that are read; inf for all.

  Fusions may hold others: TPUs write a product with a slice of stacked matrices
  as one in another.
  """
  inner = computations[fused]
  users = defaultdict(list)
  for user in inner.values():
    for place, name in enumerate(user.operands):
      users[name].append((user, place))
  whole = parameters(inner)[number]

  def of(name):
    return sum(one(user, place) for user, place in users[name])

  def one(user, place):
    if user.code in ("dynamic-slice", "gather", "slice") and place == 0:
      return bytes_of(user.shape, True)
    # Of what is computed place by place, a fusion computes what is used of it.
    alike = math.prod(dims_of(user.shape)) == math.prod(dims_of(whole.shape))
    by_place = user.code in _BY_PLACE and alike
    if (by_place or user.code == "pad") and not user.root:
      return of(user.name)
    if user.code == "dynamic-update-slice" and place == 0:
      return 0.0
    if user.code == "scatter" and place == 0:
      if replaces(computations, user):
        return 0.0
      return bytes_of(inner[user.operands[-1]].shape, True)
    if user.code == "bitcast":
      return of(user.name)
    if user.code == "fusion":
      return read(computations, called(user), place)
    return math.inf

  return of(whole.name)


def replaces(computations: Computations, scatter: Op) -> bool:
  """Returns whether a scatter writes over what is there, and does not read it."""
  inner = computations[called(scatter)].values()
  root = next(part for part in inner if part.root)
  return root.code == "parameter" and root.rest.startswith("1")


def parameters(inner: Mapping[str, Op]) -> dict[int, Op]:
  """Returns what a computation takes, by number."""
  return {
    int(re.match(r"\d+", op.rest)[0]): op
    for op in inner.values()
    if op.code == "parameter"
  }


def written(
  computations: Computations, fused: str, name: str, whole: float
) -> float:
  """Returns the bytes that a fusion writes to one of its results.

  Args:
    computations: all of them.
    fused: the fusion's.
    name: what makes the result.
    whole: bytes of the result.
  """
  inner = computations[fused]
  op = inner[name]
  while op.code == "bitcast":
    op = inner[op.operands[0]]
  if op.code == "fusion":
    root = next(o for o in computations[called(op)].values() if o.root)
    if root.code != "tuple":
      return written(computations, called(op), root.name, whole)
  changed = {"dynamic-update-slice": 1, "scatter": -1}.get(op.code)
  if changed is not None:
    return min(whole, bytes_of(inner[op.operands[changed]].shape, True))
  return whole
