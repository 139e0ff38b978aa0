"""Token ids to text that is final, as they come: whole characters, exact stops.

Pieces never hold half of a character, nor what a later token or a stop string
might take back; together they are the text of all ids. Pure Python: nothing here
knows requests, engines or HTTP.
"""

from collections.abc import Sequence
import functools
import json
import re

from dllm_jax.data.tokenizer import Bytes, Tokenizer

_CONTEXT = 8  # tokens that decide how the next ones are spelled
_TIDIED = 8  # characters at the end that a tidied space may still change
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BROKEN = "\ufffd"


class Detokenizer:
  """The text of tokens, piece by piece.

  Args:
    tokenizer: ids to text.
    before: ids that stand before, whose text is not repeated.
  """

  def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
    self._decode = tokenizer.decode
    self._spelling = spelling(tokenizer)
    self._tidies = getattr(tokenizer, "tidies_spaces", False)
    self._window = list(before)[-_CONTEXT:]
    # Of the window, so far: a character that is begun comes with its end.
    self._given = self._decode(self._window[: self._whole()]).rstrip(_BROKEN)

  def add(self, ids: Sequence[int]) -> str:
    """Returns the text that is final with some more tokens."""
    self._window += ids
    text = self._decode(self._window[: self._whole()])
    if self._tidies:
      last = text[-_TIDIED:]
      text = text[: len(text) - len(last)] + last.partition(" ")[0]
    return self._more(text.rstrip(_BROKEN))

  def finish(self) -> str:
    """Returns the text that is left when no more tokens come."""
    return self._more(self._decode(self._window))

  def _whole(self) -> int:
    """Returns the tokens before a run of bytes that may go on.

    One byte more can break the whole run: tokenizers with byte fallback show
    all of it as U+FFFD then.
    """
    count = len(self._window)
    while count and self._window[count - 1] in self._spelling.bytes_alone:
      count -= 1
    return count

  def _more(self, text: str) -> str:
    """Returns what a text has more than was given, and gives it."""
    if not text.startswith(self._given):
      return ""
    piece, self._given = text[len(self._given) :], text
    if len(self._window) > 4 * _CONTEXT:
      self._shorten(text)
    return piece

  def _shorten(self, text: str) -> None:
    """Forgets tokens that no longer decide anything."""
    if self._decode(self._window) == text:  # nothing is held back
      self._window = self._window[-_CONTEXT:]
      self._given = self._decode(self._window)


class Stops:
  """Text up to the first of some strings, wherever pieces end.

  Args:
    strings: what ends the text, none of them empty.
  """

  def __init__(self, strings: Sequence[str]):
    self._strings = tuple(strings)
    self._held = ""
    self.found = False

  def add(self, piece: str, *, last: bool = False) -> str:
    """Returns the text that no stop can take back any more.

    Args:
      piece: what follows.
      last: whether nothing comes after it.
    """
    if self.found:
      return ""
    text = self._held + piece
    ends = [at for stop in self._strings if (at := text.find(stop)) >= 0]
    end = min(ends, default=len(text))
    begun = len(text) if last else self._begun(text)
    if ends and end <= begun:
      self.found, self._held = True, ""
      return text[:end]
    # A stop that began before one that is whole would come first.
    self._held = text[begun:]
    return text[:begun]

  def _begun(self, text: str) -> int:
    """Returns where the first stop begins that the text may be inside of."""
    longest = max(map(len, self._strings), default=1) - 1
    for at in range(max(len(text) - longest, 0), len(text)):
      if any(
        len(stop) > len(text) - at and stop.startswith(text[at:])
        for stop in self._strings
      ):
        return at
    return len(text)


class Spelling:
  """What single tokens are called, and the bytes that they stand for.

  Args:
    tokenizer: ids to text.
  """

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    decoder = json.dumps(
      _definition(tokenizer).get("decoder"), ensure_ascii=False
    )
    self._byte_level = '"ByteLevel"' in decoder
    self._spaced = "\u2581" in decoder
    self._fallback = '"ByteFallback"' in decoder
    self._special = getattr(tokenizer, "special_ids", frozenset())

  @functools.cached_property
  def bytes_alone(self) -> frozenset[int]:
    """The tokens that are one byte, where a run of bytes is decoded as one."""
    if not self._fallback:
      return frozenset()
    vocabulary = _definition(self._tokenizer)["model"]["vocab"]
    pairs = vocabulary.items() if isinstance(vocabulary, dict) else ()
    return frozenset(i for name, i in pairs if _BYTE.fullmatch(name))

  @functools.lru_cache(maxsize=65_536)  # noqa: B019  As old as the server.
  def bytes_of(self, token: int) -> bytes:
    """Returns the bytes of a token by itself."""
    if isinstance(self._tokenizer, Bytes) and token < 256:
      return bytes([token])
    if not hasattr(self._tokenizer, "name_of"):
      return self._tokenizer.decode([token]).encode(errors="replace")
    name = self._tokenizer.name_of(token) or ""
    if token in self._special:
      return name.encode()
    if self._fallback and (one := _BYTE.fullmatch(name)):
      return bytes([int(one[1], 16)])
    if self._byte_level and all(c in _byte_names() for c in name):
      return bytes(_byte_names()[c] for c in name)
    return (name.replace("\u2581", " ") if self._spaced else name).encode()

  def text_of(self, token: int) -> str:
    """Returns a token as text; bytes that are no characters become U+FFFD."""
    return self.bytes_of(token).decode(errors="replace")


@functools.lru_cache(maxsize=4)
def spelling(tokenizer: Tokenizer) -> Spelling:
  """Returns the spelling of a tokenizer, made once."""
  return Spelling(tokenizer)


def _definition(tokenizer: Tokenizer) -> dict:
  return json.loads(getattr(tokenizer, "definition", "{}"))


@functools.cache
def _byte_names() -> dict[str, int]:
  """Returns the characters by which byte-level vocabularies name bytes.

  Printable bytes of Latin-1 are themselves; the others are the characters from
  U+0100 on, in order (GPT-2).
  """
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  names = {chr(byte): byte for byte in printable}
  others = (byte for byte in range(256) if byte not in printable)
  return names | {chr(256 + i): byte for i, byte in enumerate(others)}
