"""Files that define configurations: where they are and what they state.

A file defines `get_config() -> ConfigDict`; it may name another as its `base`.
What the fields mean is `config`'s matter.
"""

import ast
from collections.abc import Mapping, Sequence
import os
import re
import types
from typing import Any

from dllm_jax.core import check, paths
from dllm_jax.core.paths import Path


def find(name: str) -> Path:
  """Returns the file of a config: a path, or the name of a bundled one.

  Only a bare name (`smoke`) is looked up among the bundled; one with a folder,
  a `~` or the suffix .py is the path of a file that must be there.

  Raises:
    FileNotFoundError: there is no such config.
    ValueError: there is a file, of another kind.
  """
  given = paths.expanded(name)
  path = paths.place(given)
  found = path if _is_path(given) else _directory() / f"{given}.py"
  if found.is_file() and found.suffix == ".py":
    return found
  if found.is_file():
    raise ValueError(
      f"{name} is no config: that is a .py file which defines get_config()"
    )
  known = bundled()
  hint = check.close(path.stem, known)
  if path.stem in known:  # of another folder
    hint = f"a bundled one is {path.stem!r}; "
  raise FileNotFoundError(
    f"there is no config {name!r}; {hint}give a .py file, or one of:"
    f" {', '.join(known)}"
  )


def _is_path(given: str) -> bool:
  return os.sep in given or given.endswith(".py")


def bundled() -> dict[str, str]:
  """Returns the bundled configs: name -> first line of the docstring."""
  files = {}
  for path in sorted(_directory().glob("*.py")):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    doc = ast.get_docstring(tree) or ""
    files[path.stem] = doc.split("\n")[0]
  return files


def _directory() -> Path:
  """Returns where bundled configs live: in the wheel, or in a checkout."""
  here = Path(__file__).parent.parent
  inside = here / "configs"
  return inside if inside.is_dir() else here.parent / "configs"


METHODS = ("diffu_grpo", "coupled_grpo", "tracerl", "espo", "spg", "wd1")
"""Names of the methods of reinforcement learning."""
LEARNING = ("reinforce", *METHODS)
"""Sections of `dllm reinforce`, which are no part of a run's configuration."""

_GRID = ("configs", "flops", "sizes", "seeds")
_ASIDE = ("machines", "variants", "vocab_size", "grid", *LEARNING)


def machines(name: str) -> dict[str, dict[str, Any]]:
  """Returns what a config changes for each machine that it was planned for."""
  return _stated(name).get("machines", {})


def methods(name: str) -> dict[str, dict[str, Any]]:
  """Returns what a config says of reinforcement learning, by section."""
  stated = _stated(name)
  return {k: dict(stated[k]) for k in LEARNING if k in stated}


def variants(name: str) -> dict[str, dict[str, Any]]:
  """Returns what a config changes for runs that it names besides its own."""
  return _stated(name).get("variants", {})


def grid(name: str) -> dict[str, Sequence[Any]]:
  """Returns the grid of `dllm scaling` that a config states, by flag.

  Raises:
    ValueError: it states none, or something else.
  """
  stated = _stated(name).get("grid", {})
  unknown = [field for field in stated if field not in _GRID]
  if unknown or not stated:
    wrong = f"grid.{unknown[0]}, which is unknown" if unknown else "no grid"
    raise ValueError(
      f"config {name} states {wrong}; a grid has {', '.join(_GRID)}"
    )
  return dict(stated)


def vocab_size(name: str) -> int | None:
  """Returns the tokens of a published vocabulary, to plan without the data."""
  return _stated(name).get("vocab_size")


def _stated(name: str) -> dict[str, Any]:
  return _whole(find(split(name)[0]))


def split(name: str) -> tuple[str, str]:
  """Returns the file and the size of "FILE:SIZE"; "" for no size."""
  file, *size = re.split(r":(?!//)", name, maxsplit=1)
  return file, "".join(size)


def read(path: Path) -> dict[str, Any]:
  """Returns what a file states, on top of the file that it names as `base`.

  Machines and vocabulary, which are for plans, grids and methods are left out.

  Raises:
    FileNotFoundError: there is no such base.
    ValueError: the file has no get_config, or is its own base.
  """
  given = _whole(path)
  return {name: value for name, value in given.items() if name not in _ASIDE}


def _whole(path: Path, above: Sequence[Path] = ()) -> dict[str, Any]:
  """Returns what a file and its bases state; `above` it are those it is for."""
  module = types.ModuleType("_dllm_jax_config")
  module.__file__ = str(path)
  code = compile(path.read_text(encoding="utf-8"), str(path), "exec")
  exec(code, module.__dict__)
  if not hasattr(module, "get_config"):
    raise ValueError(f"config {path} must define get_config() -> ConfigDict")
  given = module.get_config().to_dict()
  name = given.pop("base", None)
  if name is None:
    return given
  chain = [*above, paths.absolute(path)]
  base = _base(name, path)
  if paths.absolute(base) in chain:
    names = " -> ".join(str(p) for p in [*chain, paths.absolute(base)])
    raise ValueError(f"config {path} is its own base: {names}")
  return merged(_whole(base, chain), given)


def _base(name: str, path: Path) -> Path:
  """Returns the file that `path` names as its base.

  A path starts in the folder of the file that says it, wherever the command
  runs; a bare name is another file there, else a bundled config.
  """
  given = paths.expanded(name)
  if _is_path(given):
    return find(str(path.parent / given))
  beside = path.parent / f"{given}.py"
  other = beside.is_file() and paths.absolute(beside) != paths.absolute(path)
  return beside if other else find(given)


def merged(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the sections of `base` with the fields of `given` replaced.

  Where `name` differs, the fields of another class do not apply.
  """
  result = {
    section: fields if section in _ASIDE else dict(fields)
    for section, fields in base.items()
  }
  for section, fields in given.items():
    if section in _ASIDE:
      result[section] = fields
      continue
    old = result.get(section, {})
    other = "name" in fields and fields["name"] != old.get("name")
    result[section] = dict(fields) if other else old | dict(fields)
  return result
