"""Image tokens among those of text: MMaDA's vocabulary (arXiv:2505.15809).

One table has the tokens of text, a few marks, and a token for each code of the
image tokenizer: that of code c is `offset + c`. In the published models the
offset is the length of the text tokenizer, not the rows of its table: the first
codes lie on rows that LLaDA leaves free.
"""

import dataclasses
from typing import Any

from dllm_jax.core import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageVocabulary:
  """Where image tokens and marks are; the defaults are the published ids.

  Attributes:
    offset: the token of code 0.
    codes: how many codes there are.
    tokens: image tokens of a picture (N).
    begin: what begins a text.
    end: what ends a text, and fills it on the right.
    start_image: stands before a picture.
    end_image: stands behind it.
    to_image: begins a row whose picture follows its text.
    understand: begins a row whose text follows its picture.
    pad: fills a text on the left, before `to_image`.
    reason: begins a row that thinks before its picture.
    end_header: ends the name of who speaks.
  """

  offset: int = 126349
  codes: int = 8192
  tokens: int = 1024
  begin: int = 126080
  end: int = 126081
  start_image: int = 126084
  end_image: int = 126085
  to_image: int = 126088
  understand: int = 126089
  pad: int = 126093
  reason: int = 126094
  end_header: int = 126347

  def __post_init__(self):
    check.at_least(self, 1, "codes", "tokens", prefix="image ")

  @property
  def stop(self) -> int:
    """The token after that of the last code."""
    return self.offset + self.codes

  def is_code(self, ids: Any) -> Any:
    """Returns which tokens of an array, numpy's or jax's, are of pictures."""
    return (ids >= self.offset) & (ids < self.stop)

  def text_room(self, length: int) -> int:
    """Returns the longest text of a row with a picture (M).

    Raises:
      ValueError: there is none.
    """
    room = length - self.tokens - 3
    if room < 2:
      raise ValueError(
        f"a row of {length} tokens has no room for a picture of {self.tokens},"
        " its three marks and a text: raise data.length, or lower"
        " data.image_size"
      )
    return room

  def empty_prompt(self, length: int) -> tuple[int, ...]:
    """Returns what stands before `start_image` in a row without a text."""
    own = (self.to_image, self.begin, self.end)
    return (self.pad,) * (self.text_room(length) - 2) + own
