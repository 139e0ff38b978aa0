"""Writing a trace to a file, in the form that the file's name asks for."""

from collections.abc import Callable, Sequence
import os

from dllm_jax.core import paths
from dllm_jax.sampling.traces.picture import write_picture
from dllm_jax.sampling.traces.strip import write_strip
from dllm_jax.sampling.traces.trace import Trace, write_page

_WRITERS = {
  ".html": write_page,
  ".svg": write_strip,
  ".png": write_picture,
  ".gif": write_picture,
}


def check(path: str | os.PathLike[str]) -> None:
  """Raises ValueError unless a trace can be written to a file of this name."""
  if paths.place(path).suffix.lower() not in _WRITERS:
    raise ValueError(
      f"a trace is written to a file ending in {', '.join(_WRITERS)}, not "
      f"{str(path)!r}"
    )


def trace(
  path: str | os.PathLike[str],
  record: Trace,
  decode: Callable[[Sequence[int]], str],
) -> None:
  """Writes a trace.

  Args:
    path: the file; its suffix decides on the form.
    record: what happened.
    decode: the tokenizer: token ids to text.

  Raises:
    ValueError: another suffix.
  """
  check(path)
  path = paths.place(path)
  _WRITERS[path.suffix.lower()](path, record, decode)
