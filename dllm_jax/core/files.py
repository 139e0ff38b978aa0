"""Files and folders that are there whole or not at all, on disks and in buckets.

A disk has renames: what is written aside appears at once. A bucket has none, but
an object in it appears when it is complete; a folder is complete when what is
written last is there. Appending replaces an object, so that lines are kept in
parts, the last of which is written again.
"""

from collections.abc import Callable, Iterator
import contextlib
import os
import tempfile
import threading
import time

from dllm_jax.core.paths import absolute, file_system, in_bucket, Path, place

UNFINISHED = "unfinished"
"""An object beside what is being written; its folder may be begun again."""

_PART_BYTES = 2**20
_SECONDS = 1.0  # between writes of one object, of which stores allow so many


def write_whole(path: Path, content: str | bytes) -> None:
  """Writes a text, or bytes, so that a kill leaves no half file."""
  if isinstance(content, str):
    content = content.encode("utf-8")
  if in_bucket(path):
    path.write_bytes(content)
    return
  temporary = path.with_suffix(f".{os.getpid()}.tmp")
  try:
    temporary.write_bytes(content)
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
  """Gives a folder that becomes `path` at the end, or vanishes on an error.

  On a disk it is renamed. In a bucket it is `path` itself, in which the caller
  writes last what makes it whole; until then it is marked as unfinished, and
  the next call begins again.

  Raises:
    FileExistsError: there is something at `path`.
  """
  path = absolute(place(path))
  mark = path / UNFINISHED
  if in_bucket(path) and mark.exists():
    path.rmtree(missing_ok=True)
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise FileExistsError(f"{path} is not empty; name a new folder")
  if in_bucket(path):
    mark.write_text("")
    try:
      yield path
      mark.unlink()
    except BaseException:
      path.rmtree(missing_ok=True)
      raise
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
  temporary.rmtree(missing_ok=True)
  temporary.mkdir()
  try:
    yield temporary
    if path.exists():
      path.rmdir()
    temporary.rename(path)
  finally:
    temporary.rmtree(missing_ok=True)


@contextlib.contextmanager
def local_folder(path: Path) -> Iterator[Path]:
  """Gives a local folder for what can only write to disks.

  It is `path` itself, or one whose files are in the bucket at the end.
  """
  if not in_bucket(path):
    yield path
    return
  with tempfile.TemporaryDirectory(prefix="dllm_") as temporary:
    yield Path(temporary)
    upload(Path(temporary), path)


def upload(folder: Path, path: Path) -> None:
  """Copies the files of a local folder into a place in a bucket."""
  file_system(path).put(
    f"{os.fspath(folder)}/", f"{os.fspath(path)}/", recursive=True
  )


def download(path: Path, folder: Path) -> None:
  """Copies the files of a place in a bucket into a local folder."""
  file_system(path).get(
    f"{os.fspath(path)}/", f"{os.fspath(folder)}/", recursive=True
  )


def remove_folder(path: Path, first: str) -> None:
  """Removes a folder that one of its files makes whole, that file first."""
  (path / first).unlink(missing_ok=True)
  path.rmtree(missing_ok=True)


def move_folder(path: Path, target: Path, first: str) -> None:
  """Moves a folder; where files are copied, as `remove_folder` does."""
  if not in_bucket(path):
    path.rename(target)
    return
  with tempfile.TemporaryDirectory(prefix="dllm_") as temporary:
    download(path, Path(temporary))
    upload(Path(temporary), target)
  remove_folder(path, first)


class Lines:
  """A file to which lines are added; a kill loses none that came before it.

  On a disk they are appended. In a bucket the last part is written again, at
  most once a second: what a kill may lose is younger than that.
  """

  def __init__(self, path: Path):
    """Goes on after the lines that are there."""
    self._path, self._file, self._late = path, None, None
    self._lock = threading.Lock()
    self._written = -_SECONDS
    if in_bucket(path):
      self._part, self._text = path, ""
      return
    path.parent.mkdir(parents=True, exist_ok=True)
    # A line that a kill cut short must not swallow the next one.
    whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
    self._file = path.open("a")
    self._file.write("" if whole else "\n")

  def add(self, text: str) -> None:
    """Adds whole lines."""
    if self._file is not None:
      self._file.write(text)
      self._file.flush()
      return
    with self._lock:
      if not self._text or len(self._text) > _PART_BYTES:
        self._begin()
      self._text += text
      wait = self._written + _SECONDS - time.monotonic()
      if self._late is None and wait > 0:
        self._late = threading.Timer(wait, self.flush)
        self._late.daemon = True
        self._late.start()
      elif self._late is None:
        self._write()

  def flush(self) -> None:
    """Returns when all that was added is kept."""
    with self._lock:
      if self._late is not None:
        self._late.cancel()
        self._write()

  def close(self) -> None:
    """Keeps all and ends."""
    self.flush()
    if self._file is not None:
      self._file.close()

  def _begin(self) -> None:
    """Begins a part, once all of the one before is kept."""
    if self._text:
      self._write()
    number = len(_parts(self._path))
    self._part, self._text = _part(self._path, number), ""

  def _write(self) -> None:
    self._late = None
    self._part.write_text(self._text, encoding="utf-8")
    self._written = time.monotonic()


def _part(path: Path, number: int) -> Path:
  """Returns the first part, which has the file's name, or one after it."""
  return path.with_suffix(f".{number:05d}{path.suffix}") if number else path


def _parts(path: Path) -> list[Path]:
  """Returns the parts of a file of lines in their order; none if there is none."""
  if not path.exists():
    return []
  if not in_bucket(path):
    return [path]
  digits = "[0-9]" * 5
  later = path.parent.glob(f"{path.stem}.{digits}{path.suffix}")
  return [path, *sorted(later)]


def read_lines(path: Path) -> list[str]:
  """Returns the lines of a file that `Lines` wrote; none if there is none.

  The last one may have been cut short by a kill.
  """
  return [line for part in _parts(path) for line in _text(part).splitlines()]


def _text(path: Path) -> str:
  """Returns a text, which a run that is not over may be writing again.

  A bucket is asked once: files of s3fs ask for what an object is, and then for no
  other, which fails where it has been written again meanwhile.
  """
  if in_bucket(path):
    return file_system(path).cat_file(os.fspath(path)).decode("utf-8")
  return path.read_text(encoding="utf-8")


def keep_lines(path: Path, keep: Callable[[str], bool]) -> None:
  """Drops the lines that are not to be kept; what is kept is kept at a kill."""
  for part in reversed(_parts(path)):
    lines = _text(part).splitlines()
    kept = [line for line in lines if keep(line)]
    if kept != lines:
      write_whole(part, "".join(f"{line}\n" for line in kept))
