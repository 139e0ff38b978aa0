"""Plots as SVG text by matplotlib, which follow the reader's colour scheme.

Matplotlib is imported where a plot is drawn: nothing else waits for it.
"""

from collections.abc import Mapping, Sequence
import contextlib
import io
import math
import re
import statistics

import numpy as np

Point = tuple[float, float, float]
"""x, y and the standard error of y."""

_INK, _GRID, _LIMIT = "#1f2328", "#dddddd", "#e0002d"
_DARK = """.plot *{stroke-linejoin:round}
@media (prefers-color-scheme:dark){
.plot [style*="fill: #1f2328"]{fill:#e6e8eb!important}
.plot [style*="stroke: #1f2328"]{stroke:#e6e8eb!important}
.plot [style*="stroke: #dddddd"]{stroke:#333a44!important}
.plot [style*="fill: #ffffff"]{fill:#15181d!important}
}"""
_LOOK = {
  "axes.autolimit_mode": "round_numbers",
  "axes.axisbelow": True,
  "axes.edgecolor": _GRID,
  "axes.grid": True,
  "axes.grid.axis": "y",
  "axes.labelcolor": _INK,
  "axes.labelpad": 8,
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.xmargin": 0,
  "axes.ymargin": 0,
  "font.sans-serif": ["DejaVu Sans"],
  "grid.color": _GRID,
  "legend.frameon": False,
  "svg.fonttype": "none",
  "text.color": _INK,
  "text.parse_math": False,
  "xtick.color": _INK,
  "ytick.color": _INK,
}
_WIDTH, _HEIGHT = 504, 324  # points, of what the axes enclose
_LETTER = 6  # points, about, of a name
_MARKED = 50  # points of a curve, at most, that are seen one by one
_NUMBER = "{x:,.10g}"


def line_plot(
  series: Mapping[str, Sequence[Point]],
  *,
  x_label: str,
  y_label: str,
  log_x: bool = False,
  log_y: bool = False,
) -> str:
  """Returns an SVG of one curve a name, in the order given.

  Curves that lie whole above four times the typical one would press the others into
  a line: they are left out, and the legend says so.

  Args:
    series: the points of each curve.
    x_label: what x is.
    y_label: what y is.
    log_x: whether x, above 0, lies on a logarithmic axis.
    log_y: whether y does; no curve is left out then.

  Raises:
    ValueError: there is no point.
  """
  curves = {
    name: np.reshape([p for p in line if math.isfinite(p[1])], (-1, 3))
    for name, line in series.items()
  }
  lowest = {
    n: float(points[:, 1].min()) for n, points in curves.items() if len(points)
  }
  if not lowest:
    raise ValueError("nothing to plot: no curve has a finite point")
  typical = statistics.median(lowest.values())
  with _look((series, x_label, y_label)):
    axes = _axes(xlabel=x_label, ylabel=y_label)
    for name, points in curves.items():
      above = not log_y and 0 < 4 * typical < lowest.get(name, math.inf)
      x, y, error = points[: 0 if above else None].T
      # Matplotlib leaves a name that begins with _ out of the legend.
      label = " " * name.startswith("_") + name + " (above)" * above
      error = _finite(error) if np.any(_finite(error)) else None
      marker = "." if len(x) <= _MARKED else None
      axes.errorbar(x, y, error, label=label, marker=marker, markersize=5)
    if log_x:
      axes.set_xscale("log")
      _logarithmic(axes.xaxis)
    else:
      axes.set_xlim(left=0)
    if log_y:
      axes.set_yscale("log")
      _logarithmic(axes.yaxis)
    return _svg(axes)


def _logarithmic(axis) -> None:
  """Marks 1, 2 and 5 of each power of ten, as numbers."""
  from matplotlib import ticker

  axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
  axis.set_minor_locator(ticker.NullLocator())
  axis.set_major_formatter(_NUMBER)


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
  width = 0.7 / len(names)
  with _look((groups, y_label)):
    axes = _axes(ylabel=y_label)
    for k, name in enumerate(names):
      x = np.arange(len(groups)) + (k - (len(names) - 1) / 2) * width
      bars = [group.get(name, (math.nan, 0.0)) for group in groups.values()]
      y, error = np.transpose(bars)
      y = np.where(np.isfinite(y), y, math.nan)
      ends = np.minimum(_finite(error), [y, (high or math.inf) - y])
      drawn = axes.bar(
        x, y, 0.94 * width, yerr=np.maximum(ends, 0), ecolor=_INK, label=name
      )
      axes.bar_label(drawn, fmt="{:.4g}", padding=3)
    axes.set(xlim=(-0.5, len(groups) - 0.5), ylim=(0, high))
    axes.set_xticks(range(len(groups)), groups)
    if _LETTER * max(map(len, groups)) > _WIDTH / len(groups):
      axes.tick_params(axis="x", labelrotation=30)
      for label in axes.get_xticklabels():
        label.set(ha="right", rotation_mode="anchor")
    return _svg(axes, legend=len(names) > 1)  # one is the axis's label


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
  names = list(dict.fromkeys(name for parts in rows.values() for name in parts))
  with _look((rows, x_label, limits)):
    axes = _axes(height=28 * len(rows), xlabel=x_label)
    start = np.zeros(len(rows))
    for name in names:
      sizes = _finite([parts.get(name, 0.0) for parts in rows.values()])
      axes.barh(range(len(rows)), sizes, 0.6, start, label=name)
      start += sizes
    limits = limits or {}
    marked = [i for i, row in enumerate(rows) if row in limits]
    if marked:
      at = [limits[row] for row in rows if row in limits]
      low, high = np.subtract(marked, 0.45), np.add(marked, 0.45)
      axes.vlines(at, low, high, _LIMIT, linewidth=2, label="limit")
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x")
    axes.spines.left.set_visible(False)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=0)
    return _svg(axes)


def _finite(values) -> np.ndarray:
  return np.nan_to_num(values, posinf=0.0, neginf=0.0)


def _look(data: object) -> contextlib.AbstractContextManager[None]:
  """Returns the style of a plot, whose ids depend on its data."""
  from cycler import cycler
  from matplotlib import rcParamsDefault, style

  cycle = (
    cycler(linestyle=["-", "--", ":"]) * rcParamsDefault["axes.prop_cycle"]
  )
  own = {"axes.prop_cycle": cycle, "svg.hashsalt": repr(data)}
  return style.context(["default", _LOOK | own])


def _axes(*, height: int = _HEIGHT, **labels: str):
  """Returns axes of one size; what is written around them makes room for itself."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(_WIDTH / 72, height / 72))
  axes = figure.add_axes((0, 0, 1, 1), **labels)
  axes.tick_params(length=0, pad=6)
  axes.xaxis.set_major_formatter(_NUMBER)
  axes.yaxis.set_major_formatter(_NUMBER)
  return axes


def _svg(axes, *, legend: bool = True) -> str:
  """Returns what can be a file and can stand in a page beside others."""
  if legend:
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02))
  out = io.StringIO()
  nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
  axes.figure.savefig(
    out, format="svg", bbox_inches="tight", pad_inches=0.15, metadata=nothing
  )
  text = out.getvalue()
  text = text[text.index("<svg") :]
  text = re.sub(r"(?<=<style type=\"text/css\">).*?(?=</style>)", _DARK, text)
  text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same in every plot
  return text.replace("<svg ", '<svg class="plot" ', 1)
