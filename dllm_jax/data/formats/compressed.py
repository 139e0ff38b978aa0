"""Files as they are read: from any place, whatever compressed them.

A file that was cut off is an error, whichever library unpacks it, and all frames
of a `.zst` are read.
"""

import bz2
from collections.abc import Iterator
import contextlib
import gzip
import lzma
import posixpath
from typing import IO
import zlib

from dllm_jax.core import paths

BLOCK_BYTES = 2**20
_POINTER = b"version https://git-lfs"
# Reading past what a compressed file holds, or something else in its place.
# bz2 and Arrow say OSError.
_DAMAGED = (EOFError, OSError, lzma.LZMAError, zlib.error)


def _zstandard(file: IO[bytes]) -> IO[bytes]:
  # Arrow: it reads all frames and says where one is cut off, which zstandard's
  # readers do not.
  try:
    import pyarrow  # noqa: PLC0415  An extra.
  except ImportError as error:
    raise ImportError(
      ".zst files need pyarrow: pip install 'dllm_jax[parquet]'"
    ) from error
  return pyarrow.CompressedInputStream(
    pyarrow.PythonFile(file, mode="r"), "zstd"
  )


_UNPACK = {
  ".gz": gzip.open,
  ".bz2": bz2.open,
  ".xz": lzma.open,
  ".zst": _zstandard,
  ".zstd": _zstandard,
}


def suffixes(path: str) -> tuple[str, str]:
  """Returns the suffix of the content and that of the compression, or ""."""
  name, suffix = posixpath.splitext(path)
  if suffix in _UNPACK:
    return posixpath.splitext(name)[1], suffix
  return suffix, ""


@contextlib.contextmanager
def opened(path: str) -> Iterator[IO[bytes]]:
  """Opens a file for reading bytes, unpacked.

  Raises:
    ValueError: it is damaged or cut off, or only a pointer to a file.
    ImportError: what unpacks it is not installed.
  """
  compression = suffixes(path)[1]
  with paths.place(path).open("rb") as raw:
    if raw.read(len(_POINTER)) == _POINTER:
      raise ValueError(
        f"{path} is a Git LFS pointer, not the file; run git lfs pull"
      )
    raw.seek(0)
    if not compression:
      yield raw
      return
    try:
      with _UNPACK[compression](raw) as file:
        yield file
    except _DAMAGED as error:
      raise ValueError(
        f"{path} is damaged ({error}); it does not decompress, get it again"
      ) from error


def blocks(file: IO[bytes]) -> Iterator[bytes]:
  """Yields a file in blocks."""
  return iter(lambda: file.read(BLOCK_BYTES), b"")
