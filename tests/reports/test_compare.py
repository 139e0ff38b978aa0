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

  def run():
    prepared = compare.prepare(names, budget_tokens=1000, points=2)
    return compare.compare(prepared, output, devices=devices)

  result = run()
  rows = result["rows"]
  assert {row["config"] for row in rows} == {"one", "two"}
  assert rows == sorted(rows, key=lambda row: row["bits_per_char"])
  for row in rows:
    assert row["step"] == 4 and row["tokens"] == 4 * 8 * 32  # up to a batch
    assert [tokens for tokens, _, _ in row["curve"]] == [512, 1024]
    assert row["standard_error"] >= 0
  saved = json.loads((output / "comparison.json").read_text())
  assert saved["rows"] == json.loads(json.dumps(rows))
  assert "| one | mdlm |" in (output / "comparison.md").read_text()
  ElementTree.parse(output / "comparison.svg")
  again = run()  # nothing is left to train or to evaluate
  assert again["rows"] == json.loads(json.dumps(rows))


def test_a_field_of_each_may_be_another(capsys):
  line = [
    "compare",
    "--configs=shakespeare:smoke,shakespeare_md4:smoke",
    "--points=0",
  ]
  assert main.main([*line, "--config.optimizer.nam=lion"]) == 2
  assert "optimizer" in capsys.readouterr().err
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
