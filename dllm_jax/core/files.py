"""Files that are there whole or not at all."""

import os
import pathlib


def write_whole(path: pathlib.Path, text: str) -> None:
  """Writes a text aside and renames it, so that a kill leaves no half file."""
  temporary = path.with_suffix(f".{os.getpid()}.tmp")
  try:
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)
