"""The text of compiled programs (HLO): operations, shapes, groups of devices."""

import dataclasses
import math
import re

import numpy as np

ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-~]+) \(.*\{$")
_NAME = re.compile(r"%([\w.\-~]+)")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-~]+) = (.*)$")
_BITS = {"pred": 8, "token": 0, "opaque": 0}


@dataclasses.dataclass(frozen=True)
class Op:
  """One operation.

  Attributes:
    name: its name in its computation.
    shape: type, dimensions and layout of what it makes.
    code: what it does, "dot", "fusion" and so on.
    operands: names of what it takes.
    rest: its attributes; of constants and parameters, value and number.
    root: whether its computation returns it.
  """

  name: str
  shape: str
  code: str
  operands: tuple[str, ...]
  rest: str
  root: bool


def computations(text: str) -> tuple[dict[str, dict[str, Op]], str]:
  """Returns operations by computation and name, and the entry's name.

  Raises:
    ValueError: the text is no module.
  """
  found: dict[str, dict[str, Op]] = {}
  entry = current = None
  for line in text.splitlines():
    if current is None:
      head = _HEAD.match(line)
      if head:
        current = found.setdefault(head[2], {})
        entry = head[2] if head[1] else entry
    elif line == "}" or line.startswith("}, "):  # the thread that it runs on
      current = None
    else:
      op = _parse(line)
      if op is not None:
        current[op.name] = op
  if entry is None:
    raise ValueError("this text is no HLO module: it has no ENTRY")
  return found, entry


def _parse(line: str) -> Op | None:
  match = _LINE.match(line)
  if match is None:
    return None
  root, name, text = match.groups()
  end = _closing(text, 0) if text.startswith("(") else text.index(" ") - 1
  shape, text = text[: end + 1], text[end + 1 :].lstrip()
  opening = text.index("(")
  closing = _closing(text, opening)
  operands, rest = text[opening + 1 : closing], text[closing + 1 :]
  code = text[:opening]
  return Op(
    name=name,
    shape=shape,
    code=code,
    operands=tuple(names_in(operands)),
    rest=operands if code in ("constant", "parameter") else rest,
    root=bool(root),
  )


def names_in(text: str) -> list[str]:
  """Returns the names that a text mentions."""
  return _NAME.findall(text)


def _closing(text: str, start: int) -> int:
  depth = 0
  for i in range(start, len(text)):
    depth += {"(": 1, ")": -1}.get(text[i], 0)
    if depth == 0:
      return i
  raise ValueError(f"unbalanced brackets in {text[:80]!r}")


def dims_of(shape: str) -> tuple[int, ...]:
  """Returns the dimensions of an array's shape."""
  return tuple(int(d) for d in ARRAY.search(shape)[2].split(",") if d)


def bytes_of(shape: str, everywhere: bool = False) -> float:
  """Returns the bytes of a shape that lie in the device's main memory.

  Layouts name other memories as S(n): a TPU's on-chip memory, the host's.
  """
  total = 0.0
  for kind, dims, layout in ARRAY.findall(shape):
    if "S(" in layout and not everywhere:
      continue
    bits = _BITS.get(kind)
    if bits is None:
      bits = int((re.search(r"\d+", kind) or [8])[0])
    total += math.prod(int(d) for d in dims.split(",") if d) * bits / 8
  return total


def source(ops: dict[str, Op], name: str) -> Op | None:
  """Returns the operation that made a value, behind copies."""
  op = ops.get(name)
  while op is not None and op.code in ("bitcast", "copy"):
    op = ops.get(op.operands[0])
  return op


def place_of(op: Op | None) -> int | None:
  """Returns which element of a loop's carry a value is."""
  if op is None or op.code != "get-tuple-element":
    return None
  return int(re.search(r"index=(\d+)", op.rest)[1])


def group_of(rest: str, devices: int) -> tuple[int, ...]:
  """Returns the devices of the first group of a collective."""
  pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest)
  if pairs:
    return tuple(map(int, pairs.groups()))
  listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
  if listed:
    return tuple(map(int, listed[1].split(",")))
  iota = re.search(
    r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest
  )
  if iota:
    return tuple(_iota(*iota.group(2, 3)).reshape(_ints(iota[1]))[0].tolist())
  mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}", rest)
  if mesh:
    return _of_mesh(*mesh.groups())
  return tuple(range(devices))


def _ints(text: str) -> tuple[int, ...]:
  return tuple(int(i) for i in text.split(",") if i)


def _iota(dims: str, order: str | None) -> np.ndarray:
  ids = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
  return (ids.transpose(_ints(order)) if order else ids).reshape(-1)


def _of_mesh(axes: str, ids: str, chosen: str) -> tuple[int, ...]:
  """Returns the first group along some axes of a mesh, or parts of axes.

  `'a':(m)k` is the part of axis a that has size k and m groups before it.
  """
  sizes = {
    name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)
  }
  order = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", ids)
  count = math.prod(sizes.values())
  places = _iota(*order.groups()) if order else np.arange(count)
  taken = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)
  dims, kept = [], []
  for name, size in sizes.items():
    parts = [(int(m), int(k)) for n, m, k in taken if n == name and k]
    if not parts:
      kept += [len(dims)] if any(n == name for n, _, _ in taken) else []
      dims.append(size)
      continue
    at = 1
    for before, part in sorted(parts):
      dims += [before // at, part]
      kept.append(len(dims) - 1)
      at = before * part
    dims.append(size // at)
  rest = [i for i in range(len(dims)) if i not in kept]
  places = places.reshape(dims).transpose(*rest, *kept)
  return tuple(places.reshape(-1, math.prod(dims[i] for i in kept))[0].tolist())
