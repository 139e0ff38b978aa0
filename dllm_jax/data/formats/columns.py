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


def column(names: list[str], form: base.Format, path: str) -> str:
  """Returns the column that holds the text, or what the text lies in.

  Raises:
    ValueError: there is none.
  """
  head = form.text_field.partition(".")[0]
  for name in (form.text_field, head):
    if name in names:
      return name
  raise ValueError(
    f"{path} has no column {head!r}; its columns are: {', '.join(names)}; "
    "set text_field"
  )


def documents(
  batch: Any, form: base.Format, path: str
) -> Iterator[base.Document]:
  """Yields the documents of a batch of records; those without text too."""
  name = column(batch.schema.names, form, path)
  field = batch.schema.field(name)
  values = batch.column(name).to_pylist()
  decode = _decoder(field.type, field.metadata)
  rest = form.text_field[len(name) + 1 :]
  for value in values if decode is None else map(decode, values):
    record, inner = (value, rest) if rest else ({name: value}, name)
    for text in base.texts(record, inner, f"{path}: column {name!r}"):
      yield base.Document(text, path)


def _decoder(kind: Any, metadata: Any = None) -> Callable | None:
  """Returns what makes of Arrow's values what their JSON stands for, or None.

  Columns whose records differ in their fields are published as JSON in texts.
  """
  named = (metadata or {}).get(b"ARROW:extension:name", b"").decode()
  if "arrow.json" in (named, getattr(kind, "extension_name", "")):
    return lambda value: None if value is None else json.loads(value)
  types = arrow().types
  if types.is_struct(kind):
    fields = {f.name: _decoder(f.type, f.metadata) for f in kind}
    fields = {k: v for k, v in fields.items() if v}
    return (
      fields
      and (
        lambda value: (
          value
          and value | {k: decode(value[k]) for k, decode in fields.items()}
        )
      )
      or None
    )
  if any(
    is_list(kind)
    for is_list in (
      types.is_list,
      types.is_large_list,
      types.is_fixed_size_list,
    )
  ):
    inner = _decoder(kind.value_type, kind.value_field.metadata)
    return inner and (lambda value: value and [inner(v) for v in value])
  return None
