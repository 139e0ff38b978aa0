"""Pages of reference: the public names of each room, from their docstrings."""

import functools
import importlib
import inspect
import pathlib

PACKAGE = pathlib.Path(__file__).parents[2] / "dllm_jax"
OPTIONAL = {"dllm_jax.evaluation.harness"}  # wants lm-eval


@functools.cache
def rooms() -> list[str]:
  """Returns the dotted names of all rooms with public names."""
  found = []
  for path in sorted(PACKAGE.rglob("__init__.py")):
    own = path.parent.relative_to(PACKAGE.parent)
    name = ".".join(own.parts)
    if getattr(importlib.import_module(name), "__all__", ()):
      found.append(name)
  return found


def pages() -> list[dict[str, str]]:
  """Returns the navigation of the reference."""
  return [{name: f"reference/{name}.md"} for name in rooms()]


def written() -> dict[str, str]:
  """Returns the reference's pages by their paths."""
  found = {f"reference/{name}.md": _page(name) for name in rooms()}
  rows = [
    f"| [`{name}`]({name}.md) | {_first(importlib.import_module(name))} |"
    for name in rooms()
  ]
  table = "\n".join(["| room | holds |", "|---|---|", *rows])
  found["reference/README.md"] = f"# Reference\n\n{table}\n"
  return found


def _first(thing) -> str:
  return inspect.getdoc(thing).partition("\n\n")[0].replace("\n", " ")


def _page(name: str) -> str:
  room = importlib.import_module(name)
  parts = [f"# {name}\n\n{inspect.getdoc(room)}\n"]
  for public in room.__all__:
    thing = getattr(room, public)
    own = inspect.isclass(thing) or inspect.isfunction(thing)
    if not own or not thing.__module__.startswith("dllm_jax"):
      continue
    path = f"{thing.__module__}.{thing.__qualname__}"
    if _home(thing, public) == name:
      parts.append(f"::: {path}\n")
    else:
      parts.append(f"[`{public}`][{path}]: {_first(thing)}\n")
  return "\n".join(parts)


def _home(thing, public: str) -> str:
  """Returns the innermost room that names a thing: it is explained there."""
  naming = [
    room
    for room in rooms()
    if public in importlib.import_module(room).__all__
    and getattr(importlib.import_module(room), public) is thing
  ]
  return max(naming, key=len)
