"""Files that define configurations: where they are and what they state.

A file defines `get_config() -> ConfigDict`; it may name another as its `base`.
What the fields mean is `config`'s matter.
"""

import ast
from collections.abc import Mapping
import importlib.util
import pathlib
from typing import Any

from dllm_jax.core import paths


def find(name: str) -> pathlib.Path:
  """Returns the file of a config: a path, or the name of a bundled one.

  Only a bare name, without a folder, is looked up among the bundled.

  Raises:
    FileNotFoundError: there is no such config.
  """
  path = paths.local(name)
  if path.is_file():
    return path
  if path.name == name:
    for directory in _directories():
      for candidate in (directory / name, directory / f"{name}.py"):
        if candidate.is_file():
          return candidate
  known = bundled()
  hint = f"; a bundled one is {path.stem!r}" if path.stem in known else ""
  raise FileNotFoundError(
    f"there is no config {name!r}{hint}; give a file, or one of:"
    f" {', '.join(known)}"
  )


def bundled() -> dict[str, str]:
  """Returns the bundled configs: name -> first line of the docstring."""
  files = {}
  for directory in _directories():
    for path in sorted(directory.glob("*.py")):
      tree = ast.parse(path.read_text(encoding="utf-8"))
      doc = ast.get_docstring(tree) or ""
      files.setdefault(path.stem, doc.split("\n")[0])
  return files


def _directories() -> list[pathlib.Path]:
  """Returns where bundled configs live: in the wheel, or in a checkout."""
  here = pathlib.Path(__file__).parent.parent
  return [d for d in (here / "configs", here.parent / "configs") if d.is_dir()]


_ASIDE = ("machines", "vocab_size")


def machines(name: str) -> dict[str, dict[str, Any]]:
  """Returns what a config changes for each machine that it was planned for."""
  return _stated(name).get("machines", {})


def vocab_size(name: str) -> int | None:
  """Returns the tokens of a published vocabulary, to plan without the data."""
  return _stated(name).get("vocab_size")


def _stated(name: str) -> dict[str, Any]:
  return _whole(find(name.partition(":")[0]))


def read(path: pathlib.Path) -> dict[str, Any]:
  """Returns what a file states, on top of the file that it names as `base`.

  Machines and vocabulary, which are for plans, are left out.

  Raises:
    FileNotFoundError: there is no such base.
    ValueError: the file has no get_config.
  """
  given = _whole(path)
  return {name: value for name, value in given.items() if name not in _ASIDE}


def _whole(path: pathlib.Path) -> dict[str, Any]:
  spec = importlib.util.spec_from_file_location("_dllm_jax_config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise ValueError(f"config {path} must define get_config() -> ConfigDict")
  given = module.get_config().to_dict()
  base = given.pop("base", None)
  if base is None:
    return given
  beside = path.parent / f"{base}.py"
  return merged(_whole(beside if beside.is_file() else find(base)), given)


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
