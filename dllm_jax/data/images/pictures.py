"""Pictures as MMaDA prepares them: decoded, made square, in [-1, 1].

All by Pillow, bicubic, on bytes. Alpha is dropped, not blended.
"""

import io
from typing import Any, get_args, Literal
import warnings

from jaxtyping import Float
import numpy as np

Fit = Literal["crop", "squash", "pad"]
FITS = get_args(Fit)


def decoded(data: bytes, where: str) -> Any:
  """Returns a Pillow image of a file's bytes, RGB.

  Args:
    data: what the file holds.
    where: what it is called in messages.

  Raises:
    ValueError: they are no picture, or one so large that it is refused.
    ImportError: Pillow is not installed.
  """
  image = _pillow()
  with warnings.catch_warnings():
    warnings.simplefilter("error", image.DecompressionBombWarning)
    try:
      return image.open(io.BytesIO(data)).convert("RGB")
    except Exception as error:  # Each of its formats raises its own.
      raise ValueError(
        f"{where} is no picture that can be decoded ({_said(error)}); give a"
        " whole PNG, JPEG or WebP"
      ) from error


def _said(error: Exception) -> str:
  return " ".join(str(error).split())[:80] or type(error).__name__


def fitted(image: Any, size: int, fit: Fit = "crop") -> Any:
  """Returns a square picture of `size` pixels a side.

  "crop" brings the shorter side to the size and cuts the middle out, "squash"
  both sides, "pad" puts white around it first.
  """
  bicubic = _pillow().Resampling.BICUBIC
  width, height = image.size
  if fit == "squash":
    return image.resize((size, size), bicubic)
  if fit == "pad":
    side = max(width, height)
    square = _pillow().new("RGB", (side, side), (255, 255, 255))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square.resize((size, size), bicubic)
  short = min(width, height)
  scaled = tuple(
    size if side == short else int(size * side / short)
    for side in (width, height)
  )
  if scaled != image.size:
    image = image.resize(scaled, bicubic)
  # Half a pixel goes to the even side, as Python rounds.
  left, top = (round((side - size) / 2.0) for side in scaled)
  return image.crop((left, top, left + size, top + size))


def pixels_of(image: Any) -> Float[np.ndarray, "H W 3"]:
  """Returns a picture's values in [-1, 1]."""
  unit = np.asarray(image, np.float32) / np.float32(255.0)
  return (unit - np.float32(0.5)) / np.float32(0.5)


def png(pixels: np.ndarray) -> bytes:
  """Returns the PNG of a picture of bytes, `[H, W, 3]`."""
  _pillow().fromarray(pixels).save(file := io.BytesIO(), "PNG")
  return file.getvalue()


def _pillow() -> Any:
  try:
    from PIL import Image  # noqa: PLC0415  An extra: only pictures need it.
  except ImportError as error:
    raise ImportError(
      "pictures need Pillow: pip install 'dllm_jax[pictures]'"
    ) from error
  return Image
