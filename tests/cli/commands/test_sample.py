"""Prompts of `dllm sample` that choose for themselves."""

import pytest

from dllm_jax.cli import command as commands
from dllm_jax.cli.commands import sample
from dllm_jax.sampling.options import RowOptions


def test_a_prompt_of_a_file_may_have_options(tmp_path):
  path = tmp_path / "prompts.jsonl"
  path.write_text(
    '{"prompt": "ROMEO:"}\n\n'
    '{"prompt": "A", "temperature": 0.7, "logit_bias": {"5": 2}, "seed": 3}\n'
  )
  rows = sample._rows(str(path))
  assert [row.pop("prompt") for row in rows] == ["ROMEO:", "A"]
  first, second = map(sample._options, rows)
  assert first == RowOptions()
  assert second == RowOptions(temperature=0.7, logit_bias={5: 2}, seed=3)
  plain = tmp_path / "prompts.txt"
  plain.write_text('{"prompt": "A"}\n')
  assert sample._rows(str(plain)) == [{"prompt": '{"prompt": "A"}'}]


@pytest.mark.parametrize("line", ["ROMEO:", "[1]", "{}", '{"prompt": 3}'])
def test_a_line_without_a_prompt_is_named(tmp_path, line):
  path = tmp_path / "prompts.jsonl"
  path.write_text('{"prompt": "A"}\n' + line)
  with pytest.raises(commands.UsageError, match="line 2 of .* is no object"):
    sample._rows(str(path))


def test_an_option_that_there_is_not_is_named():
  with pytest.raises(commands.UsageError, match="no option 'top'; legal: temp"):
    sample._options({"top": 3})
