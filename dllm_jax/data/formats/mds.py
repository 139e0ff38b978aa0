"""MosaicML's MDS shards, which describe themselves.

A shard is a count, the places where its samples begin and end, how they are
encoded, and the samples:

    uint32 n | uint32 begin[n + 1] | JSON of columns | sample 0 | sample 1 ...
    sample: uint32 size of each column of varying size | column 0 | column 1 ...
"""

from collections.abc import Callable, Iterator
import json
from typing import Any, IO

import numpy as np

from dllm_jax.data.formats import base, compressed

_DECODE = {"str": bytes.decode, "json": json.loads}


def spans(path: str, form: base.Format, span_bytes: int) -> list[base.Span]:
  """Returns the pieces of a shard; a packed one is a single piece."""
  if compressed.suffixes(path)[1]:
    return [base.Span(path)]
  with compressed.opened(path) as file:
    begin, _ = _head(file, path)
  pieces = (begin[:-1].astype(np.int64) - int(begin[0])) // span_bytes
  first = np.flatnonzero(np.diff(pieces, prepend=-1)).tolist()
  return [
    base.Span(path, a, b)
    for a, b in zip(first, [*first[1:], None], strict=True)
  ]


def records(
  span: base.Span, field: str | None = None
) -> Iterator[tuple[str, Any]]:
  """Yields the records of a piece.

  Raises:
    ValueError: no such column, it holds neither text nor JSON, or the shard is
      damaged.
  """
  path = span.path
  with compressed.opened(path) as file:
    begin, columns = _head(file, path)
    wanted = _wanted(columns, field, path)
    sizes = columns["column_sizes"]
    stop = len(begin) - 1 if span.stop is None else span.stop
    if span.start:
      file.seek(int(begin[span.start]))
    for i in range(span.start, stop):
      sample = _exactly(file, int(begin[i + 1]) - int(begin[i]), path)
      yield (
        f"{path}: sample {i}",
        {
          name: decode(_column(sample, sizes, at))
          for name, (at, decode) in wanted.items()
        },
      )


def _wanted(
  columns: dict[str, Any], field: str | None, path: str
) -> dict[str, tuple[int, Callable]]:
  """Returns where the columns to read are, and what decodes each."""
  names, kinds = columns["column_names"], columns["column_encodings"]
  if field is None:
    return {
      name: (at, _DECODE[kind])
      for at, (name, kind) in enumerate(zip(names, kinds, strict=True))
      if kind in _DECODE
    }
  head = field if field in names else field.partition(".")[0]
  if head not in names:
    raise ValueError(
      f"{path} has no column {head!r}; its columns are: {', '.join(names)}; "
      "set text_field"
    )
  at = names.index(head)
  if kinds[at] not in _DECODE:
    raise ValueError(
      f"{path}: column {head!r} holds {kinds[at]}, not text; set text_field"
    )
  return {head: (at, _DECODE[kinds[at]])}


def _head(file: IO[bytes], path: str) -> tuple[np.ndarray, dict[str, Any]]:
  """Returns where samples begin, and the columns; the file stands at sample 0."""
  n = int.from_bytes(_exactly(file, 4, path), "little")
  begin = np.frombuffer(_exactly(file, 4 * (n + 1), path), "<u4")
  try:
    config = _exactly(file, int(begin[0]) - 4 * (n + 2), path)
    columns = json.loads(config)
    columns["column_names"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{path} is not an MDS shard, or damaged") from error
  return begin, columns


def _exactly(file: IO[bytes], size: int, path: str) -> bytes:
  data = file.read(size) if size >= 0 else b""
  if len(data) != size:
    raise ValueError(f"{path} is not an MDS shard, or cut off; get it again")
  return data


def _column(sample: bytes, sizes: list[int | None], at: int) -> bytes:
  """Returns the bytes of a column of a sample."""
  varying = sizes.count(None)
  given = iter(np.frombuffer(sample, "<u4", varying).tolist())
  each = [next(given) if size is None else size for size in sizes]
  start = 4 * varying + sum(each[:at])
  return sample[start : start + each[at]]
