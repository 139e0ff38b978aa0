"""What a grid found: tables, plots and the numbers themselves."""

from collections.abc import Sequence
import dataclasses
import json
import os
from typing import Any

from dllm_jax.core import paths
from dllm_jax.plots import line_plot
from dllm_jax.reports.scaling import fit
from dllm_jax.reports.scaling.fit import Point

_LABEL = "bits per character (held out)"


def write(points: Sequence[Point], output: str | os.PathLike) -> dict[str, Any]:
  """Writes scaling.md, scaling.json, isoflop.svg and frontier.svg.

  The first configuration is the one that the others' compute is compared with.

  Args:
    points: runs that are done.
    output: the directory.

  Returns:
    What scaling.json has: `points`, `laws` by configuration, `multipliers`, and
    the paths of what was written.

  Raises:
    ValueError: there is no point.
  """
  if not points:
    raise ValueError("nothing to report: no run of the grid is done")
  output = paths.place(output)
  groups = {
    config: [p for p in points if p.config == config]
    for config in dict.fromkeys(p.config for p in points)
  }
  laws = {config: _law(mine) for config, mine in groups.items()}
  first, *others = groups
  against = {
    config: fit.multiplier(groups[first], groups[config]) for config in others
  }
  result = {
    "points": [dataclasses.asdict(point) for point in points],
    "laws": laws,
    "multipliers": against,
  }
  text = json.dumps(result, indent=2) + "\n"
  (output / "scaling.json").write_text(text, encoding="utf-8")
  page = table(points) + "\n" + _said(first, laws, against)
  (output / "scaling.md").write_text(page, encoding="utf-8")
  isoflop = line_plot(
    _curves(points), x_label="parameters", y_label=_LABEL, log_x=True
  )
  (output / "isoflop.svg").write_text(isoflop, encoding="utf-8")
  names = ["scaling.md", "isoflop.svg"]
  if frontier := _frontier(groups):
    drawn = line_plot(
      frontier, x_label="FLOPs of training", y_label=_LABEL, log_x=True
    )
    (output / "frontier.svg").write_text(drawn, encoding="utf-8")
    names.append("frontier.svg")
  written = {name.split(".")[0]: str(output / name) for name in names}
  return result | {"written": written, "table": page}


def _law(points: Sequence[Point]) -> dict[str, Any]:
  """Returns a configuration's laws with their intervals, for JSON."""
  found, draws = fit.law(points), fit.bootstrapped(points)
  slopes = [one.slope for one in draws if one.slope is not None]
  return {
    "optima": [dataclasses.asdict(one) for one in found.optima],
    "slope": found.slope,
    "slope_interval": fit.interval(slopes) if slopes else None,
    "scale": found.scale,
    "parametric": fit.parametric(points),
    "missing": list(found.missing),
  }


def table(points: Sequence[Point]) -> str:
  """Returns the runs as Markdown."""
  lines = [
    "| config | FLOPs | parameters | tokens | bits per character | standard error |",
    "|---|---|---|---|---|---|",
  ]
  lines += [
    f"| {p.config} | {p.budget:g} | {p.parameters:,} | {p.tokens:,} "
    f"| {p.loss:.4f} | {p.error:.4f} |"
    for p in points
  ]
  return "\n".join(lines) + "\n"


def _said(first: str, laws: dict, against: dict) -> str:
  lines = []
  for config, found in laws.items():
    for one in found["optima"]:
      edge = "" if one["inside"] else ", beyond the sizes that were trained"
      lines.append(
        f"- {config}, {one['budget']:g} FLOPs: best at {one['parameters']:,.0f} "
        f"parameters, {one['loss']:.4f} bits per character{edge}"
      )
    if found["slope"] is not None:
      low, high = found["slope_interval"] or (None, None)
      lines.append(
        f"- {config}: loss falls as FLOPs to the power of minus "
        f"{_between(found['slope'], low, high, '.4f')}"
      )
    if found["parametric"] is not None:
      terms = ", ".join(
        f"{name} {_between(one['value'], one['low'], one['high'], '.3g')}"
        for name, one in found["parametric"].items()
      )
      lines.append(f"- {config}: E + A / N^alpha + B / D^beta with {terms}")
    lines += [f"- {config}, not fitted: {what}" for what in found["missing"]]
  for config, one in against.items():
    if one is None:
      lines.append(f"- {config} against {first}: one of them has no frontier")
      continue
    reach = ""
    if one["extrapolated"] > 1:
      reach = f", extrapolated by {one['extrapolated']:.1f} times the budgets"
    lines.append(
      f"- {config} needs {_between(one['times'], one['low'], one['high'], '.2f')} "
      f"times the FLOPs of {first} at {one['loss']:.4f} bits per "
      f"character{reach}"
    )
  return "\n".join(lines) + "\n"


def _between(
  value: float, low: float | None, high: float | None, form: str
) -> str:
  """Returns a figure with its interval, if it has one."""
  if low is None:
    return f"{value:{form}} (no interval: as many parameters as points)"
  return f"{value:{form}} ({low:{form}} to {high:{form}})"


def _curves(points: Sequence[Point]) -> dict[str, list]:
  """Returns the points by configuration and budget, for a plot."""
  found: dict[str, list] = {}
  for p in sorted(points, key=lambda p: (p.config, p.budget, p.parameters)):
    name = f"{p.config}, {p.budget:g} FLOPs"
    found.setdefault(name, []).append((p.parameters, p.loss, p.error))
  return found


def _frontier(groups: dict[str, Sequence[Point]]) -> dict[str, list]:
  """Returns the least losses by budget of each configuration, for a plot."""
  found = {}
  for config, points in groups.items():
    optima, draws = fit.law(points).optima, fit.bootstrapped(points)
    for one in optima:
      same = [
        other.loss
        for drawn in draws
        for other in drawn.optima
        if other.budget == one.budget
      ]
      low, high = fit.interval(same) if same else (one.loss, one.loss)
      found.setdefault(config, []).append((
        one.budget,
        one.loss,
        (high - low) / 4,
      ))
  return found
