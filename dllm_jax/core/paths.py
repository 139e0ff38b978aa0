"""Places as users name them: local paths, `~/...`, and buckets.

`place` is where a name becomes a path, so that a bucket that nobody can reach is
one line at the start, not a wait or a traceback in the middle of a run.
"""

import functools
import importlib.util
import os
import pathlib
import re
import threading
from typing import Any

from etils import epath

Path = epath.Path
"""A place: local, `gs://bucket/...` or `s3://bucket/...`."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")
# What reads a kind of bucket, and the extra that brings it.
_BACKENDS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
_SECONDS = 30.0  # that a bucket has to answer, sign-in included


def expanded(given: str) -> str:
  """Returns a path in which a leading `~` is the home directory.

  Shells leave it alone after `--flag=`; a folder of that name is never meant.
  Anything else stays as it was typed: `./shakespeare` is a folder and
  `shakespeare` a text that comes with the package.

  Raises:
    ValueError: nobody here has the home directory that it names.
  """
  if not given.startswith("~"):
    return given
  try:
    return str(pathlib.Path(given).expanduser())
  except RuntimeError as error:
    raise ValueError(
      f"{given}: there is no such home directory; write the path out"
    ) from error


def place(given: str | os.PathLike) -> Path:
  """Returns the place that a user names.

  The first time that a bucket is named, it is asked whether it is there.

  Raises:
    ValueError: nobody here has the home directory that it names, it lies where
      nothing here reads, or its bucket does not exist, refuses or is silent.
  """
  name = expanded(os.fspath(given))
  scheme = _SCHEME.match(name)
  if scheme and not name.startswith(("gs://", "s3://")):
    raise ValueError(
      f"{name}: {scheme[1]}: is no place that is known; take a local path, "
      "~/..., gs://bucket/... or s3://bucket/..."
    )
  if scheme:
    _reach("/".join(name.split("/")[:3]))
  return Path(name)


def in_bucket(path: str | os.PathLike) -> bool:
  """Whether a place is in an object store, where nothing can be renamed."""
  return os.fspath(path).startswith(("gs://", "s3://"))


def on_s3(path: str | os.PathLike) -> bool:
  """Whether a place is on S3, which Orbax does not write."""
  return os.fspath(path).startswith("s3://")


def absolute(path: Path) -> Path:
  """Returns a place that another working directory does not change."""
  return path if in_bucket(path) else path.absolute()


def file_system(path: str | os.PathLike) -> Any:
  """Returns the fsspec file system of a place in a bucket.

  For what `Path` cannot do: whole trees, and pieces of files.
  """
  import fsspec  # noqa: PLC0415  Only buckets need it.

  # Other processes write as well: what was listed before is out of date.
  for scheme in _BACKENDS:
    fsspec.config.conf.setdefault(scheme, {})["use_listings_cache"] = False
  return fsspec.filesystem(os.fspath(path)[:2])


@functools.cache
def _reach(bucket: str) -> None:
  """Checks that a bucket, `gs://name`, can be listed.

  Raises:
    ValueError: it does not exist, refuses or does not answer, or what reads it
      is not installed.
  """
  scheme, _, name = bucket.partition("://")
  package, extra = _BACKENDS[scheme]
  if importlib.util.find_spec(package) is None:
    raise ValueError(
      f"{bucket}: {package} is not installed, which reads {scheme}://; "
      f"pip install 'dllm_jax[{extra}]'"
    )
  if not name:
    raise ValueError(f"{bucket}: name a bucket, as in {scheme}://bucket/runs/x")
  problems = []

  def look() -> None:
    try:
      files = file_system(bucket)
      if scheme == "gs":
        files.call("GET", "b/{}/o", name, maxResults=1, json_out=True)
      else:
        files.call_s3("list_objects_v2", Bucket=name, MaxKeys=1)
      problems.append(None)
    except Exception as error:  # Of many libraries, below the two.
      problems.append(error)

  # A daemon: nothing below has a limit of time that always holds.
  thread = threading.Thread(target=look, daemon=True)
  thread.start()
  thread.join(_SECONDS)
  problem = problems[0] if problems else f"no answer in {_SECONDS:.0f} s"
  if isinstance(problem, FileNotFoundError):
    raise ValueError(f"{bucket} does not exist; make the bucket first")
  if problem is not None:
    reason = " ".join(str(problem).split())[:200] or type(problem).__name__
    raise ValueError(
      f"{bucket} cannot be reached ({reason}); see that this machine has a "
      "network and credentials that may list, read and write there"
    ) from (problem if isinstance(problem, Exception) else None)
