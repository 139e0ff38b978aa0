"""Paths as users type them."""

import os
import pathlib


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


def local(given: str | os.PathLike) -> pathlib.Path:
  """Returns `expanded` as a path.

  Raises:
    ValueError: nobody here has the home directory that it names.
  """
  return pathlib.Path(expanded(os.fspath(given)))
