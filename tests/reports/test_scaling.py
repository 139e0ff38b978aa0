"""Scaling: laws on points that obey one, and a grid that is trained."""

import dataclasses
import json
import math

import jax
from ml_collections import ConfigDict
import numpy as np
import pytest

from dllm_jax.cli import main
from dllm_jax.reports import scaling
from dllm_jax.reports.scaling import fit, grid
from tests.reports.test_compare import files  # noqa: F401  a fixture

BUDGETS = (1e12, 3e12, 1e13)


def _points(config="one", *, shift=1.0, budgets=BUDGETS, noise=0.0):
  """Points on log L = 1 - 0.05 log(C / shift) + 0.02 (log N - log N*)^2."""
  rng, points = np.random.default_rng(0), []
  for budget in budgets:
    best = 1e4 * (budget / 1e12) ** 0.5
    for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
      n = best * factor
      loss = math.exp(1.0 - 0.05 * math.log(budget / shift))
      loss += 0.02 * math.log(factor) ** 2 + noise * rng.normal()
      points.append(
        fit.Point(
          config=config,
          budget=budget,
          parameters=round(n),
          tokens=round(budget / (6 * n)),
          flops=budget,
          loss=loss,
          error=noise,
        )
      )
  return points


def test_parabolas_and_their_frontier_are_found():
  found = fit.law(_points())
  assert not found.missing and all(o.inside for o in found.optima)
  best = [o.parameters for o in found.optima]
  np.testing.assert_allclose(
    best, [1e4, 1e4 * 3**0.5, 1e4 * 10**0.5], rtol=1e-3
  )
  assert found.slope == pytest.approx(0.05, rel=1e-4)
  assert found.budget(found.loss(2e12)) == pytest.approx(2e12)


def test_the_multiplier_of_two_laws_is_that_of_their_budgets():
  found = fit.multiplier(_points(), _points("two", shift=3.0))
  assert found["times"] == pytest.approx(3.0, rel=1e-3)
  # The better law had this loss at a third of the other's last budget.
  assert found["extrapolated"] == pytest.approx(1.0, rel=1e-4)
  far = fit.multiplier(_points(), _points("two", shift=30.0))
  assert far["times"] == pytest.approx(30.0, rel=1e-3)
  assert far["extrapolated"] == pytest.approx(3.0, rel=1e-3)


def test_the_interval_covers_what_noise_hides():
  noisy = _points(noise=0.002), _points("two", shift=3.0, noise=0.002)
  found = fit.multiplier(*noisy)
  assert found["low"] < 3.0 < found["high"]
  assert 1.05 < found["high"] / found["low"] < 3.0


@pytest.mark.all
def test_the_parametric_law_is_found():
  truth = {"E": 1.7, "A": 400.0, "B": 2000.0, "alpha": 0.34, "beta": 0.4}
  points = []
  for n in (1e4, 3e4, 1e5, 3e5):
    for d in (1e5, 1e6, 1e7):
      loss = truth["E"] + truth["A"] / n ** truth["alpha"]
      loss += truth["B"] / d ** truth["beta"]
      points.append(
        fit.Point(
          config="one",
          budget=6 * n * d,
          parameters=round(n),
          tokens=round(d),
          flops=6 * n * d,
          loss=loss,
          error=0.0,
        )
      )
  found = fit.parametric(points)
  values = {name: one["value"] for name, one in found.items()}
  assert values == pytest.approx(truth, rel=0.02)
  noise = np.random.default_rng(0).normal(0, 0.01, len(points))
  noisy = [
    dataclasses.replace(p, loss=p.loss + e)
    for p, e in zip(points, noise, strict=True)
  ]
  for name, one in fit.parametric(noisy).items():
    assert one["low"] < truth[name] < one["high"], name
    assert one["high"] / one["low"] > 1.001
  assert fit.parametric(points[:5]) is None


def test_what_cannot_be_fitted_is_said():
  few = [p for p in _points() if p.parameters < 1e4]  # two sizes, then more
  found = fit.law(few)
  assert "2 sizes, and a parabola has 3 parameters" in found.missing[0]
  assert fit.multiplier(_points(budgets=(1e12,)), _points()) is None
  # Three exact points a budget lie on their parabola: nothing tells an error.
  three = [
    p
    for p in _points()
    if 0.4e4 < p.parameters / math.sqrt(p.budget / 1e12) < 2.5e4
  ]
  assert fit.bootstrapped(three) == []
  assert fit.multiplier(three, _points())["low"] is None
  assert (
    "a line has 2 parameters" in fit.law(_points(budgets=(1e12,))).missing[0]
  )


@pytest.mark.all
def test_a_grid_spends_its_budgets():
  grid, left_out = scaling.cells(
    ["shakespeare:smoke", "shakespeare_bd3lm:smoke"],
    (1e9, 3e11),
    ("32x1", "64x2"),
    seeds=(0, 1),
    least_steps=20,
  )
  for cell in grid:
    assert cell.steps * cell.flops == pytest.approx(cell.budget, rel=0.03)
    assert cell.resolved.optimizer.warmup_steps <= cell.steps / 10
  with pytest.raises(ValueError, match="no run of the grid"):
    scaling.cells(["shakespeare:smoke"], (1.0,), ("32x1",))
  assert any("64x2 at 1e+09" in line for line in left_out)
  at = {(c.config.split(":")[0], c.size): c for c in grid}
  small, large = at["shakespeare", "32x1"], at["shakespeare", "64x2"]
  assert small.parameters < large.parameters and small.flops < large.flops
  # A row that is doubled costs twice, but for its unembedding.
  doubled = at["shakespeare_bd3lm", "64x2"].flops / large.flops
  assert 1.6 < doubled < 2.2
  assert len({cell.place for cell in grid}) == len(grid)


@pytest.mark.parametrize(
  "line, says",
  [
    (["--flops=1e12,x"], "numbers with commas"),
    ([], "--flops must be given"),
    (["--flops=-1"], "above 0"),
    (["--flops=1e12", "--sizes=33x2"], "multiple of"),
    (["--flops=1e12", "--sizes=wide"], "WIDTHxLAYERS"),
    (["--flops=1e12", "--seeds=1,1"], "given twice"),
  ],
)
def test_a_bad_grid_is_one_line(line, says, capsys):
  assert main.main(["scaling", "--configs=shakespeare:smoke", *line]) == 2
  assert says in capsys.readouterr().err


def test_what_a_grid_takes_is_told_by_its_ends(monkeypatch):
  """The rate of a size between lies between, in the logarithm of its FLOPs."""
  cell = lambda config, size, flops, steps: grid.Cell(
    config=config,
    size=size,
    budget=float(flops * steps),
    seed=0,
    resolved=ConfigDict({"training": {"steps": steps}}),
    parameters=1,
    flops=flops,
  )
  # Rates 1e5 and 4e5 FLOPs a second, and 2e5 halfway.
  known = {"small": (10.0, 3.0, 7), "large": (250.0, 5.0, 9)}
  known |= {"alone": (2.0, 1.0, 8)}
  asked = []

  def timed(resolved, name, devices):
    size = name.split("/")[1].split("-")[0]
    asked.append(size)
    names = "seconds", "compile_seconds", "peak_bytes"
    return dict(zip(names, known[size], strict=True))

  monkeypatch.setattr(grid.timing, "timed", timed)
  found = grid.estimate([
    cell("one", "middle", 10**7, 6),
    cell("one", "small", 10**6, 100),
    cell("one", "small", 10**6, 10),
    cell("one", "large", 10**8, 2),
    cell("two", "alone", 10**6, 5),
  ])
  seconds = 6 * 50.0 + 110 * 10.0 + 2 * 250.0 + 5 * 2.0
  compiling = 4 * (3.0 + 5.0) / 2 + 1.0
  assert found["seconds"] == pytest.approx(seconds + compiling)
  assert found["peak_bytes"] == 9
  assert set(asked) == known.keys()


@pytest.mark.all
def test_a_grid_is_trained_and_goes_on(files, tmp_path):  # noqa: F811
  place, alone = tmp_path / "a grid", {"devices": jax.devices()[:1]}
  grid, _ = scaling.cells(
    [files("one")], (2e8,), ("16x1", "32x1", "32x2"), least_steps=2, **alone
  )
  cost = scaling.estimate(grid, **alone)
  assert cost["seconds"] > 0 and cost["peak_bytes"] > 0
  points, interrupted = scaling.train(grid, place, **alone)
  assert not interrupted and not scaling.missing(grid, place)
  result = scaling.write(points, place)
  assert "| one | 2e+08 |" in (place / "scaling.md").read_text()
  saved = json.loads((place / "scaling.json").read_text())
  assert saved["points"] == result["points"]
  assert (place / "isoflop.svg").exists()
  assert "a line has 2 parameters" in (place / "scaling.md").read_text()
  again, _ = scaling.train(grid, place, **alone)  # nothing is left
  assert again == points


def test_a_file_holds_a_grid(tmp_path, capsys):
  file = tmp_path / "mine.py"
  text = """from ml_collections import ConfigDict
def get_config():
  return ConfigDict({"base": "shakespeare", "grid": GRID})
"""
  file.write_text(text.replace("GRID", '{"flops": [1e9], "sizes": ["wide"]}'))
  line = ["scaling", f"--grid={file}"]
  assert main.main(line) == 2
  assert "--configs must be given" in capsys.readouterr().err
  line.append("--configs=shakespeare:smoke")
  assert main.main(line) == 2
  assert "not 'wide'" in capsys.readouterr().err
  assert main.main([*line, "--sizes=33x2"]) == 2
  assert "multiple of" in capsys.readouterr().err
  file.write_text(text.replace("GRID", '{"seed": [1]}'))
  assert main.main(line) == 2
  assert "grid.seed, which is unknown" in capsys.readouterr().err
  assert main.main(["scaling", "--grid=shakespeare"]) == 2
  assert "states no grid" in capsys.readouterr().err


@pytest.mark.all
def test_a_grid_that_takes_too_long_says_so(capsys):
  line = ["scaling", "--configs=shakespeare:smoke", "--flops=1e15"]
  line += ["--sizes=32x1", "--max_hours=1e-6", "--config.mesh.data=8"]
  assert main.main(line) == 2
  assert "more than --max_hours" in capsys.readouterr().err
