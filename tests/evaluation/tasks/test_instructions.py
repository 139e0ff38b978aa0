"""Fine-tuning teaches instructions that the model did not know."""

import json

import pytest

from tests import runs


def _share(result, model, group):
  rows = [
    row
    for row in result["rows"]
    if (row["model"], row["group"]) == (model, group)
  ]
  return sum(row["exact_match"] for row in rows) / len(rows)


@pytest.mark.all
def test_wholly_and_by_adapters(tmp_path):
  process = runs.dllm(
    "evaluate", "--task=instructions", f"--workdir={tmp_path / 'run'}"
  )
  out, err = process.communicate(timeout=3000)
  assert process.returncode == 0, err
  result = json.loads(out.splitlines()[-1])
  assert _share(result, "base", "first") > 0.9
  assert _share(result, "base", "later") < 0.05
  assert _share(result, "full", "later") > 0.9
  assert _share(result, "lora", "later") > 0.8
