"""Comparing configurations: the same data, a budget, a table and a plot."""

import json
from xml.etree import ElementTree

import jax
import pytest

from dllm_jax.cli import command, main
from dllm_jax.config.files import bundled
from dllm_jax.reports import compare
from tests import runs

BASE = """
from ml_collections import ConfigDict


def get_config():
  return ConfigDict({given!r})
"""


@pytest.fixture
def files(tmp_path):
  """Returns a function that writes a tiny config and returns its path."""
  resolved = runs.tiny()
  base = {k: v for k, v in resolved.to_dict().items() if k != "objective"}

  def write(name, **sections):
    given = base | sections
    path = tmp_path / f"{name}.py"
    path.write_text(BASE.format(given=given))
    return str(path)

  return write


@pytest.mark.all
def test_compares_and_continues(files, tmp_path, capsys):
  names = [files("one"), files("two", objective={"name": "autoregressive"})]
  output, devices = tmp_path / "out", jax.devices()[:1]

  seeds, alone = (0, 3), {"devices": devices}
  prepared = compare.prepare(names, budget_tokens=1000, points=2)
  run = lambda: compare.compare(prepared, output, seeds=seeds, **alone)
  assert compare.left(prepared, output, seeds=seeds) == 4
  assert compare.estimate(prepared, output, seeds=seeds, **alone) > 0
  result = run()
  assert compare.left(prepared, output, seeds=seeds) == 0
  assert compare.estimate(prepared, output, seeds=seeds) == 0
  rows = result["rows"]
  assert {row["config"] for row in rows} == {"one", "two"}
  assert rows == sorted(rows, key=lambda row: row["bits_per_char"])
  for row in rows:
    assert row["step"] == 4 and row["tokens"] == 4 * 8 * 32  # up to a batch
    assert [tokens for tokens, _, _ in row["curve"]] == [512, 1024]
    assert row["standard_error"] >= 0 and row["seeds"].keys() == {"0", "3"}
    assert len(set(row["seeds"].values())) == 2
    assert all(
      (output / place / "config.json").exists() for place in row["places"]
    )
  assert "behind" in rows[1] and rows[0]["epoch"] > 0
  saved = json.loads((output / "comparison.json").read_text())
  assert saved["rows"] == json.loads(json.dumps(rows))
  assert "| one | mdlm |" in (output / "comparison.md").read_text()
  ElementTree.parse(output / "comparison.svg")
  again = run()  # nothing is left to train or to evaluate
  assert again["rows"] == json.loads(json.dumps(rows))


def row(config, seed, bits, curve=()):
  return {
    "config": config,
    "place": f"{config}/seed{seed}",
    "seed": seed,
    "bits_per_char": bits,
    "bits_per_token": 2 * bits,
    "standard_error": 0.01,
    "objective": "mdlm",
    "parameters": 7,
    "epoch": 100,
    "tokens": 200,
    "curve": list(curve),
  }


def test_seeds_are_averaged_and_paired():
  """Means and intervals by hand: t is 4.3027 of 2 degrees of freedom."""
  one = compare.merged([
    row("one", seed, bits, [(100, bits - 0.5, 0.01), (200, bits, 0.01)])
    for seed, bits in ((0, 2.0), (1, 3.0), (2, 4.0))
  ])
  assert one["bits_per_char"] == 3.0 and one["bits_per_token"] == 6.0
  assert one["standard_error"] == pytest.approx(3**-0.5)
  half = 4.302653 * 3**-0.5
  assert one["interval"] == pytest.approx([3 - half, 3 + half])
  assert one["curve"][0] == pytest.approx((100, 2.5, 3**-0.5))
  # Seeds differ by far more than the two configurations do.
  two = compare.merged([
    row("two", seed, bits) for seed, bits in ((2, 4.2), (0, 2.1), (1, 3.3))
  ])
  first, second = compare.ranked([two, one])
  assert (first["config"], second["config"]) == ("one", "two")
  assert second["behind"] == pytest.approx([0.2, 4.302653 * 0.1 * 3**-0.5])
  assert "behind" not in first
  said = compare.table([first, second])
  assert "| 3.2000 | 0.5828 to 5.8172 | 0.2000 ± 0.2484 |" in said
  assert "2.5000, 1 |" in said and "over 3 seeds, which are paired" in said


def test_one_seed_has_the_evaluations_error_alone():
  (alone,) = compare.ranked([compare.merged([row("one", 0, 2.0)])])
  assert alone["interval"] == pytest.approx([2 - 0.0196, 2 + 0.0196])
  other = compare.merged([row("two", 1, 2.5)])
  assert "behind" not in compare.ranked([alone, other])[1]  # another seed
  assert "ran with one seed" in compare.table([alone])


def test_a_field_of_each_may_be_another(capsys):
  line = [
    "compare",
    "--configs=shakespeare:smoke,shakespeare_md4:smoke",
    "--points=0",
  ]
  assert main.main([*line, "--config.optimizer.nam=lion"]) == 2
  assert "optimizer" in capsys.readouterr().err
  line += ["--budget_tokens=5120"]
  for seeds, says in (("1,x", "numbers with commas"), ("1,1", "once")):
    assert main.main([*line[:2], line[3], f"--seeds={seeds}"]) == 2
    assert says in capsys.readouterr().err
  change = ["--config.optimizer.name=lion", "--config.training.seed=3"]
  prepared = compare.prepare(
    ["shakespeare:smoke", "shakespeare_md4:smoke"],
    5120,
    1,
    change=lambda fields: command.overridden(fields, change)[0],
  )
  for resolved in prepared.values():
    assert (resolved.optimizer.name, resolved.training.seed) == ("lion", 3)


@pytest.mark.parametrize(
  ("sections", "message"),
  [
    ({"data": {"path": "shakespeare", "length": 16}}, "config.data"),
    ({"training": {"seed": 1, "batch_size": 8}}, "config.training.seed"),
  ],
)
def test_refuses_other_data(files, sections, message):
  names = [files("one"), files("two", **sections)]
  with pytest.raises(ValueError, match=message):
    compare.prepare(names, budget_tokens=1000, points=2)


def test_refusals(files):
  one = files("one")
  with pytest.raises(ValueError, match="twice"):
    compare.prepare([one, one], budget_tokens=1000, points=2)
  with pytest.raises(ValueError, match="less than one batch"):
    compare.prepare([one], budget_tokens=10, points=2)


def test_twins_read_the_same_data():
  twins = [n for n in bundled() if n.startswith("shakespeare_")]
  twins = ["shakespeare", *(n for n in twins if n != "shakespeare_gpu")]
  prepared = compare.prepare(twins, budget_tokens=4096, points=1)
  sizes = ("width", "layers", "heads")
  assert len({tuple(r.model[k] for k in sizes) for r in prepared.values()}) == 1
  assert len({r.optimizer.to_json() for r in prepared.values()}) == 1
