"""Token ids to text that is final, as they come: whole characters, exact stops.

Pieces never hold half of a character, nor what a later token or a stop string
might take back; together they are the text of all ids. Pure Python: nothing here
knows requests, engines or HTTP.
"""

from collections.abc import Sequence

from dllm_jax.data.tokenizer import Tokenizer
from dllm_jax.sampling.constraints.spelling import spelling

_CONTEXT = 8  # tokens that decide how the next ones are spelled
_TIDIED = 8  # characters at the end that a tidied space may still change
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
