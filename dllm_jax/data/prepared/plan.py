"""What is to be prepared: settings, and the pieces of the corpus.

Pieces are a function of the files, not of who reads them: any number of shares,
machines and processes makes the same ones.
"""

from collections.abc import Iterator, Mapping, Sequence
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
from typing import Any, Literal

from dllm_jax.data import source

VERSION = 2
_LEAST_BYTES, _MOST_BYTES = 2**24, 2**28
_MANY = 1024  # pieces, from which on they grow with the corpus
_REQUESTS = 32  # at a time, where each answer comes from far away
_ENTRIES = 16  # parts of what cannot be entered midway, if files are so few
# How fields are called that a second call may give otherwise.
_NAMES = {
  "tokenizer": "tokenizer",
  "length": "length",
  "packing": "packing",
  "held_out": "held_out",
  "dedup": "dedup",
  "format": "text_field or document_separator",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
  """The part of the work that one machine does: every `count`-th piece.

  Attributes:
    index: which one, from 0.
    count: how many there are.
  """

  index: int = 0
  count: int = 1

  def __post_init__(self):
    if not 0 <= self.index < self.count:
      raise ValueError(
        f"shard {self} does not exist; the first of {max(self.count, 1)} is "
        f"0/{max(self.count, 1)} and the last "
        f"{max(self.count, 1) - 1}/{max(self.count, 1)}"
      )

  def __str__(self) -> str:
    return f"{self.index}/{self.count}"

  @classmethod
  def parse(cls, text: str) -> "Share":
    """Returns the share that a text such as "3/64" names.

    Raises:
      ValueError: it names none.
    """
    index, slash, count = text.partition("/")
    if not (slash and _is_number(index) and _is_number(count)):
      raise ValueError(
        f"shard {text!r} must be a number from 0 and how many there are, such "
        "as 3/64"
      )
    return cls(index=int(index), count=int(count))


def _is_number(text: str) -> bool:
  return text.isascii() and text.isdigit()


@dataclasses.dataclass(frozen=True)
class Piece:
  """Some of a corpus: every `parts`-th document of spans, from `part` on."""

  spans: tuple[source.Span, ...]
  part: int = 0
  parts: int = 1

  def documents(self, form: source.Format) -> Iterator[source.Document]:
    """Yields its documents; empty ones too."""
    found = itertools.chain.from_iterable(
      source.read(span, form) for span in self.spans
    )
    return itertools.islice(found, self.part, None, self.parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """All that decides what is written.

  Attributes:
    tokenizer: the tokenizer, as `to_json` writes it.
    length: tokens a record.
    packing: see `packing.Packing`.
    held_out: the fraction held out.
    dedup: which documents are left out.
    token_type: the numpy type of tokens on disk.
    segment_type: that of segment ids.
    form: how documents lie in the files.
    pieces: the corpus.
    sizes: bytes of each file, by which one that has changed is noticed.
  """

  tokenizer: str
  length: int
  packing: Literal["slices", "packed"]
  held_out: float
  dedup: Literal["exact"] | None
  token_type: str
  segment_type: str
  form: source.Format
  pieces: tuple[Piece, ...]
  sizes: tuple[int, ...]

  def settings(self) -> dict[str, Any]:
    """Returns what a manifest says of it: all but the pieces."""
    fields = dataclasses.asdict(self)
    del fields["pieces"], fields["sizes"]
    return {"version": VERSION} | fields | {"fingerprint": self.fingerprint}

  @property
  def fingerprint(self) -> str:
    """A hash that no other plan has."""
    fields = [VERSION, dataclasses.asdict(self)]
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()

  def to_json(self) -> str:
    """Returns the whole plan as JSON."""
    return json.dumps(dataclasses.asdict(self) | {"version": VERSION})

  @classmethod
  def from_json(cls, text: str) -> "Plan":
    """Returns the plan that `to_json` wrote.

    Raises:
      ValueError: it is something else, or of another version.
    """
    try:
      fields = json.loads(text)
      if fields.pop("version") != VERSION:
        raise ValueError("it is of another version of this package")
      fields["form"] = source.Format(**fields["form"])
      fields["sizes"] = tuple(fields["sizes"])
      fields["pieces"] = tuple(
        Piece(
          tuple(source.Span(**s) for s in p["spans"]), p["part"], p["parts"]
        )
        for p in fields["pieces"]
      )
      return cls(**fields)
    except (KeyError, TypeError, AttributeError) as error:
      raise ValueError(f"it is no plan of this package: {error!r}") from error

  def share(self, share: Share) -> list[int]:
    """Returns the pieces of a share."""
    return list(range(share.index, len(self.pieces), share.count))


def differences(held: dict[str, Any], wanted: dict[str, Any]) -> str:
  """Returns in words in what two plans' settings differ."""
  held, wanted = ({"format": s["form"], **s} for s in (held, wanted))
  found = [name for key, name in _NAMES.items() if held[key] != wanted[key]]
  return " and ".join(found) or "input"


def sizes(files: Sequence[str]) -> dict[str, int]:
  """Returns the bytes of each file."""
  with concurrent.futures.ThreadPoolExecutor(_REQUESTS) as pool:
    found = pool.map(lambda file: source.size([file]), files)
    return dict(zip(files, found, strict=True))


def cut(
  files: Mapping[str, int], form: source.Format, piece_bytes: int | None
) -> tuple[Piece, ...]:
  """Returns the pieces of files.

  Args:
    files: the files, with the bytes of each.
    form: how documents lie in them.
    piece_bytes: bytes of input a piece; None for 16 to 256 MiB, the more of
      them the larger the corpus.
  """
  size = sum(files.values())
  room = piece_bytes or min(max(size // _MANY, _LEAST_BYTES), _MOST_BYTES)
  spans = source.spans([*files], form, room)
  # Where a piece ends midway, it is as large as was asked for.
  weights = [
    room if span.start or span.stop is not None else files[span.path]
    for span in spans
  ]
  if len(spans) < _ENTRIES:
    found = []
    for span, weight in zip(spans, weights, strict=True):
      parts = min(-(-weight // room), -(-_ENTRIES // len(spans)))
      # A compressed file is then read as often as it has parts.
      parts = 1 if source.running(span.path, form) else max(parts, 1)
      found += [Piece((span,), part, parts) for part in range(parts)]
    if len(found) > len(spans):
      return tuple(found)
  return tuple(_gathered(spans, weights, room))


def _gathered(
  spans: Sequence[source.Span], weights: Sequence[int], room: int
) -> Iterator[Piece]:
  """Yields spans gathered into pieces of about as many bytes."""
  some, left = [], room
  for span, weight in zip(spans, weights, strict=True):
    if some and left <= 0:
      yield Piece(tuple(some))
      some, left = [], room
    some.append(span)
    left -= weight
  if some:
    yield Piece(tuple(some))
