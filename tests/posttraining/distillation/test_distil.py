"""`dllm distil`, from a teacher to a student that goes on where it was cut off."""

import json

import jax
import numpy as np
import pytest

from dllm_jax.cli.main import main
from dllm_jax.core.paths import Path
from dllm_jax.evaluation.benchmarks import instructions
from dllm_jax.posttraining.distillation import answers, DCD, distil, rounds
from dllm_jax.posttraining.distillation.student import ended
from tests import runs

pytestmark = pytest.mark.all

_TINY = {
  "data__length": 24,
  "evaluation__batches": 1,
  "training__ema_decay": 0.5,
  "sampler__preset": "llada",
}


def _write(folder, name, number, **options):
  asked = instructions.questions(("copy",), number, seed=1, **options)
  instructions.write(asked, Path(folder / name))
  return str(folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("distil")


@pytest.fixture(scope="module")
def teacher(folder):
  tokenizer = instructions.write_tokenizer(Path(folder / "letters"))
  run = runs.run(
    folder / "teacher",
    data__path=_write(folder, "chats.jsonl", 40),
    data__held_out_path=_write(folder, "held_out.jsonl", 8, held_out=True),
    data__tokenizer=tokenizer,
    data__mask_token="<|mask|>",
    # Of an untrained network no answer ends: it is asked with one token only.
    **_TINY,
  )
  run.train()
  return run


def _distil(teacher, output, *flags, method="dparallel"):
  return main([
    "distil",
    f"--workdir={teacher.workdir}",
    f"--output={output}",
    f"--method={method}",
    "--sampler.steps=3",
    "--config.mesh.data=-1",
    "--config.training.steps=4",
    "--config.checkpoint.every_steps=2",
    *flags,
  ])


def _last(capsys):
  return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def _params(run):
  return runs.parameters(run.load())


@pytest.mark.parametrize(
  ("method", "flag"),
  [("dparallel", "--dparallel.block_size=4"), ("d3llm", "--d3llm.passes=2")],
)
def test_a_student_goes_on_where_it_was_cut_off(
  teacher, folder, capsys, method, flag
):
  output = folder / method
  assert not _distil(teacher, output, flag, method=method)
  found = _last(capsys)
  assert found["step"] == 4
  assert 0 < found["answers"] <= 40
  assert 0 <= found["eval_exact_match"] <= 1 <= found["eval_calls"]
  assert set(found["before"]) == {"exact_match", "calls", "tokens_per_call"}
  lines = (output / "answers.jsonl").read_text().splitlines()
  assert len(lines) == 41
  whole = runs.Run.open(output, devices=jax.devices()[:1])
  before = _params(whole)
  moved = zip(before, _params(teacher), strict=True)
  assert any((a != b).any() for a, b in moved)
  # What is gone is asked for again, and the rest is not.
  (output / "answers.jsonl").write_text("\n".join(lines[:30]) + '\n{"tok')
  for step in (output / "checkpoints").iterdir():
    if step.name == "4":
      for file in sorted(step.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
      step.rmdir()
  assert not _distil(teacher, output, flag, method=method)
  assert (output / "answers.jsonl").read_text().splitlines() == lines
  again = runs.Run.open(output, devices=jax.devices()[:1])
  for a, b in zip(_params(again), before, strict=True):
    np.testing.assert_array_equal(a, b)


def test_what_does_not_fit_is_one_line(teacher, folder, capsys):
  other = folder / "dparallel"
  assert not _distil(teacher, other, "--dparallel.block_size=4")
  capsys.readouterr()
  for flags, words in (
    (["--dparallel.block_size=5"], "was begun otherwise (block_size: 4 -> 5"),
    (["--seed=3"], "asked for otherwise (seed: 0 -> 3)"),
    (["--method=dcd"], "--dparallel.block_size=4 means nothing to"),
    (["--dcd.steps=5"], "means nothing to --method=dparallel"),
    (["--method=best"], "dcd"),
    (["--config.data.path=shakespeare"], "holds no conversations"),
  ):
    assert _distil(teacher, other, "--dparallel.block_size=4", *flags) == 2
    assert words in capsys.readouterr().err
  output = folder / "refused"
  for flags, words in (
    (["--config.data.length=8"], "longer than data.length 8"),
    (
      ["--dparallel.normalisation=masked", "--config.training.microbatches=2"],
      "training.microbatches 2",
    ),
  ):
    assert _distil(teacher, output, *flags) == 2
    assert words in capsys.readouterr().err
  assert not output.exists()


def test_answers_without_an_end_are_left_out(capsys):
  made = [answers.Answer([1], 0, [0], 1, i > 2) for i in range(5)]
  assert len(ended(made)) == 2
  assert "2 of 5" in capsys.readouterr().out
  with pytest.raises(ValueError, match="none of the teacher's 3 answers ends"):
    ended(made[:3])


def test_rounds_have_the_teachers_of_their_starts(folder):
  source = runs.run(folder / "uniform", objective__name="udlm")
  source.train()
  method = DCD(steps=4, round_steps=2)

  def student(name, steps):
    resolved = runs.tiny(
      objective__name="udlm",
      training__steps=steps,
      training__ema_decay=0.5,
      training__batch_size=8,
    )
    distil(source, folder / name, resolved, method)
    run = runs.Run.open(folder / name, devices=jax.devices()[:1])
    return run, _params(run)

  _, whole = student("whole", 5)
  run, third = student("cut", 3)
  assert sorted(p.name for p in (run.workdir / "teacher").iterdir()) == [
    "0",
    "2",
  ]
  with jax.set_mesh(run.mesh):
    blank = run._blank()
    program = rounds.compiled(run, method, blank)[1]
    first = program._read(0)
    begun = source.load().eval_params["model"]
    for a, b in zip(*map(jax.tree.leaves, (first, begun)), strict=True):
      np.testing.assert_array_equal(a, b)
    second = program._read(2)
  moved = zip(*map(jax.tree.leaves, (second, third)), strict=True)
  assert any((a != b).any() for a, b in moved)
  _, again = student("cut", 5)
  for a, b in zip(again, whole, strict=True):
    np.testing.assert_array_equal(a, b)
