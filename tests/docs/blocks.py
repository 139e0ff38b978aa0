"""Blocks of code as pages and notebooks show them, and what marks them.

A block that is not run has a comment before it that says why not:
`<!-- not run: wants a GPU -->`.
"""

import json
import pathlib
import re
import shlex
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [
  ROOT / "README.md",
  ROOT / "launch" / "README.md",
  *sorted((ROOT / "docs").rglob("*.md")),
]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
_FENCE = re.compile(
  r"(?:<!-- not run: (?P<why>[^\n]+?) -->\n+)?^(?P<ticks>`{3,})(?P<kind>\w*)"
  r"[^\n]*\n(?P<text>.*?)^(?P=ticks)$",
  re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
  """A fenced block.

  Attributes:
    page: the file it is in.
    kind: its language.
    text: what it holds.
    why: why it is not run; None if it is.
  """

  page: pathlib.Path
  kind: str
  text: str
  why: str | None

  def __str__(self) -> str:
    return f"{self.page.name}: {self.text.strip().splitlines()[0][:40]}"


def texts(page: pathlib.Path) -> str:
  """Returns a page's text, or what is written between a notebook's cells."""
  text = page.read_text(encoding="utf-8")
  if page.suffix == ".md":
    return text
  cells = json.loads(text)["cells"]
  shown = [c for c in cells if c["cell_type"] == "markdown"]
  return "\n\n".join("".join(cell["source"]) for cell in shown)


def blocks(*kinds: str) -> list[Block]:
  """Returns all blocks of some languages."""
  return [
    Block(page, found["kind"], found["text"], found["why"])
    for page in (*PAGES, *NOTEBOOKS)
    for found in _FENCE.finditer(texts(page))
    if found["kind"] in kinds
  ]


def commands(text: str) -> list[list[str]]:
  """Returns the commands of a shell block, without its comments."""
  lines = text.replace("\\\n", " ").splitlines()
  found = [shlex.split(line, comments=True) for line in lines]
  return [words for words in found if words]
