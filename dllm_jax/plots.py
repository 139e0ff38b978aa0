"""Plots as SVG text: curves or bars with error bars, stacked bars, no more."""

from collections.abc import Mapping, Sequence
from html import escape
import math
import statistics

Point = tuple[float, float, float]
"""x, y and the standard error of y."""

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _LEGEND = 860, 460, 64, 48, 220
_LETTER = 6.6  # about, of a name
_TILT = 0.5  # radians, of names that have no room side by side
_COLOURS = (
    "#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7",
    "#a463f2", "#97bbf5", "#9c6b4e", "#6e7781", "#1f2328", "#b35900",
)  # fmt: skip


def line_plot(
  series: Mapping[str, Sequence[Point]],
  *,
  x_label: str,
  y_label: str,
  log_x: bool = False,
) -> str:
  """Returns an SVG of one curve a name, in the order given.

  Curves that lie whole above four times the typical one would press the others into
  a line: they are left out, and the legend says so.

  Args:
    series: the points of each curve.
    x_label: what x is.
    y_label: what y is.
    log_x: whether x, above 0, lies on a logarithmic axis.

  Raises:
    ValueError: there is no point.
  """
  points = [p for line in series.values() for p in line if math.isfinite(p[1])]
  if not points:
    raise ValueError("nothing to plot: no curve has a finite point")
  lowest = {
    name: min((p[1] for p in line if math.isfinite(p[1])), default=math.inf)
    for name, line in series.items()
  }
  typical = statistics.median(y for y in lowest.values() if math.isfinite(y))
  above = {n for n, y in lowest.items() if typical > 0 and y > 4 * typical}
  points = [
    p
    for name, line in series.items()
    for p in line
    if name not in above and math.isfinite(p[1])
  ]
  scale = math.log10 if log_x else float
  across_all = [p[0] for p in points]
  xs = _decades(across_all) if log_x else _ticks(across_all, 0.0)
  ys = _ticks([p[1] for p in points])
  right, top = _WIDTH - _LEGEND, 16
  first, last = scale(xs[0]), scale(xs[-1])
  across = lambda x: (
    _LEFT + (scale(x) - first) / (last - first) * (right - _LEFT)
  )
  up = lambda y: (
    (_HEIGHT - _BOTTOM)
    - (y - ys[0]) / (ys[-1] - ys[0]) * (_HEIGHT - _BOTTOM - top)
  )
  parts = [_head(), *_axis(ys, up, right, y_label)]
  for x in xs:
    parts.append(_text(across(x), _HEIGHT - _BOTTOM + 18, _round(x), "middle"))
  parts.append(_text((_LEFT + right) / 2, _HEIGHT - 8, x_label, "middle"))
  styles = {name: _style(i) for i, name in enumerate(series)}
  for name, line in series.items():
    if name not in above:
      parts.append(_curve(line, across, up, styles[name]))
  legend = {n + " (above)" * (n in above): s for n, s in styles.items()}
  parts += _legend(legend, right, top)
  return "\n".join([*parts, "</svg>"]) + "\n"


def bar_plot(
  groups: Mapping[str, Mapping[str, tuple[float, float]]],
  *,
  y_label: str,
  high: float | None = None,
) -> str:
  """Returns an SVG of bars in groups, one colour for each name in them.

  Args:
    groups: group -> name -> (height, standard error).
    y_label: what the height is.
    high: the top of the axis; None for the highest bar's.

  Raises:
    ValueError: there is no bar.
  """
  names = list(dict.fromkeys(n for bars in groups.values() for n in bars))
  if not names:
    raise ValueError("nothing to plot: no group has a bar")
  tops = [y + e for bars in groups.values() for y, e in bars.values()]
  ys = _ticks([high or max(tops)], 0.0)
  alone = len(names) == 1  # its name is that of the axis
  right, top = _WIDTH - (24 if alone else _LEGEND), 32
  up = lambda y: (_HEIGHT - _BOTTOM) - y / ys[-1] * (_HEIGHT - _BOTTOM - top)
  room = (right - _LEFT) / len(groups)
  wide = 0.7 * room / len(names)
  longest = _LETTER * max(map(len, groups))
  tilted = longest > room
  height = _HEIGHT + (int(longest * math.sin(_TILT)) if tilted else 0)
  parts = [_head(height), *_axis(ys, up, right, y_label)]
  for i, (group, bars) in enumerate(groups.items()):
    left = _LEFT + room * (i + 0.15)
    middle, below = left + 0.35 * room, _HEIGHT - _BOTTOM + 18
    if tilted:
      turn = (
        f"translate({middle:.1f} {below}) rotate({-math.degrees(_TILT):.0f})"
      )
      parts.append(f'<g transform="{turn}">{_text(0, 0, group, "end")}</g>')
    else:
      parts.append(_text(middle, below, group, "middle"))
    for name, (y, error) in bars.items():
      k = names.index(name)
      x = left + wide * k
      highest = min(y + error, ys[-1])
      parts.append(
        f'<rect x="{x:.1f}" y="{up(y):.1f}" width="{wide - 4:.1f}" '
        f'height="{max(up(0) - up(y), 1):.1f}" fill="{_COLOURS[k]}"/>'
        f'<path class="line" d="M{x + wide / 2 - 2:.1f} '
        f'{up(max(y - error, 0)):.1f}V{up(highest):.1f}"/>'
        + _text(x + wide / 2 - 2, up(highest) - 10, f"{y:.4g}", "middle")
      )
  if not alone:
    parts += _legend({n: _style(k) for k, n in enumerate(names)}, right, top)
  return "\n".join([*parts, "</svg>"]) + "\n"


def _head(height: int = _HEIGHT) -> str:
  """Returns the beginning of a plot, which follows the reader's colour scheme."""
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} '
    f'{height}" font-family="sans-serif" font-size="12">'
    "<style>.paper{fill:#fff}.grid{stroke:#ddd}.line{stroke:#1f2328;fill:none}"
    "text{fill:#1f2328}@media(prefers-color-scheme:dark){.paper{fill:#15181d}"
    ".grid{stroke:#333a44}.line{stroke:#e6e8eb}text{fill:#e6e8eb}}</style>"
    f'<rect class="paper" width="{_WIDTH}" height="{height}"/>'
  )


def _axis(ys: Sequence[float], up, right: float, label: str) -> list[str]:
  """Returns the horizontal lines and what they stand for."""
  parts = []
  for y in ys:
    parts.append(
      f'<path class="grid" d="M{_LEFT} {up(y):.1f}H{right}"/>'
      + _text(_LEFT - 8, up(y) + 4, _round(y), "end")
    )
  parts.append(
    f'<g transform="translate(14 {_HEIGHT / 2}) rotate(-90)">'
    + _text(0, 0, label, "middle")
    + "</g>"
  )
  return parts


def _style(i: int) -> str:
  """Returns the stroke of the i-th name: dashed once colours are used up."""
  dashes = ' stroke-dasharray="5 3"' if i >= len(_COLOURS) else ""
  return f'stroke="{_COLOURS[i % len(_COLOURS)]}"{dashes}'


def _legend(styles: Mapping[str, str], right: float, top: float) -> list[str]:
  parts = []
  for i, (name, style) in enumerate(styles.items()):
    y = top + 12 + 18 * i
    parts.append(
      f'<path d="M{right + 14} {y - 4}h18" {style} '
      'stroke-width="2"/>' + _text(right + 38, y, name, "start")
    )
  return parts


def stacked_bars(
  rows: Mapping[str, Mapping[str, float]],
  *,
  x_label: str,
  limits: Mapping[str, float] | None = None,
) -> str:
  """Returns an SVG of one horizontal bar a row, stacked from named parts.

  Args:
    rows: sizes of parts by row and name; a part has one colour in all rows.
    x_label: what is measured, with its unit.
    limits: for some rows, where a line marks a limit.

  Raises:
    ValueError: there is no row.
  """
  if not rows:
    raise ValueError("nothing to plot: there is no row")
  limits = limits or {}
  names = list(dict.fromkeys(name for parts in rows.values() for name in parts))
  colour = {n: _COLOURS[i % len(_COLOURS)] for i, n in enumerate(names)}
  ends = [sum(parts.values()) for parts in rows.values()]
  xs = _ticks([*ends, *limits.values()], 0.0)
  left = 20 + 7 * max(map(len, rows))
  right, top, step = _WIDTH - _LEGEND, 16, 34
  height = max(top + step * len(rows), top + 18 * len(names) + 18) + _BOTTOM
  bottom = top + step * len(rows)
  across = lambda x: left + x / xs[-1] * (right - left)
  parts = [_head(height)]
  for x in xs:
    at = across(x)
    parts.append(f'<path class="grid" d="M{at:.1f} {top}V{bottom}"/>')
    parts.append(_text(at, bottom + 18, _round(x), "middle"))
  parts.append(_text((left + right) / 2, bottom + 38, x_label, "middle"))
  for i, (row, sizes) in enumerate(rows.items()):
    y, start = top + step * i + 7, 0.0
    parts.append(_text(left - 8, y + 14, row, "end"))
    for name, size in sizes.items():
      width = across(start + size) - across(start)
      parts.append(
        f'<rect x="{across(start):.1f}" y="{y}" width="{width:.1f}" '
        f'height="20" fill="{colour[name]}"/>'
      )
      start += size
    if row in limits:
      at = across(limits[row])
      parts.append(
        f'<path d="M{at:.1f} {y - 5}v30" stroke="#b00" stroke-width="2"/>'
      )
  for i, name in enumerate(names):
    y = top + 12 + 18 * i
    parts.append(
      f'<rect x="{right + 14}" y="{y - 10}" width="18" height="11" '
      f'fill="{colour[name]}"/>' + _text(right + 38, y, name, "start")
    )
  if limits:
    y = top + 12 + 18 * len(names)
    parts.append(
      f'<path d="M{right + 23} {y - 11}v13" stroke="#b00" stroke-width="2"/>'
      + _text(right + 38, y, "limit", "start")
    )
  return "\n".join([*parts, "</svg>"]) + "\n"


def _curve(line: Sequence[Point], across, up, style: str) -> str:
  """Returns one polyline with a bar of a standard error either way."""
  line = [
    (x, y, e if math.isfinite(e) else 0.0)
    for x, y, e in line
    if math.isfinite(y)
  ]
  path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y, _ in line)
  bars = "".join(
    f'<path d="M{across(x):.1f} {up(y - e):.1f}V{up(y + e):.1f}"/>'
    f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="1"/>'
    for x, y, e in line
  )
  return (
    f'<g {style} stroke-width="1.5" fill="none">'
    f'<polyline points="{path}"/>{bars}</g>'
  )


def _ticks(values: Sequence[float], low: float | None = None) -> list[float]:
  """Returns round numbers around some values, four to ten of them."""
  low, high = min(values) if low is None else low, max(values)
  span = (high - low) or 1.0
  step = 10.0 ** math.floor(math.log10(span / 4))
  step *= next(k for k in (1, 2, 5, 10) if span / (k * step) <= 8)
  first, last = math.floor(low / step), math.ceil(high / step)
  return [step * k for k in range(first, max(last, first + 1) + 1)]


def _decades(values: Sequence[float]) -> list[float]:
  """Returns 1, 2 and 5 times powers of ten around some values."""
  powers = range(
    math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1
  )
  ticks = [k * 10.0**n for n in powers for k in (1, 2, 5)]
  low = max((t for t in ticks if t <= min(values)), default=ticks[0])
  high = min((t for t in ticks if t >= max(values)), default=ticks[-1])
  found = [t for t in ticks if low <= t <= high]
  return found if len(found) > 1 else [low, 2 * low]


def _round(value: float) -> str:
  """Returns a tick's number: thousands with commas, no powers of ten."""
  return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _text(x: float, y: float, text: str, anchor: str) -> str:
  return (
    f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
    f"{escape(text)}</text>"
  )
