"""Files of problems: one JSON object a line, plain or compressed."""

from collections.abc import Iterator, Sequence
import contextlib
import gzip
import io
import json
import lzma
from typing import Any

from dllm_jax.core.paths import Path

_OPENERS = {".gz": gzip.open, ".xz": lzma.open}


def rows(
  path: Path, fields: Sequence[str], *, text: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields (line, object) of a JSONL file.

  Args:
    path: the file.
    fields: what each object must have.
    text: whether these fields must be text.

  Raises:
    ValueError: a line is something else; the message names file and line.
  """
  whole = _OPENERS.get(path.suffix, contextlib.nullcontext)
  with path.open("rb") as raw, whole(raw) as opened:
    file = io.TextIOWrapper(opened, encoding="utf-8")
    for number, line in enumerate(file, start=1):
      if not line.strip():
        continue
      try:
        row = json.loads(line)
      except json.JSONDecodeError as error:
        raise ValueError(
          f"{path}:{number} is not JSON ({error.msg}); write one object a line"
        ) from error
      kind = str if text else object
      if not isinstance(row, dict) or not all(
        f in row and isinstance(row[f], kind) for f in fields
      ):
        raise ValueError(
          f"{path}:{number} must be a JSON object with {'text in ' * text}"
          f"{' and '.join(fields)}"
        )
      yield number, row
