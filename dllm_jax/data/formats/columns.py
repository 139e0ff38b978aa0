"""Arrow's columns as texts: what Parquet and Arrow files share."""

from collections.abc import Callable, Iterator
import contextlib
import json
from typing import Any

from dllm_jax.core import paths
from dllm_jax.data.formats import base


def arrow() -> Any:
  """Returns pyarrow.

  Raises:
    ImportError: it is not installed.
  """
  try:
    import pyarrow  # noqa: PLC0415  An extra: only these files need it.
    import pyarrow.ipc  # noqa: PLC0415
    import pyarrow.parquet  # noqa: PLC0415
  except ImportError as error:
    raise ImportError(
      "Parquet and Arrow files need pyarrow: pip install 'dllm_jax[parquet]'"
    ) from error
  return pyarrow


def opened(path: str) -> Any:
  """Returns a file as Arrow reads it: by memory map where it is local."""
  pyarrow = arrow()
  if paths.in_bucket(path):
    return pyarrow.PythonFile(paths.place(path).open("rb"), mode="r")
  return pyarrow.memory_map(path)


@contextlib.contextmanager
def reading(
  path: str, kind: str, reader: Callable[[Any], Any]
) -> Iterator[Any]:
  """Gives what a function of Arrow makes of an opened file.

  Raises:
    ValueError: the file is not of its kind.
  """
  pyarrow = arrow()
  try:
    source = opened(path)
    file = reader(source)
  except (pyarrow.ArrowInvalid, EOFError) as error:
    raise ValueError(
      f"{path} is not {kind} file; legal files are {base.LEGAL}"
    ) from error
  with source, file:
    yield file


def column(names: list[str], field: str, path: str) -> str:
  """Returns the column that holds a field, or what the field lies in.

  Raises:
    ValueError: there is none.
  """
  head = field.partition(".")[0]
  for name in (field, head):
    if name in names:
      return name
  raise ValueError(
    f"{path} has no column {head!r}; its columns are: {', '.join(names)}; "
    "set text_field"
  )


def records(
  batch: Any, field: str | None, path: str
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields the records of a batch: of the column of a field, or of all.

  Arrow gives each record all fields that any has: in whole records, those that
  are null are left out.
  """
  names = batch.schema.names
  whole = field is None
  if not whole:
    names = [column(names, field, path)]
  where = path if whole else f"{path}: column {names[0]!r}"
  values = [_values(batch, name, whole) for name in names]
  for row in zip(*values, strict=True):
    record = dict(zip(names, row, strict=True))
    yield where, _present(record) if whole else record


def _values(batch: Any, name: str, sparse: bool) -> list[Any]:
  field = batch.schema.field(name)
  values = batch.column(name).to_pylist()
  decode = _decoder(field.type, field.metadata, sparse)
  return values if decode is None else [decode(value) for value in values]


def _present(record: dict[str, Any]) -> dict[str, Any]:
  return {k: v for k, v in record.items() if v is not None}


def _decoder(
  kind: Any, metadata: Any = None, sparse: bool = False
) -> Callable | None:
  """Returns what makes of Arrow's values what their JSON stands for, or None.

  Columns whose records differ in their fields are published as JSON in texts.

  Args:
    kind: the type of the values.
    metadata: what their field says of it.
    sparse: whether fields that are null are left out; not those of the JSON.
  """
  named = (metadata or {}).get(b"ARROW:extension:name", b"").decode()
  if "arrow.json" in (named, getattr(kind, "extension_name", "")):
    return lambda value: None if value is None else json.loads(value)
  types = arrow().types
  if types.is_struct(kind):
    fields = {f.name: _decoder(f.type, f.metadata, sparse) for f in kind}
    fields = {name: decode for name, decode in fields.items() if decode}
    if not fields and not sparse:
      return None

    def decoded(value):
      if value is None:
        return None
      value = value | {k: decode(value[k]) for k, decode in fields.items()}
      return _present(value) if sparse else value

    return decoded
  if any(
    is_list(kind)
    for is_list in (
      types.is_list,
      types.is_large_list,
      types.is_fixed_size_list,
    )
  ):
    inner = _decoder(kind.value_type, kind.value_field.metadata, sparse)
    return inner and (lambda value: value and [inner(v) for v in value])
  return None
