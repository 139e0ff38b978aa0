"""Pictures against the original's preparation: `golden/magvit2`."""

import numpy as np
from PIL import Image
import pytest

from dllm_jax.data.images import decoded, fitted, pixels_of
from dllm_jax.data.images.pictures import FITS, png
from tests import golden_cases

CASE = golden_cases.load("magvit2")


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("one", CASE.config["preprocessing"], ids=str)
def test_squares(one, fit):
  image = decoded(png(CASE.arrays[f"{one['name']}_image"]), "a.png")
  found = pixels_of(fitted(image, one["resolution"], fit))
  expected = CASE.arrays[f"{one['name']}_{fit}"]
  np.testing.assert_array_equal(np.moveaxis(found, -1, 0), expected)


def test_alpha_is_dropped():
  data = png(np.asarray(Image.new("RGB", (2, 2), (9, 8, 7))))
  see_through = Image.new("RGBA", (2, 2), (9, 8, 7, 0))
  made = decoded(png(np.asarray(see_through)), "a.png")
  assert made.getpixel((0, 0)) == decoded(data, "b").getpixel((0, 0))


def test_what_is_no_picture():
  with pytest.raises(ValueError, match="cat.png is no picture"):
    decoded(b"GIF89a and nothing else", "cat.png")
  whole = png(np.zeros((64, 64, 3), np.uint8))
  with pytest.raises(ValueError, match="cut.png is no picture"):
    decoded(whole[: len(whole) // 2], "cut.png")
