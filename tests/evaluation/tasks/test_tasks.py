"""Tasks on tiny runs: reversal, planning, pareto, and the page that compares."""

from html.parser import HTMLParser
import json
import pathlib
import shutil
from xml.etree import ElementTree

import jax
import pytest

from dllm_jax.evaluation.benchmarks import finetune
from dllm_jax.evaluation.samples import traffic
from dllm_jax.evaluation.tasks import registry
from dllm_jax.reports import report
from dllm_jax.run.run import Run


@pytest.fixture(scope="module")
def pair(workdir, judge, tmp_path_factory):
  """Returns the directories of a masked and of an autoregressive run."""
  folder = tmp_path_factory.mktemp("pair")
  shutil.copytree(workdir, folder / "mdlm")
  shutil.copytree(judge, folder / "autoregressive")
  return folder


def run_task(name: str, workdir, opens: bool = False, **options):
  task = registry.task(name)
  run = Run.open(workdir) if opens else None
  setting = registry.Setting(workdir=workdir, run=run)
  figures = task.run(setting, task.options(**options))
  assert json.loads(json.dumps(figures)) and task.text(figures)
  return figures


@pytest.mark.all
def test_reversal_of_given_runs(pair, tmp_path):
  facts = tmp_path / "a.tsv"
  facts.write_text("to be\tor not\nthe night\tis old\n")
  options = {
    "facts": str(facts),
    "diffusion": str(pair / "mdlm"),
    "autoregressive": str(pair / "autoregressive"),
    "at_once": 4,
  }
  figures = run_task("reversal", tmp_path, **options)
  found = {(r["model"], r["form"], r["direction"]) for r in figures["rows"]}
  both = [("infill", d) for d in ("forward", "reverse")]
  both += [("prompt", d) for d in ("forward", "reverse")]
  assert found == {("diffusion", *x) for x in both} | {
    ("autoregressive", *x) for x in both[2:]
  }
  assert all(r["facts"] == 2 and "interval_95" in r for r in figures["rows"])
  ElementTree.parse(tmp_path / "reversal.svg")
  again = run_task("reversal", tmp_path, **options)  # asks nothing again
  assert again["rows"] == figures["rows"]
  wrong = options | {"diffusion": options["autoregressive"]}
  with pytest.raises(ValueError, match="holds a run of autoregressive"):
    run_task("reversal", tmp_path / "b", **wrong)


@pytest.mark.all
def test_planning_of_a_given_run_resumes(pair, tmp_path, monkeypatch):
  path = tmp_path / "human.jsonl"
  row = {
    "task_id": "T/0",
    "prompt": "let f ",
    "entry_point": "f",
    "test": "def check(f): assert f == 0",
  }
  path.write_text((json.dumps(row) + "\n") * 2)
  options = {"form": "humaneval", "at_once": 1, "new_tokens": 4}
  asked, fill = [], finetune.fill

  def stopped(*args, **kwargs):
    asked.append(args)
    if len(asked) == 2:
      raise KeyboardInterrupt
    return fill(*args, **kwargs)

  monkeypatch.setattr(finetune, "fill", stopped)
  ask = lambda: run_task(
    "planning", pair / "mdlm", problems=str(path), **options
  )
  with pytest.raises(KeyboardInterrupt):
    ask()
  figures = ask()  # asks the one that is missing
  assert len(asked) == 3 and ask() == figures
  assert (figures["accuracy"], figures["problems"]) == (0.0, 2)
  assert figures["protocol"]["isolation"] in ("namespaces", "limits")
  assert sum(figures["reasons"].values()) == 2
  with pytest.raises(FileNotFoundError, match="sudoku4"):
    run_task("planning", tmp_path, problems="chess")
  with pytest.raises(FileNotFoundError, match="no run in"):
    run_task("planning", tmp_path, problems=str(path), form="humaneval")


@pytest.mark.all
def test_pareto_resumes(pair):
  options = {
    "autoregressive": str(pair / "autoregressive"),
    "judge": str(pair / "autoregressive"),
    "policies": "mdlm",
    "steps": "2,4",
    "threshold_policies": "llada,fast_dllm",
    "thresholds": "0.5",
    "length": 64,
    "samples": 2,
    "rounds": 2,
    "networks": "llada_1b",
    "context": 64,
    "block": 8,
  }
  figures = run_task("pareto", pair / "mdlm", **options)
  rows = {row["point"]: row for row in figures["rows"]}
  two, four = (rows[f"mdlm, {n} steps"] for n in (2, 4))
  # A step that reveals nothing needs no call where the time is not read.
  assert 1 <= two["function_evaluations"] <= 2
  assert two["function_evaluations"] < four["function_evaluations"] <= 4
  baseline = rows["autoregressive, cached"]
  assert baseline["tokens"] == 2 * 64 and baseline["tokens_per_call"] == 1.0
  assert two["tokens_per_call"] == 64 / two["function_evaluations"]
  for row in rows.values():
    assert row["tokens_per_second"] > 0 and row["standard_error"] >= 0
    assert row["entropy"] >= 0 and row["flops_per_byte"] > 0
  cost = [x["flops_per_token"] / x["function_evaluations"] for x in (two, four)]
  assert cost[0] == cost[1]
  # Blocks of 32 against a cache: a call after the first of a block costs less.
  whole, blocks = (rows[f"{n}, threshold 0.5"] for n in ("llada", "fast_dllm"))
  each = [
    x["flops_per_token"] / x["function_evaluations"] for x in (whole, blocks)
  ]
  assert each[1] < each[0] == cost[0]
  assert any(row["pareto"] for row in rows.values())
  assert {level["chip"] for level in figures["levels"]} == {"h100", "v5p"}
  assert "faster up to" in pathlib.Path(figures["table"]).read_text()
  ElementTree.parse(figures["decoders"])
  assert (
    run_task("pareto", pair / "mdlm", **options)["rows"] == (figures["rows"])
  )
  wrong = options | {"autoregressive": str(pair / "mdlm")}
  with pytest.raises(ValueError, match="holds a run of mdlm"):
    run_task("pareto", pair / "mdlm", **wrong)
  many = options | {"steps": "65"}
  with pytest.raises(ValueError, match="65 is more than the 64 slots"):
    run_task("pareto", pair / "mdlm", **many)
  with pytest.raises(ValueError, match="unknown chip 'x1'"):
    run_task("pareto", pair / "mdlm", **options | {"chips": "x1"})
  with pytest.raises(ValueError, match="--steps must be of type int"):
    registry.task("pareto").options(**options | {"steps": "2,x"})


@pytest.mark.all
def test_pareto_trains_what_it_is_not_given(tmp_path, capsys):
  options = {
    "recipe": "shakespeare:smoke",
    "policies": "mdlm",
    "steps": "2",
    "threshold_policies": "",
    "samples": 2,
    "rounds": 2,
    "networks": "llada_1b",
  }
  place = tmp_path / "a place"
  figures = run_task("pareto", place, **options)
  told = capsys.readouterr().out
  assert "training takes about 0 minutes here" in told
  assert told.index("training takes") < told.index("diffusion: mdlm")
  assert "sampling takes at most" in told
  protocol = figures["protocol"]
  assert not protocol["judge_is_baseline"]
  steps = [protocol[k] for k in ("step", "baseline_step", "judge_step")]
  assert steps == [80, 20, 40]
  seeds = [
    Run.open(place / name).config.training.seed
    for name in ("diffusion", "autoregressive", "judge")
  ]
  assert seeds == [0, 0, 1]
  again = run_task("pareto", place, **options)  # trains and samples nothing
  assert again["rows"] == figures["rows"]
  assert "takes" not in capsys.readouterr().out


@pytest.mark.all
def test_traffic_is_what_shapes_say(pair):
  run = Run.open(pair / "autoregressive")
  params = dict(run.state.params["model"])
  params.pop("embed")  # whose rows are looked up
  weights = sum(x.nbytes for x in jax.tree.leaves(params))
  one = traffic.call(run, rows=3, slots=1, cached=17)
  cache = run.denoiser.cache(3, 17)
  held = cache.key.nbytes + cache.value.nbytes
  assert one.bytes == pytest.approx(weights + held * (1 + 1 / 17))
  whole = traffic.call(run, rows=3, slots=17)
  assert whole.bytes == weights
  assert whole.flops > 10 * one.flops


class Page(HTMLParser):
  """Counts tags, and what would be fetched."""

  def __init__(self, text: str):
    super().__init__()
    self.tags, self.fetched = {}, []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags[tag] = self.tags.get(tag, 0) + 1
    self.fetched += [v for k, v in attrs if k in ("src", "href")]


@pytest.mark.all
def test_report(pair, tmp_path):
  workdirs = [str(pair / "mdlm"), str(pair / "autoregressive")]
  content = report.Content(batches=1, num_samples=1, rounds=2)
  result = report.report(workdirs, tmp_path / "a.html", content)
  text = (tmp_path / "a.html").read_text()
  page = Page(text)
  assert not page.fetched and page.tags["svg"] == 4
  assert page.tags["tr"] == 3 and page.tags["pre"] >= 4
  assert [row["run"] for row in result["rows"]] == ["mdlm", "autoregressive"]
  assert result["rows"][0]["likelihood"]["bits_per_char_error"] >= 0
  again = report.report(workdirs, tmp_path / "b.html", content)
  assert again["rows"] == result["rows"]  # nothing is measured twice
  with pytest.raises(ValueError, match="twice"):
    report.labels([workdirs[0]] * 2)
  with pytest.raises(FileNotFoundError, match="no run in"):
    report.report([str(tmp_path / "nothing")], tmp_path / "c.html")


def test_refusals():
  options = registry.task("planning").options
  with pytest.raises(ValueError, match="legal"):
    options(form="exam")
  with pytest.raises(ValueError, match="--count"):
    options(count=-1)
  with pytest.raises(ValueError, match="--block"):
    registry.task("pareto").options(block=0)
  with pytest.raises(ValueError, match="--people"):
    registry.task("reversal").options(people=0)
