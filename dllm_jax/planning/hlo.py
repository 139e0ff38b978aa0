"""Reading a compiled program: what one device multiplies, moves and sends.

XLA's own cost analysis counts the body of a loop once, and is empty for some
platforms. Here the text of the optimised program is read, and everything inside
a loop counts as often as the loop runs.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import math
import re

from dllm_jax.planning import hlo_ops
from dllm_jax.planning.hlo_loops import trips
from dllm_jax.planning.hlo_text import (
  ARRAY,
  bytes_of,
  computations,
  dims_of,
  group_of,
  names_in,
  Op,
)

_COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-permute",
  "ragged-all-to-all",
  "reduce-scatter",
)
# They move nothing themselves: names for what others made, or control.
_FREE = frozenset({
  "add-dependency", "after-all", "bitcast", "call", "conditional", "constant",
  "domain", "get-tuple-element", "opt-barrier", "optimization-barrier",
  "parameter", "partition-id", "replica-id", "tuple", "while",
})  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
  """One operation between devices.

  Attributes:
    kind: its name in XLA, "all-gather" and so on.
    size: bytes; of the group's whole array for all-gather and reduce-scatter, of
      one device for the others.
    group: the devices of one group, by their place in the mesh, flattened.
    times: how often it runs.
  """

  kind: str
  size: float
  group: tuple[int, ...]
  times: float

  @property
  def sent(self) -> float:
    """Bytes that each device sends, over all runs."""
    n = len(self.group)
    if self.kind == "collective-permute":
      return self.size * self.times
    double = 2 if self.kind == "all-reduce" else 1
    return double * self.size * (n - 1) / max(n, 1) * self.times


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
  """A hand-written kernel, of attention or of experts' products.

  Attributes:
    name: its own, or that of its library; "ragged" of experts' products.
    product: FLOPs of one of its products at all places; None if its shapes do
      not say.
    times: how often it runs.
  """

  name: str
  product: float | None
  times: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """What one device does in one run of a program.

  Attributes:
    flops: of matrix products.
    moved: bytes from and to its memory.
    collectives: operations between devices.
    kernels: those of attention; their FLOPs are in none of the above.
  """

  flops: float
  moved: float
  collectives: tuple[Collective, ...]
  kernels: tuple[Kernel, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
  """What one device does in one round of the innermost loops.

  Attributes:
    moved: bytes from and to its memory.
    written: for each array that an operation writes whole, its bytes, and how
      often in the round.
  """

  moved: float
  written: tuple[tuple[float, float], ...]

  def whole(self, size: float) -> float:
    """Returns how often an array of this many bytes, or up to twice, is written.

    Twice is the array in float32; what is larger is another. An upper bound for
    one array: others may have its size.
    """
    return sum(
      times for found, times in self.written if size <= found <= 2 * size
    )


def innermost(text: str, *, rounds: Sequence[int]) -> Round:
  """Returns the work of one round of the loops inside all others.

  Args:
    text: the optimised program.
    rounds: as in `read`; the innermost loops lie in as many as there are.
  """
  program, every = _Program(text), math.prod(rounds)
  moved, written = 0.0, []
  for computation, op, times, depth in program.walk(rounds):
    if depth < len(rounds):
      continue
    moved += times / every * program.moved(computation, op)
    for size in program.written(computation, op):
      written.append((size, times / every))
  return Round(moved=moved, written=tuple(written))


def read(text: str, *, devices: int, rounds: Sequence[int] = ()) -> Work:
  """Returns the work of a compiled program.

  Args:
    text: the optimised program, as `compiled.as_text()` has it.
    devices: devices that it runs on.
    rounds: how often loops run whose count the compiler does not know, the
      outermost first; the last one holds for all that are deeper.

  Raises:
    ValueError: such a loop does work that counts and no rounds are given.
  """
  program = _Program(text)
  flops, moved, collectives, kernels = 0.0, 0.0, [], []
  for computation, op, times, _ in program.walk(rounds):
    flops += times * program.flops(computation, op)
    moved += times * program.moved(computation, op)
    found = program.collective(computation, op, devices)
    if found is not None:
      collectives.append(dataclasses.replace(found, times=times))
    kernel = program.kernel(computation, op)
    if kernel is not None:
      kernels.append(dataclasses.replace(kernel, times=times))
  return Work(
    flops=flops,
    moved=moved,
    collectives=tuple(collectives),
    kernels=tuple(kernels),
  )


class _Program:
  """A module: operations by computation and name."""

  def __init__(self, text: str):
    self.computations, self.entry = computations(text)

  def walk(self, rounds: Sequence[int]) -> Iterator[tuple[str, Op, float, int]]:
    """Yields (computation, operation, how often it runs, how deep).

    Loops whose length is known to the compiler add no depth.
    """

    def visit(name, times, depth):
      for op in self.computations[name].values():
        yield name, op, times, depth
        if op.code == "while":
          known = trips(self.computations, name, op)
          body = hlo_ops.called(op)
          if known is not None:
            yield from visit(body, times * known, depth)
          else:
            count = rounds[min(depth, len(rounds) - 1)] if rounds else None
            yield from self._unknown(visit, body, times, count, depth + 1)
        elif op.code == "conditional":
          yield from self._taken(visit, op, times, depth)
        elif op.code in ("call", "async-start"):
          yield from visit(hlo_ops.called(op), times, depth)

    return visit(self.entry, 1.0, 0)

  def _unknown(self, visit, body, times, count, depth):
    inside = list(visit(body, times * (count or 1), depth))
    if count is None and any(self.flops(c, op) for c, op, *_ in inside):
      raise ValueError(
        "the program has a loop whose number of rounds is not known; give it"
      )
    return inside

  def _taken(self, visit, op, times, depth):
    names = re.search(r"branch_computations=\{([^}]*)\}", op.rest)
    if names:
      names = names_in(names[1])
    else:
      names = re.findall(r"(?:true|false)_computation=%?([\w.\-~]+)", op.rest)
    branches = [list(visit(name, times, depth)) for name in names]
    cost = lambda branch: sum(t * self.moved(c, o) for c, o, t, _ in branch)
    held = lambda name: any(
      self.kernel(name, op) for op in self.computations[name].values()
    )
    # Two kernels of one job: of attention, rows of one text are the usual ones.
    pick = min if names and all(map(held, names)) else max
    return pick(branches, key=cost, default=[])

  # ------------------------------------------------------------------ FLOPs

  def flops(self, computation: str, op: Op) -> float:
    """Returns 2 m k n for each product in an operation, fusions included."""
    if op.code == "fusion":
      return self._inside(hlo_ops.called(op))
    shapes = lambda i: self._shape(computation, op.operands[i])
    if op.code == "dot":
      left = dims_of(shapes(0))
      contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)
      inner = math.prod(left[int(i)] for i in contracted[1].split(",") if i)
      return 2.0 * inner * math.prod(dims_of(op.shape))
    if op.code == "convolution":
      return hlo_ops.convolution(op, dims_of(shapes(0)), dims_of(shapes(1)))
    return 0.0

  @functools.cache  # noqa: B019 -- lives as long as the program
  def _inside(self, computation: str) -> float:
    ops = self.computations[computation].values()
    return sum(self.flops(computation, op) for op in ops)

  def kernel(self, computation: str, op: Op) -> Kernel | None:
    """Returns the kernel that this is, or None.

    cuDNN's takes queries `[B, T, H, K]` and keys `[B, S, G, K]` first, and so
    does that of tiles after five small arrays, or that of caches, of all layers
    `[N, B, G, S, K]`, perhaps with keys `[B, T, G, K]` beside them; of experts'
    products, all that is no list is an operand.
    """
    if op.code != "custom-call":
      return None
    own = re.search(r"/(flash_\w+)/", op.rest)
    if own:
      shapes = [dims_of(self._shape(computation, n)) for n in op.operands]
      q, k, beside = shapes[5], shapes[6], shapes[9:10]
      slots = k[1] if len(k) == 4 else k[3] + sum(own[1] for own in beside)
      product = 2.0 * math.prod(q) * slots
      return Kernel(name=own[1], product=product, times=1.0)
    if "ragged_dot" in op.rest:
      shapes = [dims_of(self._shape(computation, n)) for n in op.operands]
      product = hlo_ops.ragged(
        [s for s in shapes if len(s) > 1], dims_of(op.shape)
      )
      return Kernel(name="ragged", product=product, times=1.0)
    target = re.search(r'custom_call_target="([^"]*)"', op.rest)[1]
    if target == "tpu_custom_call":
      return Kernel(name=op.name.split(".")[0], product=None, times=1.0)
    if "fmha" not in target:
      return None
    q, k = (dims_of(self._shape(computation, n)) for n in op.operands[:2])
    return Kernel(name=target, product=2.0 * math.prod(q) * k[1], times=1.0)

  # ----------------------------------------------------------------- memory

  def moved(self, computation: str, op: Op) -> float:
    """Returns bytes read and written in the device's memory.

    A slice of a larger array counts as large as the slice is, and what is
    written in place as large as what is written.
    """
    if op.code in _FREE or op.code.endswith("-done"):
      return 0.0
    if op.code == "fusion":
      return self._fusion(computation, op)
    shapes = [self._shape(computation, name) for name in op.operands]
    if op.code in ("dynamic-slice", "gather", "slice"):
      return 2.0 * bytes_of(op.shape)
    if op.code == "dynamic-update-slice":
      return 2.0 * bytes_of(shapes[1])
    if op.code == "scatter":
      over = hlo_ops.replaces(self.computations, op)
      return (2.0 if over else 3.0) * bytes_of(shapes[-1])
    if op.code == "copy-start":  # perhaps to or from memory on the chip
      return sum(map(bytes_of, shapes)) + sum(self.written(computation, op))
    if op.code.endswith("-start"):
      return 2.0 * sum(map(bytes_of, shapes))
    sizes = [bytes_of(shape) for shape in shapes]
    if "/flash_kept/" in op.rest:  # is given all layers' keys, and reads one's
      dims = map(dims_of, shapes)
      sizes = [
        s / d[0] if len(d) == 5 else s for s, d in zip(sizes, dims, strict=True)
      ]
    return float(sum(sizes) + bytes_of(op.shape))

  def _fusion(self, computation: str, op: Op) -> float:
    fused, total = hlo_ops.called(op), 0.0
    for number, name in enumerate(op.operands):
      part = hlo_ops.read(self.computations, fused, number)
      total += min(part, bytes_of(self._shape(computation, name)))
    return total + sum(self.written(computation, op))

  def written(self, computation: str, op: Op) -> list[float]:
    """Returns the bytes that an operation writes to each array that it makes."""
    if op.code in _FREE or op.code.endswith("-done"):
      return []
    if op.code == "fusion":
      fused = hlo_ops.called(op)
      parts = self.computations[fused].values()
      root = next(part for part in parts if part.root)
      names = root.operands if root.code == "tuple" else (root.name,)
      shapes = ARRAY.findall(op.shape)
      return [
        hlo_ops.written(
          self.computations, fused, name, bytes_of("{}[{}]{}".format(*shape))
        )
        for name, shape in zip(names, shapes, strict=False)
      ]
    place = {"dynamic-update-slice": 1, "scatter": -1}.get(op.code)
    if place is not None:
      return [bytes_of(self._shape(computation, op.operands[place]))]
    if op.code == "copy-start":  # (where to, where from, its state)
      return [bytes_of("{}[{}]{}".format(*ARRAY.search(op.shape).groups("")))]
    if op.code.endswith("-start"):
      return [bytes_of(self._shape(computation, name)) for name in op.operands]
    return [bytes_of(op.shape)]

  def _shape(self, computation: str, name: str) -> str:
    op = self.computations[computation].get(name)
    return op.shape if op else ""

  # ------------------------------------------------------------ collectives

  def collective(
    self, computation: str, op: Op, devices: int
  ) -> Collective | None:
    """Returns the operation between devices that this is, or None."""
    if op.code == "fusion":
      return self._fused(op, devices)
    kind = op.code.removesuffix("-start")
    if kind not in _COLLECTIVES:
      return None
    group = group_of(op.rest, devices)
    size = sum(bytes_of(self._shape(computation, n), True) for n in op.operands)
    size *= len(group) if kind == "all-gather" else 1
    return Collective(kind=kind, size=size, group=group, times=1.0)

  def _fused(self, op: Op, devices: int) -> Collective | None:
    """Returns what a fusion sends: TPUs fuse a reduce-scatter's two halves."""
    name = hlo_ops.called(op)
    inner = self.computations[name]
    for part in inner.values():
      found = self.collective(name, part, devices)
      if found is None:
        continue
      if found.kind == "all-reduce" and any(
        other.code == "dynamic-slice" for other in inner.values()
      ):
        return dataclasses.replace(found, kind="reduce-scatter")
      return found
    return None
