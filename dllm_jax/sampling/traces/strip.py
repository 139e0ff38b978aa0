"""A still strip of an unmasking: a few moments of a trace in one SVG."""

from collections.abc import Callable, Sequence
import os
import unicodedata
from xml.sax.saxutils import escape

from dllm_jax.core import paths
from dllm_jax.sampling.traces.trace import Event, Film, film_of, Trace

# Backgrounds from unsure to sure: orange to blue, not red to green.
LIGHT = ("#ffc9b0", "#f0d79b", "#c3e2ae", "#a6e3d6", "#aedcff")
_DARK = ("#7b3f22", "#64501a", "#3a5c2b", "#1a5f57", "#1f567b")
_ADVANCE, _LINE, _PAD, _GAP = 8.4, 20, 14, 16  # pixels, at 14 px monospace

_STYLE = """
text { font: 14px ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace;
  fill: #1c1b19; white-space: pre; }
.head { font: 13px system-ui, sans-serif; fill: #67645d; }
.given { font-weight: 700; }
.panel { fill: #ffffff; stroke: #dcd8ce; }
.hidden { fill: #e4e0d6; }
%s
@media (prefers-color-scheme: dark) {
  text { fill: #eeece6; }
  .head { fill: #a19d94; }
  .panel { fill: #1f1f22; stroke: #38373a; }
  .hidden { fill: #38373c; }
  %s
}
"""


def write_strip(
  path: str | os.PathLike[str],
  trace: Trace,
  decode: Callable[[Sequence[int]], str],
  *,
  sample: int = 0,
  panels: int = 4,
  columns: int = 28,
  lines: int = 9,
) -> None:
  """Writes an SVG of evenly spaced moments, the start and the end included.

  Args:
    path: the file to write.
    trace: what happened.
    decode: the tokenizer: token ids to text; called with one id at a time.
    sample: the row of the batch.
    panels: how many moments, at least 2.
    columns: characters in a line of a panel.
    lines: lines in a panel; what follows is cut.

  Raises:
    ValueError: there is no such sample, or fewer than 2 panels.
  """
  film = film_of(trace, sample)
  if panels < 2:
    raise ValueError(f"a strip needs at least 2 panels, not {panels}")
  steps = film.moments(panels)
  cells = layout(film, decode, columns, lines)
  last = film.canvas(len(film.steps))
  across = columns * _ADVANCE + 2 * _PAD
  rows = 1 + max((row for *_, row in cells), default=0)
  height = rows * _LINE + 2 * _PAD
  body = []
  for i, step in enumerate(steps):
    title = f"step {step} of {len(film.steps)}"
    x = i * (across + _GAP) + 0.5
    body.append(f'<text class="head" x="{x:.1f}" y="14">{title}</text>')
    body.append(
      f'<rect class="panel" x="{x:.1f}" y="22.5" rx="6" width="{across:.1f}" '
      f'height="{height}"/>'
    )
    canvas = film.canvas(step)
    for slot, text, column, row in cells:
      now = canvas[slot]
      text = text_of(now, last[slot], text, decode)
      given = film.fixed[slot]
      body.append(_cell(now, text, x + _PAD, column, row, given=given))
  total = len(steps) * (across + _GAP) - _GAP
  body.append(_legend(total))
  paths.place(path).write_text(
    _document(body, total, height + 24), encoding="utf-8"
  )


def _legend(right: float) -> str:
  """Returns the scale of colours, at the right above the last panel."""
  text = '<text class="head" x="{:.1f}" y="14" text-anchor="end">{}</text>'
  swatch = '<rect class="c{}" x="{:.1f}" y="4" width="14" height="11"/>'
  return "".join([
    text.format(right, "sure"),
    *(swatch.format(i, right - 102 + 14 * i) for i in range(5)),
    text.format(right - 106, "unsure"),
  ])


def _document(body: list[str], width: float, height: float) -> str:
  ramp = lambda colours: "\n".join(
    f".c{i} {{ fill: {colour}; }}" for i, colour in enumerate(colours)
  )
  style = _STYLE % (ramp(LIGHT), ramp(_DARK))
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + 1:.0f}" '
    f'height="{height:.0f}" viewBox="0 0 {width + 1:.0f} {height:.0f}">\n'
    f"<title>A text as it is unmasked</title>\n<style>{style}</style>\n"
    + "\n".join(body)
    + "\n</svg>\n"
  )


def layout(
  film: Film, decode: Callable, columns: int, lines: int
) -> list[tuple[int, str, int, int]]:
  """Returns (slot, text, column, row): where the pieces of the end stand.

  Lines break at newlines and between words. A token that crosses a line is cut
  into cells. Wide characters take two columns.
  """
  characters = [
    (event.slot, character)
    for event in film.canvas(len(film.steps))
    for character in ("·" if event.token is None else decode([event.token]))
  ]
  text = "".join(character for _, character in characters)
  cells, column, row = [], 0, 0
  for i, (slot, character) in enumerate(characters):
    if not character.isspace() and (i == 0 or text[i - 1].isspace()):
      word = width(text[i:].split(None, 1)[0])
      if column and column + word > columns >= word:
        column, row = 0, row + 1
    if column + width(character) > columns and character != "\n":
      column, row = 0, row + 1
    if row >= lines:
      break
    last = cells[-1] if cells else None
    if last and last[0] == slot and last[3] == row and character != "\n":
      cells[-1] = (slot, last[1] + printable(character), last[2], row)
    else:
      cells.append((slot, printable(character), column, row))
    column += width(character)
    if character == "\n":
      column, row = 0, row + 1
  return cells


def text_of(now: Event, last: Event, room: str, decode: Callable) -> str:
  """Returns what stands in a cell now, as wide as what stands there last."""
  if now.token in (None, last.token):
    return room
  text = printable(decode([now.token]))
  while width(text) > width(room):
    text = text[:-1]
  return text + " " * (width(room) - width(text))


def printable(text: str) -> str:
  """Returns a text of one line, without characters that steer a terminal."""
  return "".join(
    "↵" if c == "\n" else c if c.isprintable() else "\ufffd" for c in text
  )


def width(text: str) -> int:
  """Returns how many columns a text takes."""
  return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _cell(
  event: Event, room: str, left: float, column: int, row: int, *, given: bool
) -> str:
  """Returns a token's background and, unless it is hidden, its text."""
  x, y = left + column * _ADVANCE, 22 + _PAD + row * _LINE
  hidden = event.token is None
  shade = "hidden" if hidden else f"c{min(4, int(5 * event.confidence))}"
  parts = []
  if not given:
    inset = 0.6 if hidden else 0.0
    parts.append(
      f'<rect class="{shade}" x="{x + inset:.1f}" y="{y + 1}" rx="1.5" '
      f'width="{width(room) * _ADVANCE - 2 * inset:.1f}" height="{_LINE - 2}"/>'
    )
  if not hidden and (text := room.strip()):
    offset = (len(room) - len(room.lstrip())) * _ADVANCE
    parts.append(
      f'<text{" class=" + chr(34) + "given" + chr(34) if given else ""} '
      f'x="{x + offset:.1f}" y="{y + 14.5}" '
      f'textLength="{width(text) * _ADVANCE:.1f}">{escape(text)}</text>'
    )
  return "".join(parts)
