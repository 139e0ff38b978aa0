"""`dllm evaluate --task=likelihood` on a tiny run: figures, resuming, mistakes."""

import json
import math

import pytest

from dllm_jax.cli.main import main
from dllm_jax.evaluation.likelihood.scorer import Scorer


def evaluate(workdir, capsys, *args):
  status = main(["evaluate", f"--workdir={workdir}", *args])
  said = capsys.readouterr()
  if status == 0:
    return json.loads(said.out.splitlines()[-1])
  *bars, line = said.err.strip().splitlines()
  if status == 2:  # a mistake is one line
    assert not bars
  else:
    assert (status, line) == (130, "dllm: interrupted")
  return line


@pytest.mark.all
def test_held_out_text_resumes_and_stops_at_the_error(
  workdir, capsys, monkeypatch
):
  args = ["--batches=2", "--passes=3"]
  first = evaluate(workdir, capsys, *args)
  assert first["passes"] == 3 and first["forward_tokens"] == 3 * 2 * 8 * 32
  protocol = first["protocol"]
  assert protocol["estimator"] == "counts" and protocol["step"] == 2
  low, high = first["interval"]
  assert low < first["bits_per_token"] < high
  assert first["bits_per_byte"] == first["bits_per_char"]

  # Two batches are known; the process dies in the third of a longer run.
  real, calls = Scorer.nats, []

  def dies(self, keys, batch):
    calls.append(1)
    if len(calls) > 1:
      raise KeyboardInterrupt
    return real(self, keys, batch)

  monkeypatch.setattr(Scorer, "nats", dies)
  longer = ["--batches=2", "--passes=4"]
  assert "interrupted" in evaluate(workdir, capsys, *longer)
  monkeypatch.setattr(Scorer, "nats", real)
  resumed = evaluate(workdir, capsys, *longer)
  assert resumed["forward_tokens"] == 8 * 32  # the one batch that was missing
  wide = evaluate(workdir, capsys, "--batches=2", "--error=10")
  assert wide["passes"] == 4 and wide["forward_tokens"] == 0
  assert wide["bits_per_token"] == resumed["bits_per_token"]


@pytest.mark.all
def test_documents_and_answers(workdir, capsys, tmp_path):
  text = tmp_path / "words.txt"
  text.write_text(" he does n't know , and it 's late . \n" * 3)
  args = [f"--text={text}", "--detokenizer=ptb", "--samples=4", "--passes=2"]
  found = evaluate(workdir, capsys, *args, "--overlap=8", "--length=32")
  assert found["words"] == 30 + 3 and found["windows"] == 4
  total = found["bits_per_token"] * found["tokens"] * math.log(2)
  assert found["word_perplexity"] == pytest.approx(math.exp(total / 33))
  assert found["protocol"]["overlap"] == 8
  pairs = tmp_path / "pairs.jsonl"
  lines = [
    {"prompt": "To be, ", "answer": "or not"},
    {"prompt": "", "answer": "a"},
  ]
  pairs.write_text("\n".join(json.dumps(line) for line in lines))
  args = [f"--pairs={pairs}", "--samples=4", "--passes=2"]
  found = evaluate(workdir, capsys, *args)
  assert len(found["log_likelihoods"]) == 2 and found["tokens"] == 8
  assert max(found["log_likelihoods"]) < 0
  before = {p: p.stat().st_size for p in workdir.rglob("*")}
  pairs.write_text(json.dumps({"prompt": "a", "answer": "b" * 40}))
  said = evaluate(workdir, capsys, f"--pairs={pairs}")
  assert "does not fit the canvas of 32" in said and "pair 0" in said
  text.write_text("one\n\n\n\ntwo")
  said = evaluate(workdir, capsys, f"--text={text}", "--separator=\n\n")
  assert "document 1" in said and "empty" in said
  assert {p: p.stat().st_size for p in workdir.rglob("*")} == before


@pytest.mark.parametrize(
  "arg, said",
  [
    ("--passes=1", "at least 2"),
    ("--estimator=best", "legal: auto"),
    ("--estimator=exact", "no likelihood by 'exact'"),
    ("--block_size=4", "has no blocks"),
    ("--detokenizer=french", "legal: none, ptb"),
    ("--pairs=nowhere.jsonl", "nowhere.jsonl"),
  ],
)
@pytest.mark.all
def test_mistakes_are_one_line(workdir, capsys, arg, said):
  status = main(["evaluate", f"--workdir={workdir}", arg])
  lines = capsys.readouterr().err.strip().splitlines()
  assert status == 2 and len(lines) == 1 and said in lines[0]
