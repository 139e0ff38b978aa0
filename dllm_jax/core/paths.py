"""Places as users name them: local paths, `~/...`, and buckets."""

import os
import pathlib
import re

from etils import epath

Path = epath.Path
"""A place: local, `gs://bucket/...` or `s3://bucket/...`."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")


def expanded(given: str) -> str:
  """Returns a path in which a leading `~` is the home directory.

  Shells leave it alone after `--flag=`; a folder of that name is never meant.
  Anything else stays as it was typed: `./shakespeare` is a folder and
  `shakespeare` a text that comes with the package.

  Raises:
    ValueError: nobody here has the home directory that it names.
  """
  if not given.startswith("~"):
    return given
  try:
    return str(pathlib.Path(given).expanduser())
  except RuntimeError as error:
    raise ValueError(
      f"{given}: there is no such home directory; write the path out"
    ) from error


def place(given: str | os.PathLike) -> Path:
  """Returns the place that a user names.

  Raises:
    ValueError: nobody here has the home directory that it names, or it lies
      where nothing here reads.
  """
  name = expanded(os.fspath(given))
  scheme = _SCHEME.match(name)
  if scheme and not name.startswith(("gs://", "s3://")):
    raise ValueError(
      f"{name}: {scheme[1]}: is no place that is known; take a local path, "
      "~/..., gs://bucket/... or s3://bucket/..."
    )
  return Path(name)


def in_bucket(path: str | os.PathLike) -> bool:
  """Whether a place is in an object store, where nothing can be renamed."""
  return os.fspath(path).startswith(("gs://", "s3://"))


def local(given: str | os.PathLike) -> pathlib.Path:
  """Returns `place` as the standard library's path, which only a local one has.

  Raises:
    ValueError: it is in a bucket, or `place` does not know it.
  """
  path = place(given)
  if in_bucket(path):
    raise ValueError(f"{path}: this has to be a local path")
  return pathlib.Path(os.fspath(path))
