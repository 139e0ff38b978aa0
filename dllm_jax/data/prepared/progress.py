"""What is there of a preparation: told by its directory, and by nothing else.

    manifest.json           when it is whole; the only sign of that
    train-00003-of-00064.array_record
    unfinished/plan.json    until then: what is being made,
    unfinished/counts-00003.json      which pieces are done,
    unfinished/hashes-00003           and what their documents are
    unfinished/*.tmp        what is being written

A file appears under its name when it is whole: by a rename, or, in a bucket, by
an upload, of which nothing is seen before its end. Whoever makes a piece writes
the same bytes, so that two who make it at once do no harm.
"""

from collections.abc import Iterator, Sequence
import concurrent.futures
import contextlib
import dataclasses
import json
import shutil
import tempfile
from typing import Any
import uuid

from dllm_jax.core import paths
from dllm_jax.data import source
from dllm_jax.data.prepared.plan import differences, Plan

MANIFEST = "manifest.json"
SIDES = ("train", "held_out")
_WORK = "unfinished"
_AT_ONCE = 16  # files that are read at the same time
_SUMS = ("records", "tokens", "characters", "bytes")
DOCUMENTS = ("documents", "empty_documents", "duplicate_documents")


def begun(folder: paths.Path) -> bool:
  """Returns whether a directory holds a preparation that is not whole."""
  return (folder / _WORK / "plan.json").exists() and not is_whole(folder)


def is_whole(folder: paths.Path) -> bool:
  """Returns whether a directory holds a preparation that is whole."""
  return (folder / MANIFEST).exists()


def read_plan(folder: paths.Path) -> Plan | None:
  """Returns the plan of a directory, None if it has none.

  Raises:
    ValueError: it is damaged, or of another version.
  """
  file = folder / _WORK / "plan.json"
  try:
    return Plan.from_json(file.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return None
  except ValueError as error:
    raise ValueError(
      f"{file}: {error}; remove {folder} and run dllm prepare again"
    ) from error


@dataclasses.dataclass(frozen=True)
class Progress:
  """A directory that is being filled by a plan."""

  folder: paths.Path
  plan: Plan

  def begin(self) -> None:
    """Makes the directory, or checks that it holds the same work.

    Raises:
      ValueError: it holds something else.
    """
    held = read_plan(self.folder)
    if held is None:
      if _holds_something(self.folder):
        raise ValueError(
          f"{self.folder} holds something else; give an empty or a new "
          "directory as output"
        )
      if not paths.in_bucket(self.folder):  # where s3fs would make a bucket
        (self.folder / _WORK).mkdir(parents=True, exist_ok=True)
      self._write(f"{_WORK}/plan.json", self.plan.to_json())
    self.check()

  def check(self) -> None:
    """Raises ValueError if the directory's plan is another one."""
    held = read_plan(self.folder)
    if held is not None and held != self.plan:
      raise different(self.folder, held.settings(), self.plan)

  def name(self, side: str, piece: int) -> str:
    """Returns the name of a piece's records."""
    return f"{side}-{piece:05d}-of-{len(self.plan.pieces):05d}.array_record"

  @contextlib.contextmanager
  def aside(self) -> Iterator[str]:
    """Gives the name of a new local file, which is removed at the end."""
    with contextlib.ExitStack() as stack:
      folder = self.folder / _WORK
      if paths.in_bucket(folder):
        folder = paths.Path(stack.enter_context(tempfile.TemporaryDirectory()))
      # Of one host or another: the disk may be shared.
      file = folder / f"{uuid.uuid4().hex}.tmp"
      stack.callback(file.unlink, missing_ok=True)
      yield str(file)

  def publish(self, name: str, target: str) -> None:
    """Puts a local file into the directory, whole or not at all."""
    path = self.folder / target
    if not paths.in_bucket(path):
      paths.Path(name).replace(path)
      return
    try:
      with paths.Path(name).open("rb") as file, path.open("wb") as copy:
        shutil.copyfileobj(file, copy, 2**22)
    except BaseException:
      path.unlink(missing_ok=True)  # What was written is uploaded at any end.
      raise

  def _write(self, name: str, content: str | bytes) -> None:
    content = content.encode() if isinstance(content, str) else content
    with self.aside() as temporary:
      paths.Path(temporary).write_bytes(content)
      self.publish(temporary, name)

  def record(self, piece: int, counts: dict[str, Any]) -> None:
    """Says that a piece is done, and what is in it."""
    counts = counts | {"fingerprint": self.plan.fingerprint}
    self._write(f"{_WORK}/counts-{piece:05d}.json", json.dumps(counts))

  def counts(self, pieces: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Returns the counts of the pieces that are done, by piece."""
    there = self._names("counts-*.json")
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
      found = pool.map(
        lambda i: (i, self._counts(i)),
        [i for i in pieces if f"counts-{i:05d}.json" in there],
      )
      return {i: counts for i, counts in found if counts}

  def _counts(self, piece: int) -> dict[str, Any] | None:
    file = self.folder / _WORK / f"counts-{piece:05d}.json"
    try:
      counts = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:  # Another share has just made all one corpus.
      return None
    except ValueError:  # An upload that was cut off.
      return None
    # By whoever lost a race with another plan: to be made again.
    return counts if counts["fingerprint"] == self.plan.fingerprint else None

  def record_hashes(self, piece: int, hashes: bytes) -> None:
    """Keeps the hashes of the documents of a piece."""
    self._write(f"{_WORK}/hashes-{piece:05d}", hashes)

  def hashes(self, piece: int) -> bytes:
    """Returns what `record_hashes` kept."""
    return (self.folder / _WORK / f"hashes-{piece:05d}").read_bytes()

  def hashed(self) -> set[int]:
    """Returns the pieces whose hashes are there."""
    names = self._names("hashes-*")
    return {int(name.removeprefix("hashes-")) for name in names}

  def _names(self, pattern: str) -> set[str]:
    return {path.name for path in (self.folder / _WORK).glob(pattern)}

  def finish(self) -> dict[str, Any]:
    """Makes the pieces one corpus, and returns its manifest.

    Raises:
      ValueError: pieces are missing, or there is no text in them.
    """
    everything = range(len(self.plan.pieces))
    counts = self.counts(everything)
    missing = [i for i in everything if i not in counts]
    # Another share may have come first, whenever it is asked.
    if missing and not is_whole(self.folder):
      raise _missing(self.folder, missing)
    if not missing:
      total = _total([counts[i] for i in everything])
      if not total["documents"]:
        files = sorted({s.path for p in self.plan.pieces for s in p.spans})
        more = f" (and {len(files) - 1} more)" if len(files) > 1 else ""
        raise source.empty(f"{files[0]}{more}")
      text = json.dumps(self.plan.settings() | total, indent=1)
      try:
        self._write(MANIFEST, text)
      except FileNotFoundError:
        if not is_whole(self.folder):
          raise
    clean(self.folder)
    return json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))


def clean(folder: paths.Path) -> None:
  """Removes what a preparation that is whole needs no more."""
  with contextlib.suppress(OSError):  # Another removes it, or writes there yet.
    if (folder / _WORK).exists():
      (folder / _WORK).rmtree()


def different(
  folder: paths.Path, held: dict[str, Any], plan: Plan
) -> ValueError:
  """Returns the error of a directory that holds other work."""
  what = differences(held, plan.settings())
  return ValueError(
    f"{folder} holds data prepared from other input or settings: another "
    f"{what}; give the same, or another output, or remove it"
  )


def _missing(folder: paths.Path, missing: Sequence[int]) -> ValueError:
  some = ", ".join(map(str, missing[:8])) + ", ..." * (len(missing) > 8)
  return ValueError(
    f"{folder} is not whole: {len(missing)} pieces are missing ({some}); run "
    "the shards that died again, or the same dllm prepare without --shard"
  )


def _holds_something(folder: paths.Path) -> bool:
  if not folder.exists():
    return False
  # What a call that died at its very beginning has left is no harm.
  return not folder.is_dir() or any(p.name != _WORK for p in folder.iterdir())


def _total(counts: Sequence[dict]) -> dict[str, Any]:
  """Returns the counts of all pieces together."""
  total: dict[str, Any] = {k: sum(c[k] for c in counts) for k in DOCUMENTS}
  for side in SIDES:
    total[side] = {
      "files": [f for c in counts for f in c[side]["files"]],
      "file_tokens": [c[side]["tokens"] for c in counts if c[side]["files"]],
    } | {k: sum(c[side][k] for c in counts) for k in _SUMS}
  return total
