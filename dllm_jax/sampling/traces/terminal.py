"""A trace as an animation in the terminal, and as a widget in a notebook."""

from collections.abc import Callable, Iterator, Sequence
import html
import os
import sys
import time
from typing import TextIO

from dllm_jax.sampling.traces.strip import layout, text_of, width
from dllm_jax.sampling.traces.trace import Film, film_of, page, Trace

# Backgrounds of the 256-colour palette from unsure to sure: orange to blue.
_RAMP = (216, 222, 151, 115, 117)
_HIDDEN, _RESET = "\x1b[48;5;248m", "\x1b[0m"
_HOME, _CLEAR = "\x1b[H", "\x1b[J"


def screens(
  film: Film,
  decode: Callable[[Sequence[int]], str],
  *,
  columns: int = 78,
  lines: int = 20,
  colour: bool = True,
) -> Iterator[str]:
  """Yields the text of a sample at its start and after each of its steps.

  Args:
    film: the sample.
    decode: the tokenizer: token ids to text.
    columns: characters in a line.
    lines: lines; what follows is cut.
    colour: whether confidence is shown by ANSI colours; masks are then shaded
      blanks, and else dots.
  """
  cells = layout(film, decode, columns, lines)
  last = film.canvas(len(film.steps))
  shown = len({slot for slot, *_ in cells})
  cut = f", the first {shown} of {len(last)} tokens" * (shown < len(last))
  for step in range(len(film.steps) + 1):
    canvas = film.canvas(step)
    rows: dict[int, list[str]] = {}
    for slot, text, _, row in cells:
      now = canvas[slot]
      text = text_of(now, last[slot], text, decode)
      given = film.fixed[slot]
      cell = _cell(text, now.token, now.confidence, given, colour)
      rows.setdefault(row, []).append(cell)
    body = "\n".join(
      "".join(rows.get(i, [])) for i in range(max(rows, default=0) + 1)
    )
    yield f"step {step} of {len(film.steps)}{cut}\n\n{body}\n"


def _cell(text, token, confidence, given, colour) -> str:
  if token is None:
    # Blanks, not text in the colour of its ground: terminals that see to it
    # that text can be read would show what is not revealed yet.
    return (
      f"{_HIDDEN}{' ' * width(text)}{_RESET}" if colour else "·" * width(text)
    )
  if not colour:
    return text
  if given:
    return f"\x1b[1m{text}{_RESET}"
  shade = _RAMP[min(4, int(5 * confidence))]
  return f"\x1b[48;5;{shade}m\x1b[38;5;16m{text}{_RESET}"


def play(
  trace: Trace,
  decode: Callable[[Sequence[int]], str],
  *,
  sample: int = 0,
  seconds: float = 6.0,
  out: TextIO | None = None,
  columns: int | None = None,
  lines: int | None = None,
) -> None:
  """Plays a sample in the terminal; without one, prints its start and end.

  Args:
    trace: what happened.
    decode: the tokenizer: token ids to text.
    sample: the row of the batch.
    seconds: the length of the animation.
    out: where to; by default standard error.
    columns: characters in a line; None for the terminal's, 78 at most.
    lines: lines of text; None for the terminal's, 20 at most.

  Raises:
    ValueError: there is no such sample.
  """
  out = sys.stderr if out is None else out
  film = film_of(trace, sample)
  live = out.isatty()
  # A line that the terminal wraps would put all that follow in its wrong place.
  across, height = _size(out)
  columns = columns or max(8, min(78, across - 1))
  lines = lines or max(1, min(20, height - 4))
  frames = list(
    screens(film, decode, columns=columns, lines=lines, colour=live)
  )
  if not live:
    frames = [frames[0], frames[-1]]
  pause = seconds / len(frames) if live else 0.0
  for frame in frames:
    start = f"{_HOME}{_CLEAR}" if frame is frames[0] else _HOME
    out.write((start if live else "") + frame)
    out.flush()
    time.sleep(pause)


def _size(out: TextIO) -> tuple[int, int]:
  """Returns the columns and lines of a terminal, 80 and 24 of anything else."""
  try:
    return os.get_terminal_size(out.fileno())
  except (OSError, ValueError, AttributeError):
    return 80, 24


class Widget:
  """A trace that a notebook shows as its page, in a frame of its own."""

  def __init__(
    self,
    trace: Trace,
    decode: Callable[[Sequence[int]], str],
    *,
    title: str = "Unmasking",
    height: int = 420,
  ):
    self._page = page(trace, decode, title=title)
    self._height = height

  def _repr_html_(self) -> str:
    return (
      f'<iframe srcdoc="{html.escape(self._page)}" width="100%" '
      f'height="{self._height}" style="border:0"></iframe>'
    )
