"""What turns pictures into codes and back."""

from typing import Protocol

from jaxtyping import Float, Int, UInt8
import numpy as np


class ImageTokenizer(Protocol):
  """Pictures to code numbers and back.

  Attributes:
    codes: how many codes there are.
    side: pixels of a token's side.
  """

  codes: int
  side: int

  def encode(
    self, pixels: Float[np.ndarray, "B H W 3"]
  ) -> Int[np.ndarray, "B n"]:
    """Returns the codes of pictures in [-1, 1], row by row."""

  def decode(
    self,
    ids: Int[np.ndarray, "B n"],
    grid: tuple[int, int] | None = None,
  ) -> UInt8[np.ndarray, "B H W 3"]:
    """Returns pictures of bytes, of a square of codes or of a grid."""
