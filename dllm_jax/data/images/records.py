"""Pictures with their texts, from files of several forms.

JSONL and Parquet have a field `image` (a path beside the file, base64, bytes, or
the hub's `{"bytes": ...}`) and `text`, `caption` or `prompt`; or `messages`, or
`conversations`, whose picture is a part `{"type": "image"}` or the field. Tar
shards are WebDataset's; IDX is MNIST's, and its labels are digits.
"""

import base64
import binascii
from collections.abc import Iterable, Iterator, Mapping
import glob
import gzip
import json
import math
import os
import re
import tarfile
from typing import Any, NamedTuple

import numpy as np

from dllm_jax.core import paths
from dllm_jax.data import source
from dllm_jax.data.conversations.messages import normal
from dllm_jax.data.formats.folder import files_below
from dllm_jax.data.images.pictures import png

LEGAL = (
  "JSONL (.jsonl), Parquet (.parquet), WebDataset (.tar, .tgz) or IDX "
  "(-images-idx3-ubyte, also .gz, with its -labels-idx1-ubyte beside it)"
)
_TARS = (".tar", ".tar.gz", ".tgz")
_TABLES = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow")
_IDX = re.compile(r"(.*)-images-idx3-ubyte(\.gz)?$")
_PICTURES = ("jpg", "png", "jpeg", "webp")
_CAPTIONS = ("text", "txt", "caption")
_FIELDS = ("text", "caption", "prompt")
_DIGITS = (
  "zero", "one", "two", "three", "four", "five", "six", "seven", "eight",
  "nine",
)  # fmt: skip


class Record(NamedTuple):
  """One picture, one text, or both.

  Attributes:
    where: what it is called in messages.
    image: the bytes of a picture's file, or None.
    text: a caption, or a text by itself; None for a conversation.
    messages: a conversation, `{"role", "content"}` each; or None.
  """

  where: str
  image: bytes | None
  text: str | None = None
  messages: list[dict[str, Any]] | None = None


class Bad(NamedTuple):
  """A record that cannot be read: what `data.skip_bad` leaves out.

  Attributes:
    where: what it is called in messages.
    reason: what is wrong with it.
  """

  where: str
  reason: str


def find(path: str) -> list[str]:
  """Returns the files with pictures at a path: a file, a folder, globs, braces.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: there are files, but none of a known form.
  """
  found = []
  for one in _braces(path):
    at = paths.place(one)
    if at.is_dir():
      found += [f for f in sorted(files_below(at)) if _known(f)]
    elif at.exists():
      found.append(os.fspath(at))
    else:
      found += sorted(glob.glob(os.fspath(at), recursive=True))  # noqa: PTH207
  if not found and not paths.place(path).exists():
    raise FileNotFoundError(
      f"data path {path!r} does not exist; give pictures with texts: {LEGAL}"
    )
  unknown = [f for f in found if not _known(f)]
  if unknown or not found:
    raise ValueError(
      f"{(unknown or [path])[0]} holds no pictures that are read; legal are"
      f" {LEGAL}"
    )
  return found


def _known(path: str) -> bool:
  return path.endswith((*_TARS, *_TABLES)) or bool(_IDX.match(path))


def _braces(path: str) -> Iterator[str]:
  """Yields the paths that a range such as `{000..012}` stands for."""
  found = re.search(r"\{(\d+)\.\.(\d+)\}", path)
  if not found:
    yield path
    return
  first, last = found.groups()
  for n in range(int(first), int(last) + 1):
    head, tail = path[: found.start()], path[found.end() :]
    yield from _braces(f"{head}{n:0{len(first)}}{tail}")


def read(files: Iterable[str]) -> Iterator[Record | Bad]:
  """Yields the records of files, and those that cannot be read.

  Raises:
    ValueError: a file is not of its form.
  """
  for path in files:
    if path.endswith(_TARS):
      yield from _tar(path)
    elif _IDX.match(path):
      yield from _idx(path)
    else:
      folder = paths.place(path).parent
      for n, row in enumerate(source.records(path), 1):
        yield _guarded(f"{path}: record {n}", _row, row, folder)


def _guarded(where: str, make: Any, *args: Any) -> Record | Bad:
  try:
    return make(where, *args)
  except (ValueError, TypeError, KeyError, OSError) as error:
    return Bad(where, str(error))


def _row(where: str, row: Any, folder: paths.Path) -> Record:
  if not isinstance(row, Mapping):
    raise ValueError(f"an object with fields was expected, not {row!r:.60}")
  image = row.get("image")
  chat = row.get("messages", row.get("conversations"))
  if chat is not None:
    inside, messages = _conversation(chat)
    image = inside if inside is not None else image
    return Record(where, _bytes(image, folder), messages=messages)
  text = next((row[f] for f in _FIELDS if isinstance(row.get(f), str)), None)
  if text is None:
    raise ValueError(
      f"there is no text in {', '.join(_FIELDS)} or messages; fields:"
      f" {', '.join(map(str, row)) or 'none'}"
    )
  return Record(where, _bytes(image, folder), text)


def _conversation(given: Any) -> tuple[Any, list[dict[str, Any]]]:
  """Returns a conversation's picture, or None, and its messages without it."""
  image, messages = None, []
  given = [given] if isinstance(given, Mapping) else given
  for message in given if isinstance(given, list) else [given]:
    parts = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(parts, list):
      pictures = [p for p in parts if _is_picture(p)]
      if len(pictures) + (image is not None) > 1:
        raise ValueError("a conversation has one picture, before its text")
      for part in pictures:
        image = part.get("image", part.get("url", part.get("path")))
      message = {**message, "content": [p for p in parts if not _is_picture(p)]}
    messages.append(message)
  messages = normal(messages)
  for message in messages[:1]:  # LLaVA's place of the picture
    text = message.get("content") or ""
    message["content"] = text.replace("<image>", "").strip()
  return image, messages


def _is_picture(part: Any) -> bool:
  return isinstance(part, Mapping) and part.get("type") == "image"


def _bytes(image: Any, folder: paths.Path) -> bytes | None:
  """Returns the bytes of a picture's file, however a record has it."""
  if isinstance(image, Mapping):
    inside = image.get("bytes")
    image = inside if inside is not None else image.get("path")
  if image is None or isinstance(image, bytes):
    return image
  if not isinstance(image, str):
    raise ValueError(
      f"image must be a path, base64 or bytes, not {type(image).__name__}"
    )
  if image.startswith("data:"):
    return _base64(image.partition(",")[2])
  path = folder / image
  try:
    if path.is_file():
      return path.read_bytes()
  except OSError:  # too long for a name
    pass
  return _base64(image, f"image {image[:60]!r} is no file beside it")


def _base64(text: str, otherwise: str = "the image is no base64") -> bytes:
  try:
    return base64.b64decode(text, validate=True)
  except (binascii.Error, ValueError) as error:
    raise ValueError(f"{otherwise}, nor base64") from error


def _tar(path: str) -> Iterator[Record | Bad]:
  """Yields the samples of a shard: runs of members with one key."""
  try:
    with (
      paths.place(path).open("rb") as file,
      tarfile.open(fileobj=file, mode="r|*") as tar,
    ):
      for key, members in _runs(tar):
        yield _guarded(f"{path}: {key}", _sample, members)
  except (tarfile.TarError, EOFError, gzip.BadGzipFile) as error:
    raise ValueError(
      f"{path} is no whole tar archive ({error}); fetch it again"
    ) from error


def _runs(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, bytes]]]:
  """Yields runs of members with one key, by their extensions.

  Deviates: the library refuses an extension that comes again; it begins another
  sample here.
  """
  key, members = None, {}
  for member in tar:
    split = _member(member.name) if member.isfile() else None
    if split is None:
      continue
    if members and (split[0] != key or split[1] in members):
      yield key, members
      members = {}
    key = split[0]
    members[split[1]] = tar.extractfile(member).read()
  if members:
    yield key, members


def _member(name: str) -> tuple[str, str] | None:
  """Returns a member's key and extension, by WebDataset's rule."""
  folder, _, file = name.rpartition("/")
  stem, dot, extension = file.partition(".")
  if not dot or not extension or (not stem and not folder):
    return None
  return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _sample(where: str, members: Mapping[str, bytes]) -> Record:
  image = next((members[e] for e in _PICTURES if e in members), None)
  caption = next((members[e] for e in _CAPTIONS if e in members), None)
  has = ", ".join(f".{e}" for e in members)
  if image is None:
    raise ValueError(
      f"a sample needs a picture ({', '.join(_PICTURES)}); it has {has}"
    )
  if caption is not None:
    return Record(where, image, caption.decode().strip())
  if "json" not in members:
    raise ValueError(
      f"a sample needs its text ({', '.join(_CAPTIONS)}, json); it has {has}"
    )
  made = _row(where, json.loads(members["json"]), paths.place("."))
  return made._replace(image=image)


def _idx(path: str) -> Iterator[Record]:
  """Yields MNIST's pictures with "a seven" for their labels."""
  begin, packed = _IDX.match(path).groups()
  labels = f"{begin}-labels-idx1-ubyte{packed or ''}"
  if not paths.place(labels).is_file():
    raise FileNotFoundError(f"{labels} is missing, the labels of {path}")
  pictures, numbers = _array(path, 3), _array(labels, 1)
  if len(pictures) != len(numbers):
    raise ValueError(
      f"{path} has {len(pictures)} pictures, but {labels} {len(numbers)} labels"
    )
  for n, (picture, number) in enumerate(zip(pictures, numbers, strict=True)):
    word = _DIGITS[number]
    text = f"{'an' if word == 'eight' else 'a'} {word}"
    data = png(np.repeat(picture[..., None], 3, axis=-1))
    yield Record(f"{path}: picture {n}", data, text)


def _array(path: str, dimensions: int) -> np.ndarray:
  data = paths.place(path).read_bytes()
  try:
    data = gzip.decompress(data) if path.endswith(".gz") else data
  except (gzip.BadGzipFile, EOFError) as error:
    raise ValueError(f"{path} is no whole .gz; fetch it again") from error
  head = 4 + 4 * dimensions
  shape = tuple(np.frombuffer(data[4:head], ">u4").tolist())
  if data[:4] != bytes((0, 0, 8, dimensions)) or (
    len(data) != head + math.prod(shape)
  ):
    raise ValueError(f"{path} is no IDX file of bytes in {dimensions} axes")
  return np.frombuffer(data[head:], np.uint8).reshape(shape)
