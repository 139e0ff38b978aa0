"""MMaDA's rows: pictures and texts as one sequence of ids (arXiv:2505.15809).

With N image tokens and texts of at most M, rows have N + M + 3 ids:

    to image     pad*  t2i  BOS text EOS | soi  image  eoi
    understand   mmu  soi  image  eoi | BOS text EOS EOS*
    text         BOS text EOS EOS*
    reasoning    r2i  BOS text EOS EOS* | soi  image  eoi

Texts to draw are filled on the left, all others on the right, with ends that
count as the answer does. Of a conversation the last answer counts: what follows
the last header that was not cut off.
"""

from collections.abc import Sequence as Ids
import dataclasses
from typing import NamedTuple

import numpy as np

from dllm_jax.core.images import ImageVocabulary


class Sequence(NamedTuple):
  """A row.

  Attributes:
    tokens: its ids.
    counts: which of them may be masked and count; of a picture to draw its marks
      too, which are never masked.
  """

  tokens: np.ndarray
  counts: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sequences:
  """Builds rows of ids.

  Attributes:
    vocabulary: the marks, and where image tokens are.
    length: ids of a row (N + M + 3).
  """

  vocabulary: ImageVocabulary
  length: int

  def __post_init__(self):
    self.vocabulary.text_room(self.length)

  @property
  def room(self) -> int:
    """The longest text beside a picture (M)."""
    return self.vocabulary.text_room(self.length)

  def to_image(self, text: Ids[int], codes: Ids[int]) -> Sequence:
    """Returns a text and the picture to be drawn of it."""
    tokens = [
      *self.prompt(text),
      *self._codes(codes),
      self.vocabulary.end_image,
    ]
    counts = np.arange(self.length) > self.room
    return Sequence(np.asarray(tokens, np.int32), counts)

  def prompt(self, text: Ids[int]) -> list[int]:
    """Returns what stands before a picture to be drawn, `start_image` too."""
    v = self.vocabulary
    given = [v.to_image, *self._begun(text), v.end]
    if len(given) > self.room + 1:
      given = [*given[: self.room], v.end]
    fill = [v.pad] * (self.room + 1 - len(given))
    return [*fill, *given, v.start_image]

  def canvas(self, text: Ids[int]) -> list[int | None]:
    """Returns a row whose picture is wanted, None at each of its tokens."""
    v = self.vocabulary
    return [*self.prompt(text), *[None] * v.tokens, v.end_image]

  def picture(self, codes: Ids[int]) -> list[int]:
    """Returns what stands before a text about a picture."""
    v = self.vocabulary
    return [v.understand, v.start_image, *self._codes(codes), v.end_image]

  def understand(self, text: Ids[int], codes: Ids[int]) -> Sequence:
    """Returns a picture and what is said of it."""
    v, room = self.vocabulary, self.room
    given = [*self._begun(text), v.end]
    if len(given) > room:
      given = [*given[: room - 1], v.end]
    tokens = [*self.picture(codes), *given, *[v.end] * (room - len(given))]
    return self._answered(tokens, otherwise=v.tokens + 3)

  def text(self, text: Ids[int]) -> Sequence:
    """Returns a text, all of which counts."""
    tokens = self._filled(text)
    return Sequence(tokens, np.ones(self.length, bool))

  def chat(self, text: Ids[int]) -> Sequence:
    """Returns a conversation without a picture."""
    return self._answered(self._filled(text), otherwise=0)

  def reason(self, text: Ids[int], codes: Ids[int]) -> Sequence:
    """Returns a conversation that thinks, and then draws."""
    v, room = self.vocabulary, self.room
    given = [*self._begun(text), v.end]
    if len(given) > room:
      given = [*given[: room - 1], v.end]
    tokens = [v.reason, *given, *[v.end] * (room - len(given))]
    tokens += [v.start_image, *self._codes(codes), v.end_image]
    made = self._answered(tokens, otherwise=room + 1)
    marks = np.isin(np.arange(self.length), (0, room + 1, self.length - 1))
    return made._replace(counts=made.counts & ~marks)

  def _begun(self, text: Ids[int]) -> list[int]:
    begin = self.vocabulary.begin
    text = [int(i) for i in text]
    return text if text[:1] == [begin] else [begin, *text]

  def _codes(self, codes: Ids[int]) -> list[int]:
    v = self.vocabulary
    if len(codes) != v.tokens:
      raise ValueError(
        f"a picture has {v.tokens} tokens here, not {len(codes)}: set"
        " data.image_size to that of the model"
      )
    return [v.offset + int(c) for c in codes]

  def _filled(self, text: Ids[int]) -> np.ndarray:
    given = [*self._begun(text), self.vocabulary.end][: self.length]
    fill = [self.vocabulary.end] * (self.length - len(given))
    return np.asarray([*given, *fill], np.int32)

  def _answered(self, tokens: Ids[int], *, otherwise: int) -> Sequence:
    """Returns a row of which the last answer counts.

    Args:
      tokens: the row.
      otherwise: ids that do not count where there is no header.
    """
    tokens = np.asarray(tokens, np.int32)
    headers = np.flatnonzero(tokens == self.vocabulary.end_header)
    given = headers[-1] + 1 if len(headers) else otherwise
    return Sequence(tokens, np.arange(self.length) >= given)
