"""Paths as users type them."""

import os
import pathlib


def local(given: str | os.PathLike) -> pathlib.Path:
  """Returns a path in which `~` is the home directory.

  Shells leave it alone after `--flag=`; a folder of that name is never meant.

  Raises:
    ValueError: nobody here has the home directory that it names.
  """
  try:
    return pathlib.Path(given).expanduser()
  except RuntimeError as error:
    raise ValueError(
      f"{given}: there is no such home directory; write the path out"
    ) from error
