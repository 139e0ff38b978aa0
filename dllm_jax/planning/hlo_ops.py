"""Single operations of compiled programs: what they multiply, read and write."""

from collections.abc import Sequence
import math
import re

import numpy as np

from dllm_jax.planning.hlo_text import bytes_of, dims_of, Op


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


def read(part: Op, users, inner: dict[str, Op]) -> float:
  """Returns the bytes of a fusion's parameter that are read."""
  total = 0.0
  for user, place in users[part.name]:
    if user.code in ("dynamic-slice", "gather", "slice") and place == 0:
      total += bytes_of(user.shape, True)
    elif user.code == "dynamic-update-slice" and place == 0:
      continue
    elif user.code == "scatter" and place == 0:
      total += bytes_of(inner[user.operands[-1]].shape, True)
    elif user.code == "bitcast":
      total += read(user, users, inner)
    else:
      return math.inf
  return total


def written(inner: dict[str, Op], name: str, whole: float) -> float:
  """Returns the bytes that a fusion writes to one of its results."""
  op = inner[name]
  while op.code == "bitcast":
    op = inner[op.operands[0]]
  changed = {"dynamic-update-slice": 1, "scatter": -1}.get(op.code)
  if changed is not None:
    return min(whole, bytes_of(inner[op.operands[changed]].shape, True))
  return whole
