"""A picture as it is unmasked, tile by tile: strips, animations and a page.

A tile that is not revealed is grey; those that are show the picture of the codes
at that step. Which tokens a picture has is the caller's to say.
"""

import base64
from collections.abc import Callable
import io
import json
import os
from typing import Any

import numpy as np

from dllm_jax.core import paths
from dllm_jax.sampling.traces.trace import film_of, Trace

_GREY = 226
_GAP = 4  # pixels between pictures
_SIDE = 224  # pixels of a picture, at least

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>A picture as it is unmasked</title>
<style>
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 34rem; padding: 0 1rem; }
img { width: 100%; image-rendering: pixelated; border-radius: .4rem; }
input { width: 100%; } button { min-width: 4rem; min-height: 2.5rem; }
</style></head><body>
<h1>A picture as it is unmasked</h1>
<img id="picture" alt="the picture at this step">
<p><button id="play">play</button> <span id="step" aria-live="polite"></span></p>
<input id="at" type="range" min="0" value="0" aria-label="step">
<script>
const frames = @FRAMES@;
const at = document.getElementById("at"), step = document.getElementById("step");
const picture = document.getElementById("picture");
const play = document.getElementById("play");
let timer = null;
at.max = frames.length - 1;
function show() {
  picture.src = "data:image/png;base64," + frames[at.value];
  step.textContent = `step ${at.value} of ${frames.length - 1}`;
}
function stop() { clearInterval(timer); timer = null; play.textContent = "play"; }
at.oninput = () => { stop(); show(); };
play.onclick = () => {
  if (timer) { stop(); return; }
  if (+at.value === frames.length - 1) at.value = 0;
  play.textContent = "stop";
  timer = setInterval(() => {
    if (+at.value >= frames.length - 1) { stop(); return; }
    at.value = +at.value + 1; show();
  }, 400);
  show();
};
at.value = frames.length - 1; show();
</script></body></html>
"""


def frames(
  trace: Trace,
  decode: Callable[[np.ndarray], np.ndarray],
  *,
  start: int,
  tokens: int,
  offset: int,
  sample: int = 0,
  count: int | None = None,
) -> list[np.ndarray]:
  """Returns a picture at evenly spaced steps, `[H, W, 3]` bytes each.

  Args:
    trace: what happened.
    decode: code numbers `[n, N]` to pictures of bytes.
    start: the slot of the picture's first token.
    tokens: its tokens, which fill a square.
    offset: the token of code 0.
    sample: the row of the batch.
    count: how many pictures; None for all steps.
  """
  film = film_of(trace, sample)
  steps = film.moments(count) if count else range(len(film.steps) + 1)
  events = [film.canvas(step)[start : start + tokens] for step in steps]
  hidden = np.array([[e.token is None for e in row] for row in events])
  last = film.canvas(len(film.steps))[start : start + tokens]
  known = [e.token for e in last]
  codes = np.array([
    [k if e.token is None else e.token for e, k in zip(row, known, strict=True)]
    for row in events
  ])
  made = np.array(decode(codes - offset))
  grid = round(tokens**0.5)
  side = made.shape[1] // grid
  covered = hidden.reshape(-1, grid, grid)
  covered = covered.repeat(side, axis=1).repeat(side, axis=2)
  made[covered] = _GREY
  # The edge of a hidden tile, so that a grid is seen.
  edge = np.zeros(made.shape[1:3], bool)
  edge[::side], edge[:, ::side] = True, True
  made[covered & edge] = _GREY - 24
  return list(made)


def write(
  path: str | os.PathLike[str],
  pictures: list[np.ndarray],
  *,
  panels: int = 6,
  seconds: float = 6.0,
) -> None:
  """Writes a picture's steps: ".gif" plays, ".png" is a strip, ".html" a page.

  Args:
    path: the file.
    pictures: the picture at each step.
    panels: pictures of a strip.
    seconds: the length of an animation, its last picture not counted.

  Raises:
    ValueError: another suffix.
  """
  path = paths.place(path)
  kind = path.suffix.lower()
  if kind == ".html":
    data = [_encoded(picture) for picture in map(_large, pictures)]
    page = _PAGE.replace("@FRAMES@", json.dumps(data))
    path.write_text(page, encoding="utf-8")
  elif kind == ".png":
    steps = np.linspace(0, len(pictures) - 1, panels).round().astype(int)
    path.write_bytes(_png(sheet([pictures[i] for i in steps], panels)))
  elif kind == ".gif":
    shown = list(map(_large, pictures))
    pause = int(1000 * seconds / len(shown))
    shown[0].save(
      file := io.BytesIO(),
      "GIF",
      save_all=True,
      append_images=shown[1:],
      duration=[pause] * (len(shown) - 1) + [max(pause, 2000)],
      loop=0,
    )
    path.write_bytes(file.getvalue())
  else:
    raise ValueError(
      f"the steps of a picture are a .gif, a .png or an .html, not {str(path)!r}"
    )


def sheet(pictures: list[np.ndarray], columns: int | None = None) -> np.ndarray:
  """Returns pictures of one size as one, in rows, white between them."""
  columns = columns or int(np.ceil(len(pictures) ** 0.5))
  height, width, _ = pictures[0].shape
  rows = -(-len(pictures) // columns)
  size = (rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3)
  whole = np.full(size, 255, np.uint8)
  for i, picture in enumerate(pictures):
    y, x = (i // columns) * (height + _GAP), (i % columns) * (width + _GAP)
    whole[y : y + height, x : x + width] = picture
  return whole


def _large(picture: np.ndarray) -> Any:
  """Returns a Pillow image of whole multiples of small pixels."""
  from PIL import Image  # noqa: PLC0415  Only pictures need it.

  times = max(1, -(-_SIDE // picture.shape[0]))
  big = picture.repeat(times, axis=0).repeat(times, axis=1)
  return Image.fromarray(big)


def _encoded(image: Any) -> str:
  image.save(file := io.BytesIO(), "PNG")
  return base64.b64encode(file.getvalue()).decode()


def _png(picture: np.ndarray) -> bytes:
  from PIL import Image  # noqa: PLC0415

  Image.fromarray(picture).save(file := io.BytesIO(), "PNG")
  return file.getvalue()
