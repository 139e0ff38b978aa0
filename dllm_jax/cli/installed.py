"""What is installed, and whether it goes together; asked before jax is imported.

Read from the packages' metadata. This file and `main` also load on Pythons that
are too old for the rest, to say so.
"""

# Old Pythons cannot evaluate the annotations.
from __future__ import annotations

import importlib.metadata
import os
import sys

PYTHON = (3, 11)
OLDEST = {"jax": "0.10.2", "flax": "0.12.8"}
"""The oldest versions that are tested, as in pyproject.toml."""

# Extras of jax that name the plugin of a platform, and who states its versions.
_PLUGINS = {
  "libtpu": ("jax", "tpu"),
  "jax-cuda12-plugin": ("jax", "cuda12"),
  "jax-cuda13-plugin": ("jax", "cuda13"),
  "jax-cuda12-pjrt": ("jax-cuda12-plugin", ""),
  "jax-cuda13-pjrt": ("jax-cuda13-plugin", ""),
}
# Fusion of products by YNNPACK: `parallel.compilation` says what is wrong with it.
# Only for versions that know the flag: XLA aborts at one that it does not know.
_FLAG = "--xla_cpu_experimental_ynn_fusion_type="
_FLAGGED = ("0.10.2", "0.12.0.1")


def problem(command: str) -> str | None:
  """Returns what does not go together, in a line with what is wanted, or None.

  Args:
    command: what is to run; plans use plugins of machines that are not here.
  """
  if sys.version_info < PYTHON:
    return (
      f"Python {sys.version.split()[0]} ({sys.executable}) is too old: dllm_jax"
      f" needs {'.'.join(map(str, PYTHON))} or newer"
    )
  for name, oldest in OLDEST.items():
    found = version(name)
    if found is None or _older(found, oldest):
      return (
        f"{name} {found or 'is missing'}{' is too old' if found else ''}:"
        f" dllm_jax needs {oldest} or newer: pip install '{name}>={oldest}'"
      )
  platforms = os.environ.get("JAX_PLATFORMS", "")
  for name, (owner, extra) in {"jaxlib": ("jax", ""), **_PLUGINS}.items():
    kind = "tpu" if name == "libtpu" else "cuda"
    unused = platforms and kind not in platforms and "gpu" not in platforms
    if name in _PLUGINS and unused and command != "plan":
      continue
    found, wanted = version(name), _wanted(name, owner, extra)
    if found and wanted and not wanted.contains(found, prereleases=True):
      renewed = f"jax[{extra}]" if extra else owner
      return (
        f"{name} {found} does not go with {owner} {version(owner)}, which wants"
        f" {name}{wanted}: pip install '{renewed}=={version(owner)}'"
      )
  return None


def prevent_wrong_products() -> None:
  """Keeps XLA's wrong products on CPUs out of every program of this process."""
  flags, found = os.environ.get("XLA_FLAGS", ""), version("jaxlib")
  if "jax" in sys.modules or found is None or _FLAG in flags:
    return  # XLA reads the flags once, or has them
  oldest, newest = _FLAGGED
  if not _older(found, oldest) and not _older(newest, found):
    os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}".strip()


def version(name: str) -> str | None:
  """Returns the version of a package, None where it is not installed."""
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


def _older(one: str, other: str) -> bool:
  from packaging.version import Version

  return Version(one) < Version(other)


def _wanted(name: str, owner: str, extra: str):
  """Returns the versions of a package that its owner's metadata asks for."""
  from packaging.requirements import Requirement

  if version(owner) is None:
    return None
  asked_for = importlib.metadata.requires(owner) or ()
  for needs in map(
    Requirement, filter(lambda t: t.startswith(name), asked_for)
  ):
    asked = needs.marker is None or needs.marker.evaluate({"extra": extra})
    if needs.name == name and asked and needs.specifier:
      return needs.specifier
  return None
