"""`dllm align`: what it learns, resumes, keeps and refuses."""

import json

import jax
import numpy as np
import pytest

from dllm_jax.cli.main import main
from dllm_jax.posttraining.preferences import PairBatches
from tests import runs
from tests.data import chats
from tests.data.chats import said

LENGTH = 16


def _preferences(path, number=12):
  rows = []
  for i in range(number):
    asked = said(f"w{i + 3}")
    good, bad = (
      [{"role": "assistant", "content": text}] for text in ("w1 w1", "w2")
    )
    rows.append({"prompt": asked, "chosen": good, "rejected": bad})
  return chats.write(path, rows)


@pytest.fixture(scope="module", autouse=True)
def _one_device():
  """Lets the command see one device of the eight."""
  opened = runs.Run.open.__func__
  one = lambda cls, workdir, **fields: opened(
    cls, workdir, **fields | {"devices": jax.devices()[:1]}
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(runs.Run, "open", classmethod(one))
    yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  folder = tmp_path_factory.mktemp("align")
  chats.tokenizer(folder / "tokenizer")
  talks = [{"messages": said(f"w{i}", "w1 w2")} for i in range(40)]
  run = runs.run(
    folder / "source",
    data__path=chats.write(folder / "talks.jsonl", talks),
    data__tokenizer=str(folder / "tokenizer" / "tokenizer.json"),
    data__length=LENGTH,
    objective__name="llada",
    training__steps=2,
    training__ema_decay=0.0,
  )
  run.train()
  _preferences(folder / "pairs.jsonl")
  return run.workdir


def _args(source, output, *more, steps=6):
  return [
    *("align", f"--workdir={source}", f"--output={output}"),
    f"--config.data.path={source.parent / 'pairs.jsonl'}",
    *("--config.data.held_out=0.3", "--vrpo.n_t=2", "--vrpo.noise_sets=2"),
    *(f"--config.training.steps={steps}", *more),
  ]


def _align(capsys, *args, **fields):
  status = main(_args(*args, **fields))
  out, err = capsys.readouterr()
  return status, json.loads(out.splitlines()[-1]) if not status else err


def _parameters(workdir):
  run = runs.Run.open(workdir)
  return runs.parameters(run.state)


@pytest.fixture(scope="module")
def aligned(source):
  output = source.parent / "aligned"
  assert main(_args(source, output)) == 0
  return output


def _lines(output, name="reference.jsonl"):
  return (output / name).read_text().splitlines()


@pytest.mark.all
def test_learns_what_is_preferred(aligned):
  logged = [json.loads(line) for line in _lines(aligned, "metrics.jsonl")]
  first = next(m for m in logged if m["step"] == 1)
  assert abs(first["loss_nats_per_token"] - np.log(2)) < 1e-4  # the reference
  last = [m for m in logged if "accuracy" in m][-1]
  assert last["accuracy"] == 1.0 and last["loss_nats_per_token"] < 0.6
  assert last["score_variance"] > first["score_variance"]
  held_out = [m for m in logged if "eval_accuracy" in m][-1]
  assert held_out["eval_accuracy"] == 1.0 and held_out["eval_score"] > 0.1


@pytest.mark.all
def test_what_was_aligned_is_evaluated_on_chosen_answers(aligned):
  figures = runs.Run.open(aligned).evaluate(limit=1)
  assert figures["bits_per_token"] > 0


@pytest.mark.all
def test_a_second_run_has_nothing_to_do(source, aligned, capsys):
  status, found = _align(capsys, source, aligned)
  assert status == 0 and found["step"] == 6 and not found["interrupted"]
  assert found["eval_accuracy"] == 1.0


@pytest.mark.all
def test_resumes_bit_for_bit(source, aligned, tmp_path, capsys):
  # Stopped after its third step, and while its reference was asked.
  output = tmp_path / "run"
  assert _align(capsys, source, output, steps=3)[0] == 0
  path = output / "reference.jsonl"
  path.write_text(path.read_text()[:-30])
  assert _align(capsys, source, output)[0] == 0
  for a, b in zip(_parameters(output), _parameters(aligned), strict=True):
    np.testing.assert_array_equal(a, b)
  said = lambda o: {x for x in _lines(o) if x.startswith('{"noise"')}
  assert said(aligned) <= said(output)


@pytest.mark.all
def test_other_pairs_and_other_references_are_told(
  source, aligned, tmp_path, capsys
):
  status, err = _align(capsys, source, aligned, f"--reference={aligned}")
  assert status == 2 and "is of other reference" in err
  status, err = _align(capsys, source, aligned, "--vrpo.beta=0.3")
  assert status == 2 and "beta: 0.1 -> 0.3" in err


@pytest.mark.parametrize(
  ("more", "says"),
  [
    (["--method=dpo"], "unknown method 'dpo'; legal: vrpo"),
    (["--vrpo.betta=1"], "unknown field vrpo.betta; did you mean 'beta'"),
    (["--vrpo.beta=-1"], "vrpo.beta must be above 0"),
    (["--config.data.path=nowhere.jsonl"], "nowhere.jsonl"),
  ],
)
@pytest.mark.all
def test_mistakes_are_one_line(source, tmp_path, capsys, more, says):
  status, err = _align(capsys, source, tmp_path / "run", *more)
  assert status == 2 and says in err and err.count("\n") == 1
  assert not (tmp_path / "run").exists()


def test_another_vocabulary_is_refused(source, tmp_path, capsys):
  other = runs.run(tmp_path / "other", objective__name="llada")
  status, err = _align(
    capsys, source, tmp_path / "run", f"--reference={other.workdir}"
  )
  assert status == 2 and "has another vocabulary" in err


def test_what_has_no_masks_is_refused(source, tmp_path, capsys):
  other = runs.run(tmp_path / "other", objective__name="autoregressive")
  status, err = _align(capsys, other.workdir, tmp_path / "run")
  assert status == 2 and "no masked diffusion" in err


@pytest.mark.all
def test_adapters_alone_learn(source, tmp_path, capsys):
  output = tmp_path / "run"
  status, found = _align(
    capsys, source, output, "--config.model.adapter.rank=2", steps=4
  )
  assert status == 0, found
  assert found["eval_accuracy"] > 0.5
  run = runs.Run.open(output)
  old = runs.Run.open(source).state
  kernel = lambda state: np.asarray(
    state.params["model"]["layers"]["attention"]["q"]["kernel"]
  )
  np.testing.assert_array_equal(kernel(run.state), kernel(old))


def test_batches_are_a_function_of_their_number():
  from dllm_jax.data.conversations import Example, Pair

  example = lambda i: Example(np.asarray([i, 1]), np.asarray([False, True]))
  pairs = [Pair(example(i), example(i + 10)) for i in range(5)]
  table = np.arange(2 * 5 * 2 * 3, dtype=np.float32).reshape(2, 5, 2, 3)
  make = lambda: PairBatches(pairs, table, batch_size=4, length=4, seed=3)
  batches, again = make(), make()
  seen = [next(batches) for _ in range(5)]
  again.set_state({"batch": 3})
  np.testing.assert_array_equal(next(again).number, seen[3].number)
  numbers = np.concatenate([b.number for b in seen])
  assert all(sorted(numbers[i : i + 5]) == [0, 1, 2, 3, 4] for i in (0, 5, 10))
  assert not np.array_equal(numbers[:5], numbers[5:10])
  for k, batch in enumerate(seen):
    epoch = (np.arange(4) + 4 * k) // 5
    np.testing.assert_array_equal(batch.noise, epoch % 2)
    np.testing.assert_array_equal(batch.tokens[:, 0], batch.number)
    np.testing.assert_array_equal(
      batch.reference, table[epoch % 2, batch.number]
    )
