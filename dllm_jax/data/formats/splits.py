"""The splits of a dataset repository, as the hub finds them.

In this order: `dataset_dict.json` of a saved dictionary; the configurations that
the head of the card (`README.md`) lists; whole words in paths.
"""

import collections
from collections.abc import Mapping, Sequence
import fnmatch
import json
import posixpath
import re
from typing import Any

from dllm_jax.core import paths

_WORDS = {
  "train": ("train", "training"),
  "validation": ("validation", "valid", "dev", "val"),
  "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT = {word: split for split, words in _WORDS.items() for word in words}


def of(root: str, files: Sequence[str]) -> dict[str, list[str]]:
  """Returns the files of each split of a folder.

  Where nothing names a split, all are "train"; where only some files have one,
  the others are under "no split".
  """
  relative = {f: f[len(root.rstrip("/")) + 1 :] for f in files}
  found = _saved(root, relative) or _card(root, relative)
  if found:
    return found
  found = collections.defaultdict(list)
  for path, name in relative.items():
    words = re.split(r"[-._ 0-9/]+", name.lower())
    named = sorted({_SPLIT[w] for w in words if w in _SPLIT})
    found[" and ".join(named) or "no split"].append(path)
  if set(found) <= {"no split"}:
    return {"train": list(files)}
  return dict(found)


def _saved(root: str, relative: Mapping[str, str]) -> dict[str, list[str]]:
  """Returns the splits of a dictionary of saved datasets."""
  file = paths.place(root) / "dataset_dict.json"
  if not file.exists():
    return {}
  names = json.loads(file.read_text())["splits"]
  return {
    split: [f for f, name in relative.items() if name.startswith(f"{split}/")]
    for split in names
  }


def _card(root: str, relative: Mapping[str, str]) -> dict[str, list[str]]:
  """Returns the splits of the card's default configuration, if it has any.

  With several configurations and no default, each is under its own name.
  """
  file = paths.place(root) / "README.md"
  head = file.read_text().split("---\n") if file.exists() else []
  if len(head) < 3 or head[0].strip() or "configs:" not in head[1]:
    return {}
  import yaml  # noqa: PLC0415  Only cards need it.

  configs = (yaml.safe_load(head[1]) or {}).get("configs") or []
  configs = [c for c in configs if c.get("data_files")]
  default = [
    c
    for c in configs
    if c.get("default") or c.get("config_name", "default") == "default"
  ]
  if len(default or configs) == 1:
    [config] = default or configs
    return _patterns(config, relative)
  return {
    f"configuration {c['config_name']}": [
      f for files in _patterns(c, relative).values() for f in files
    ]
    for c in configs
  }


def _patterns(
  config: Mapping[str, Any], relative: Mapping[str, str]
) -> dict[str, list[str]]:
  files = config["data_files"]
  if isinstance(files, str) or isinstance(files[0], str):
    files = [{"split": "train", "path": files}]
  found = {}
  for entry in files:
    globs = entry["path"]
    globs = [globs] if isinstance(globs, str) else globs
    globs = [posixpath.join(config.get("data_dir", ""), g) for g in globs]
    found[entry["split"]] = [
      f
      for f, name in relative.items()
      if any(fnmatch.fnmatchcase(name, g.removeprefix("./")) for g in globs)
    ]
  return {split: some for split, some in found.items() if some}


def word(files: Sequence[str]) -> str:
  """Returns a word of a split that the paths of all files have, or ""."""
  return next((w for w in _SPLIT if all(w in f for f in files)), "")
