"""The loop: what it keeps, that a kill changes nothing, and what it refuses."""

import html
import json
import signal
import time

import numpy as np
import pytest

from dllm_jax.cli.main import main
from dllm_jax.objectives.dream import Dream
from dllm_jax.posttraining.reinforcement import record
from dllm_jax.posttraining.reinforcement.iterations import Iterations
from dllm_jax.posttraining.reinforcement.methods import (
  CoupledGRPO,
  DiffuGRPO,
  ESPO,
  SPG,
  TraceRL,
  WD1,
)
from dllm_jax.reports import report
from dllm_jax.training.checkpoint import steps_in
from tests import quick, runs
from tests.posttraining.reinforcement import tiny


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
  folder = tmp_path_factory.mktemp("reinforce")
  return *tiny.source(folder), folder


@pytest.fixture(scope="module")
def whole(begun):
  source, text, folder = begun
  learning = tiny.reinforcement(source, text, folder / "whole")
  return learning, learning.train()


def _parameters(workdir):
  return runs.parameters(tiny.opened(workdir).state)


def test_what_is_kept(whole):
  learning, summary = whole
  assert summary["step"] == 6 and not summary["interrupted"]
  assert 0 <= summary["eval_reward"] <= 1
  lines = record.lines(learning.run.workdir, 0)
  assert len(lines) == 8
  groups = np.reshape([line["advantage"] for line in lines], (2, 4))
  np.testing.assert_allclose(groups.sum(axis=1), 0.0, atol=1e-5)
  for line in lines:
    assert line["rewards"] == {"sudoku_cells": pytest.approx(line["reward"])}
    assert len(line["tokens"]) == len(line["revealed_at"])
    assert line["calls"] == 2
  metrics = [
    json.loads(line)
    for line in (learning.run.workdir / "metrics.jsonl")
    .read_text()
    .splitlines()
  ]
  made = [m for m in metrics if "reward" in m]
  assert [m["iteration"] for m in made] == [0, 1]
  want = np.mean([line["reward"] for line in lines])
  assert made[0]["reward"] == pytest.approx(want)
  assert {"entropy", "calls_per_token", "answer_tokens", "failures",
          "skipped_groups", "reward_sudoku_cells"} <= made[0].keys()  # fmt: skip
  steps = [m for m in metrics if "kl" in m]
  assert {"clip_fraction", "loss_nats_per_token"} <= steps[0].keys()
  # Before the first update policy, old policy and reference are one.
  assert abs(steps[0]["kl"]) < 1e-6 < max(abs(step["kl"]) for step in steps)


@pytest.mark.all
def test_a_report_shows_what_was_earned_and_said(whole, tmp_path):
  learning, _ = whole
  page = tmp_path / "report.html"
  told = report.Content(batches=1, num_samples=2, rounds=2)
  (row,) = report.report([learning.run.workdir], page, told)["rows"]
  said = record.newest(learning.run.workdir, 2)
  assert row["samples"]["texts"] == said
  text = html.unescape(page.read_text(encoding="utf-8"))
  assert all(rollout in text for rollout in said)
  (figures,) = [report.figures(learning.run, told)]
  curves = figures["curves"]
  assert {"reward", "kl", "entropy", "clip_fraction"} <= curves.keys()
  assert all(curves[name] for name in ("reward", "kl", "entropy"))


@pytest.mark.all
def test_killed_in_the_middle_of_an_iteration(begun, whole, monkeypatch):
  source, text, folder = begun
  output = folder / "killed"
  each, done = Iterations.__next__, []

  def killed(self):
    done.append(None)
    if len(done) == 5:  # batch 5 is read while step 4 runs
      raise MemoryError("killed")
    return each(self)

  with monkeypatch.context() as patched:
    patched.setattr(Iterations, "__next__", killed)
    with pytest.raises(MemoryError):
      tiny.reinforcement(source, text, output).train()
  assert steps_in(output)[-1] == 3  # in the first iteration's second pass
  before = record.lines(output, 0)
  tiny.reinforcement(source, text, output).train()
  assert record.lines(output, 0) == before
  same = whole[0].run.workdir
  assert record.lines(output, 1) == record.lines(same, 1)
  for a, b in zip(_parameters(output), _parameters(same), strict=True):
    np.testing.assert_array_equal(a, b)


METHODS = (
  DiffuGRPO(group=4, iterations=2),
  CoupledGRPO(group=4, iterations=1),
  SPG(group=4, iterations=1, block_length=4),
  WD1(group=4, iterations=1),
  TraceRL(group=4, keep_low=0.0, keep_high=1.0, shrink=1),
  TraceRL(group=4, keep_low=0.0, keep_high=1.0, value=True, average="length"),
)


@pytest.mark.all
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_every_method_trains(begun, method, tmp_path):
  source, text, _ = begun
  learning = tiny.reinforcement(source, text, tmp_path / "run", method=method)
  summary = learning.train()
  assert summary["step"] == 6
  assert np.isfinite(summary["loss_nats_per_token"])


@pytest.mark.all
def test_adapters_have_their_base_as_reference(begun, tmp_path):
  source, text, _ = begun
  learning = tiny.reinforcement(
    source, text, tmp_path / "run", model__adapter={"name": "lora", "rank": 2}
  )
  learning.train()
  metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  found = [m["kl"] for m in map(json.loads, metrics) if "kl" in m]
  assert abs(found[0]) < 1e-6 < abs(found[-1])


@pytest.mark.all
def test_a_mesh_changes_nothing(begun, whole, tmp_path):
  source, text, _ = begun
  source = tiny.opened(source.workdir, {"data": 2, "fsdp": 2}, 4)
  learning = tiny.reinforcement(
    source, text, tmp_path / "run", mesh__data=2, mesh__fsdp=2
  )
  learning.train()
  ours = record.lines(tmp_path / "run", 0)
  for a, b in zip(ours, record.lines(whole[0].run.workdir, 0), strict=True):
    assert a["tokens"] == b["tokens"]
  for a, b in zip(
    _parameters(tmp_path / "run"),
    _parameters(whole[0].run.workdir),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.all
def test_equal_rewards_are_skipped_and_counted(begun, tmp_path, monkeypatch):
  source, text, _ = begun
  learning = tiny.reinforcement(
    source, text, tmp_path / "run", loop=tiny.told(rewards="regex[^z]=1"),
    training__steps=1,
  )  # fmt: skip
  learning.train()
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  lines = list(map(json.loads, lines))
  assert next(m for m in lines if "reward" in m)["skipped_groups"] == 1.0
  assert next(m for m in lines if "kl" in m)["gradient_norm"] == 0.0


@pytest.mark.parametrize(
  ("loop", "method", "more", "message"),
  [
    ({"rewards": "wrong=1"}, None, {}, "there is no reward 'wrong'"),
    ({"rewards": "countdown=1"}, None, {}, "reads numbers and target of a row"),
    ({"problems": "nowhere"}, None, {}, "no problems 'nowhere'"),
    ({"held_out": 2000, "problems": "FILE"}, None, {}, "leaves none"),
    ({"new_tokens": 30}, None, {}, "tokens and the canvas room for 6"),
    ({}, None, {"data__length": 16}, "leaves no room for an answer"),
    ({}, None, {"sampler__temperature": 0.0}, "are the same, and teach"),
    ({"prompts": 3}, ESPO(group=3), {}, "must divide the 9 of an iteration"),
    ({"end": "12"}, None, {}, "name a text that is one"),
    ({"rewards": "judge=1"}, None, {}, "the reward judge needs a model"),
    ({"rewards": "judge[no/where]=1"}, None, {}, "no judge at no/where"),
    (
      {},
      TraceRL(group=4, value=True),
      {"model__adapter": {"name": "lora", "rank": 2}},
      "a value model is a whole network",
    ),
  ],
)
def test_bad_input(begun, tmp_path, loop, method, more, message):
  source, text, _ = begun
  if loop.get("problems") == "FILE":
    path = tmp_path / "asked.jsonl"
    path.write_text('{"prompt": "1"}\n')
    loop = loop | {"problems": str(path)}
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    tiny.reinforcement(
      source, text, tmp_path / "run", method=method, loop=tiny.told(**loop),
      **more,
    )  # fmt: skip
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", [DiffuGRPO(), WD1(), SPG()])
def test_masked_prompts_need_no_shift(method):
  with pytest.raises(ValueError, match="needs a network without shift"):
    method.check(Dream(vocab_size=5, mask_id=4))
  CoupledGRPO().check(Dream(vocab_size=5, mask_id=4))


def _command(source, output, *more):
  return [
    "reinforce", f"--workdir={source}", f"--output={output}", "--method=espo",
    "--config.training.steps=24", "--config.training.batch_size=4",
    "--config.checkpoint.every_steps=3", "--config.logging.every_steps=1",
    "--config.mesh.data=-1", "--config.sampler.temperature=1", "--config.sampler.steps=2",
    "--reinforce.problems=sudoku4", "--reinforce.count=8",
    "--reinforce.held_out=4", "--reinforce.rewards=sudoku_cells=1",
    "--reinforce.prompts=2", "--espo.group=4", *more,
  ]  # fmt: skip


@pytest.mark.all
def test_killed_three_times(begun, tmp_path):
  source = begun[0].workdir

  def finish(output):
    process = runs.dllm(*_command(source, output))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])

  assert finish(tmp_path / "whole")["step"] == 24
  killed = tmp_path / "killed"
  for step in (5, 10, 18):
    process = runs.dllm(*_command(source, killed))
    while process.poll() is None and _step(killed) < step:
      time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
  assert finish(killed)["step"] == 24
  for a, b in zip(
    _parameters(killed), _parameters(tmp_path / "whole"), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def _step(workdir) -> int:
  path = workdir / "metrics.jsonl"
  lines = path.read_text().split("\n")[:-1] if path.exists() else []
  return json.loads(lines[-1])["step"] if lines else 0


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--reinforce.rewards=wrong=1"], "dllm: there is no reward 'wrong'"),
    (["--wd1.group=3"], "--wd1.group=3 means nothing to --method=espo"),
    quick.long(["--espo.grup=3"], "unknown field espo.grup"),
  ],
)
def test_the_command_says_so_in_a_line(begun, tmp_path, flags, message, capsys):
  assert main(_command(begun[0].workdir, tmp_path / "run", *flags)) == 2
  said = capsys.readouterr().err
  assert said.count("\n") == 1
  assert message in said
