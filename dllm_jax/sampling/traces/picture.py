"""A trace as a picture: a GIF that plays it, or a PNG strip of its moments.

Characters stand on a grid, in the font that matplotlib brings with it.
"""

from collections.abc import Callable, Sequence
import io
import os

from dllm_jax.core import paths
from dllm_jax.sampling.traces.strip import layout, LIGHT, text_of, width
from dllm_jax.sampling.traces.trace import Film, film_of, Trace

_ADVANCE, _LINE, _PAD, _HEAD = 9, 20, 14, 24  # pixels
_PAPER, _INK, _SOFT = "#ffffff", "#1c1b19", "#67645d"
_HIDDEN = "#e4e0d6"
_FRAMES = 60


def write_picture(
  path: str | os.PathLike[str],
  trace: Trace,
  decode: Callable[[Sequence[int]], str],
  *,
  sample: int = 0,
  panels: int = 4,
  columns: int = 28,
  lines: int = 9,
  seconds: float = 6.0,
) -> None:
  """Writes a GIF or a PNG, by the name of the file.

  Args:
    path: the file; ".gif" plays, ".png" is a strip of evenly spaced moments.
    trace: what happened.
    decode: the tokenizer: token ids to text; called with one id at a time.
    sample: the row of the batch.
    panels: moments of a strip, at least 2.
    columns: characters in a line.
    lines: lines; what follows is cut.
    seconds: the length of the GIF, its last frame not counted.

  Raises:
    ValueError: another suffix, no such sample, or fewer than 2 panels.
  """
  path = paths.place(path)
  kind = path.suffix.lower()
  if kind not in (".gif", ".png"):
    raise ValueError(f"a picture is a .gif or a .png, not {str(path)!r}")
  film = film_of(trace, sample)
  if panels < 2:
    raise ValueError(f"a strip needs at least 2 panels, not {panels}")
  from PIL import Image  # noqa: PLC0415  Only pictures need it.

  cells = layout(film, decode, columns, lines)
  rows = 1 + max((row for *_, row in cells), default=0)
  size = (columns * _ADVANCE + 2 * _PAD, rows * _LINE + 2 * _PAD + _HEAD)
  draw = lambda step: _panel(film, decode, cells, step, size)
  count = panels if kind == ".png" else min(_FRAMES, len(film.steps) + 1)
  frames = [draw(step) for step in film.moments(count)]
  if kind == ".gif":
    pause = int(1000 * seconds / len(frames))
    frames[0].save(
      file := io.BytesIO(),
      "GIF",
      save_all=True,
      append_images=frames[1:],
      duration=[pause] * (len(frames) - 1) + [max(pause, 2000)],
      loop=0,
    )
    path.write_bytes(file.getvalue())
    return
  across = sum(frame.width for frame in frames) + _PAD * (len(frames) - 1)
  strip = Image.new("RGB", (across, size[1]), _PAPER)
  for i, frame in enumerate(frames):
    strip.paste(frame, (i * (size[0] + _PAD), 0))
  strip.save(file := io.BytesIO(), "PNG")
  path.write_bytes(file.getvalue())


def _panel(film: Film, decode, cells, step: int, size):
  from matplotlib import font_manager  # noqa: PLC0415
  from PIL import Image, ImageDraw, ImageFont  # noqa: PLC0415

  panel = Image.new("RGB", size, _PAPER)
  draw = ImageDraw.Draw(panel)
  font = ImageFont.truetype(font_manager.findfont("DejaVu Sans Mono"), 14)
  title = f"step {step} of {len(film.steps)}"
  draw.text((2, 3), title, _SOFT, font)
  _legend(draw, 2 + draw.textlength(title, font), size[0], font)
  draw.rounded_rectangle(
    (0, _HEAD, size[0] - 1, size[1] - 1), 6, outline="#dcd8ce"
  )
  canvas, last = film.canvas(step), film.canvas(len(film.steps))
  for slot, text, column, row in cells:
    now = canvas[slot]
    text = text_of(now, last[slot], text, decode)
    x, y = _PAD + column * _ADVANCE, _HEAD + _PAD + row * _LINE
    hidden = now.token is None
    if not film.fixed[slot]:
      shade = _HIDDEN if hidden else LIGHT[min(4, int(5 * now.confidence))]
      right = x + width(text) * _ADVANCE
      draw.rectangle((x, y + 1, right - 1 - hidden, y + _LINE - 2), shade)
    if not hidden:
      for i, character in enumerate(text):
        left = x + width(text[:i]) * _ADVANCE
        for at in range(1 + film.fixed[slot]):  # Twice is bold: given.
          draw.text((left + at, y + 2), character, _INK, font)
  return panel


def _legend(draw, left: float, right: int, font) -> None:
  """Draws the scale of colours in a panel's head, if there is room for it."""
  side = 10
  ramp = right - 2 - 4 * _ADVANCE - 4 - len(LIGHT) * side
  if ramp - 4 - 7 * _ADVANCE < left:
    return
  draw.text((right - 2 - 4 * _ADVANCE, 3), "sure", _SOFT, font)
  for i, shade in enumerate(LIGHT):
    left = ramp + i * side
    draw.rectangle((left, 6, left + side - 1, 6 + side), shade)
  draw.text((ramp - 4 - 6 * _ADVANCE, 3), "unsure", _SOFT, font)
