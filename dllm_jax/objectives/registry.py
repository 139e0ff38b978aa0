"""Which objectives there are: the files of this folder, and entry points.

An objective is found by the name of its module, whose class has the same name
without case and underscores. Nothing else is ever imported by a name that stands
in a file.
"""

import functools
import importlib
import importlib.metadata
import pkgutil

from dllm_jax.core.paths import Path


@functools.cache
def _files() -> dict[str, str]:
  """Returns the modules of this folder by name."""
  package = Path(__file__).parent
  return {
    m.name: f"dllm_jax.objectives.{m.name}"
    for m in pkgutil.iter_modules([str(package)])
  }


@functools.cache
def objectives() -> dict[str, str]:
  """Returns what diffuses, by name: files of `objectives/`, then entry points.

  Nothing else is ever imported by a name that stands in a file.
  """
  found = dict(_files())
  for entry in importlib.metadata.entry_points(group="dllm_jax.objectives"):
    found.setdefault(entry.name, entry.value)
  return {k: v for k, v in sorted(found.items()) if _diffuses(_class_in(k, v))}


def _diffuses(found: type | None) -> bool:
  return found is not None and getattr(found, "diffuses", True)


def _class_in(name: str, module: str) -> type | None:
  """Returns the class of a module whose name is the module's, without case."""
  wanted = name.replace("_", "").lower()
  for key, value in vars(importlib.import_module(module)).items():
    if key.lower() == wanted and isinstance(value, type):
      return value
  return None


def objective_class(name: str) -> type:
  """Returns the class of an objective.

  Raises:
    KeyError: there is no such objective.
  """
  # One of this folder without a look at the others, or at what is installed.
  known = _files() if name in _files() else objectives()
  found = _class_in(name, known[name]) if name in known else None
  if found is None:
    legal = ", ".join(objectives())
    raise KeyError(f"unknown objective {name!r}; legal: {legal}")
  return found
