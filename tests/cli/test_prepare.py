"""`dllm prepare` on several machines: shares, merging, mistakes."""

import json

import pytest

from dllm_jax.cli.main import main


@pytest.fixture
def source(tmp_path):
  lines = (json.dumps({"text": f"document {i % 30}"}) for i in range(60))
  (tmp_path / "docs.jsonl").write_text("\n".join(lines))
  return f"--input={tmp_path}/docs.jsonl"


def _last(capsys):
  return json.loads(capsys.readouterr().out.splitlines()[-1])


def _error(capsys):
  lines = capsys.readouterr().err.strip().splitlines()
  return [line for line in lines if line.startswith("dllm: ")]


def test_shares_and_merge(tmp_path, source, capsys):
  output = f"--output={tmp_path}/tokens"
  settings = ["--length=16", "--dedup=exact", "--workers=1", "--held_out=0"]
  for shard in ("0/2", "1/2"):
    assert main(["prepare", source, output, f"--shard={shard}", *settings]) == 0
  made = _last(capsys)
  assert (made["documents"], made["duplicate_documents"]) == (30, 30)
  assert main(["prepare", "--merge", output]) == 0
  assert {k: v for k, v in _last(capsys).items() if k in made} == made


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--shard=2/2"], "shard 2/2 does not exist; the first of 2 is 0/2"),
    (["--shard=one"], "must be a number from 0"),
    (["--merge"], "--merge takes --output only"),
    (["--dedup=fuzzy"], "exact"),
  ],
)
def test_mistakes_are_one_line(tmp_path, source, capsys, flags, words):
  output = tmp_path / "tokens"
  assert main(["prepare", source, f"--output={output}", *flags]) == 2
  [line] = _error(capsys)
  assert words in line
  assert not output.exists()


def test_another_tokenizer_is_one_line(tmp_path, source, capsys):
  output = f"--output={tmp_path}/tokens"
  # One piece: the second share of it has nothing to do but to agree.
  assert main(["prepare", source, output, "--shard=1/2"]) == 0
  assert _last(capsys)["missing_pieces"] == 1
  other = ["--shard=0/2", "--tokenizer=char"]
  assert main(["prepare", source, output, *other]) == 2
  [line] = _error(capsys)
  assert "another tokenizer" in line
  assert main(["prepare", "--merge", output]) == 2
  [line] = _error(capsys)
  assert "1 pieces are missing (0)" in line
  assert main(["prepare", source, output, "--shard=0/2"]) == 0
  assert _last(capsys)["missing_pieces"] == 0
