"""Which files of a folder are data: the hub's conventions, and nothing silent.

What is named is read as it is; a folder is searched. There may lie cards,
configurations and other splits beside the data, and none of it is trained on:
what is left out is said, and where it is not clear what to read, globs are.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
import json
import os
import posixpath
import warnings

from dllm_jax.core import paths
from dllm_jax.data.formats import compressed, splits

TEXT = (".txt", ".text", ".md")
RECORDS = (
  ".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".feather", ".mds"
)  # fmt: skip
TOKENS = (".bin", ".npy")
# What dataset repositories and their libraries put beside data.
_CARDS = {
  "readme", "license", "licence", "citation", "notice", "changelog",
  "contributing", "code_of_conduct", "requirements",
}  # fmt: skip
_CONFIGS = {
  "config", "croissant", "dataset_dict", "dataset_info", "dataset_infos",
  "generation_config", "index", "metadata", "schema", "special_tokens_map",
  "state", "stats", "tokenizer", "tokenizer_config", "vocab",
}  # fmt: skip
_SHOWN = 6  # Globs in a message.


def chosen(folder: paths.Path) -> list[str]:
  """Returns the files of a folder to train on, in a fixed order.

  Raises:
    ValueError: it is not clear which; the message has the globs that say it.
  """
  root = os.fspath(folder)
  files = sorted(files_below(folder))
  listed, unlisted = _listed(root, files)
  kinds = collections.defaultdict(list)
  for path in listed:
    kinds[_kind(path)].append(path)
  left_out = unlisted + kinds.pop("beside", []) + kinds.pop("other", [])
  if "records" in kinds:  # Notes and lists of files, most often.
    left_out += kinds.pop("text", [])
  if len(kinds) > 1:
    raise _ambiguous(root, "which kind of data to read", kinds)
  data = [path for kind in kinds.values() for path in kind]
  parts = splits.of(root, data)
  if set(parts) - {"train", "validation", "test"} or "train" not in parts:
    raise _ambiguous(root, "which split to train on", parts)
  data = parts.pop("train")
  _check_twins(root, data)
  _say(root, data, left_out, parts)
  return data


def files_below(folder: paths.Path) -> Iterable[str]:
  """Yields the files below a folder that are not hidden."""
  root = os.fspath(folder).rstrip("/")
  if paths.in_bucket(folder):
    # One listing of all; a walk would ask for each folder.
    system = paths.file_system(folder)
    names = (system.unstrip_protocol(p) for p in system.find(root))
  else:
    names = (
      f"{at}/{name}"
      for at, _, found in os.walk(root, followlinks=True)
      for name in found
    )
  for name in names:
    if not any(p.startswith(".") for p in _relative(root, name).split("/")):
      yield name


def _relative(root: str, path: str) -> str:
  return path[len(root.rstrip("/")) + 1 :]


def _kind(path: str) -> str:
  """Returns what a file in a folder is: data of a kind, or beside it."""
  stem, _, _ = posixpath.basename(path).lower().partition(".")
  inner, packed = compressed.suffixes(path.lower())
  if stem in _CARDS or (stem in _CONFIGS and inner == ".json"):
    return "beside"
  if inner in RECORDS:
    return "records"
  if inner in TEXT:
    return "text"
  return "tokens" if inner in TOKENS and not packed else "other"


def _listed(root: str, files: Sequence[str]) -> tuple[list[str], list[str]]:
  """Returns files and what the indices beside them leave out.

  Folders of Hugging Face datasets hold caches beside what `state.json` lists;
  `index.json` lists shards of MDS, plain or packed.
  """
  known, out = set(files), set()
  for path in files:
    folder, name = posixpath.split(path)
    if name not in ("state.json", "index.json"):
      continue
    index = json.loads(paths.place(path).read_text())
    if name == "state.json" and "_data_files" in index:
      wanted = [f["filename"] for f in index["_data_files"]]
    elif name == "index.json" and "shards" in index:
      wanted = [_shard(folder, shard, known) for shard in index["shards"]]
    else:
      continue
    wanted = {f"{folder}/{name}" for name in wanted}
    missing = sorted(wanted - known)
    if missing:
      raise FileNotFoundError(f"{missing[0]} is missing, which {path} lists")
    here = {f for f in files if posixpath.dirname(f) == folder}
    out |= {f for f in here - wanted if _kind(f) == "records"}
  pairs = {f[:-4] + ".idx" for f in files if f.endswith(".bin")}
  rest = [f for f in files if f not in out and f not in pairs]
  return rest, sorted(out)


def _shard(folder: str, shard: Mapping, known: set[str]) -> str:
  """Returns the file of an MDS shard that is here: plain, else packed."""
  raw, packed = shard["raw_data"], shard.get("zip_data")
  if packed and f"{folder}/{raw['basename']}" not in known:
    return packed["basename"]
  return raw["basename"]


def _check_twins(root: str, data: Sequence[str]) -> None:
  """Raises if two files differ in the suffixes of their name alone."""
  twins = collections.defaultdict(list)
  for path in data:
    inner, packed = compressed.suffixes(path)
    twins[path[: len(path) - len(inner + packed)]].append(path)
  same = next((t for t in twins.values() if len(t) > 1), None)
  if same and _kind(same[0]) == "records":
    kinds = collections.defaultdict(list)
    for path in data:
      kinds["".join(compressed.suffixes(path))].append(path)
    names = " and ".join(posixpath.basename(p) for p in same)
    raise _ambiguous(root, f"which of {names}, by name the same data,", kinds)


def _ambiguous(
  root: str, what: str, groups: Mapping[str, Sequence[str]]
) -> ValueError:
  """Returns an error with a glob for each group of files."""
  globs = [f"{_glob(root, g, groups)} ({k})" for k, g in groups.items()]
  more = f" and {len(globs) - _SHOWN} more" if len(globs) > _SHOWN else ""
  return ValueError(
    f"{root}: {what} is not clear; name files or one of: "
    + ", ".join(globs[:_SHOWN])
    + more
  )


def _glob(
  root: str, files: Sequence[str], groups: Mapping[str, Sequence[str]]
) -> str:
  """Returns a glob of some files and of none of the other groups."""
  prefix = os.path.commonprefix([_relative(root, f) for f in files])
  suffixes = {"".join(compressed.suffixes(f)) for f in files}
  suffix = suffixes.pop() if len(suffixes) == 1 else ""
  if len(files) == 1:
    return files[0]
  folder, start = posixpath.split(prefix)
  below = {posixpath.dirname(_relative(root, f)) for f in files} != {folder}
  at = posixpath.join(root, folder)
  if below and not any(
    f.startswith(posixpath.join(at, ""))
    for group in groups.values()
    for f in group
    if f not in files
  ):
    return f"{at}/**/*{suffix}"
  if below:
    split = splits.word(files)
    return f"{at}/**/*{split}*{suffix}" if split else f"{at}/**/*{suffix}"
  return f"{at}/{start}*{suffix}"


def _say(
  root: str,
  data: Sequence[str],
  left_out: Sequence[str],
  parts: Mapping[str, Sequence[str]],
) -> None:
  """Warns of what is not read, by count and suffix."""
  counts = collections.Counter(
    posixpath.splitext(f)[1] or "without suffix" for f in left_out
  )
  said = [f"{n} {suffix}" for suffix, n in sorted(counts.items())]
  said += [f"{len(files)} of the split {k}" for k, files in parts.items()]
  if data and said:
    warnings.warn(
      f"{root}: files that are read: {len(data)}; left out: "
      f"{', '.join(said)}; a file or a glob is taken as it is",
      stacklevel=2,
    )
