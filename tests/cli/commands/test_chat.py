"""`dllm chat`: turns of a conversation, and models that cannot talk."""

import io
import types

import numpy as np
import pytest

from dllm_jax.cli.commands import chat
from dllm_jax.run.run import Run
from dllm_jax.sampling.presets import SamplerConfig


class Tokenizer:
  chat_template = "{{ messages }}"
  end_ids = ()

  def chat(self, messages, *, answer=True):
    assert answer
    return np.arange(3 * len(messages))

  def decode(self, ids):
    return "".join(chr(97 + i) for i in ids)


class Fake:
  """A run whose answers are the first new slots."""

  tokenizer = Tokenizer()
  objective = types.SimpleNamespace(block_length=None)
  config = types.SimpleNamespace(sampler=SamplerConfig(preset="llada"))
  generator = types.SimpleNamespace(plan=lambda rows, **_: None)

  def __init__(self, refused=()):
    self.asked, self.refused = [], refused

  def sample_rows(self, rows, **_):
    (row,) = rows
    if len(row) in self.refused:
      raise ValueError("a prompt holds text only")
    self.asked.append(len(row))
    prompt = row.index(None)
    generation = types.SimpleNamespace(function_evaluations=np.array([4]))
    return types.SimpleNamespace(
      rows=[[*row[:prompt], 0, 1, 2]], generation=generation
    )


def test_each_turn_sees_the_ones_before(monkeypatch, capsys):
  fake = Fake()
  monkeypatch.setattr(Run, "open", lambda workdir: fake)
  monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nAnd?\n\nnever\n"))
  argv = ["--workdir=x", "--new_tokens=40", "--system=Be brief."]
  result = chat.COMMAND.run(argv)
  assert result == {"answers": ["abc", "abc"], "function_evaluations": 8}
  assert capsys.readouterr().out == "abc\nabc\n"
  assert fake.asked == [46, 52]  # 2 and 4 messages of 3 ids each


class Interrupted(io.StringIO):
  """A terminal at which Ctrl-C is pressed after its lines."""

  def readline(self):
    line = super().readline()
    if not line:
      raise KeyboardInterrupt
    return line


@pytest.mark.parametrize("terminal", [io.StringIO, Interrupted])
def test_ctrl_d_and_ctrl_c_end_a_conversation(terminal, monkeypatch, capsys):
  monkeypatch.setattr(Run, "open", lambda workdir: Fake())
  monkeypatch.setattr("sys.stdin", terminal("Hello\n"))
  result = chat.COMMAND.run(["--workdir=x"])
  assert result == {"answers": ["abc"], "function_evaluations": 4}
  assert capsys.readouterr().err.endswith("> \n")


def test_a_message_that_is_refused_is_forgotten(monkeypatch, capsys):
  fake = Fake(refused=[9 + 128])
  monkeypatch.setattr(Run, "open", lambda workdir: fake)
  monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n<mask>\n"))
  result = chat.COMMAND.run(["--workdir=x"])
  assert result["answers"] == ["abc"] and fake.asked == [3 + 128]
  assert "dllm: a prompt holds text only\n" in capsys.readouterr().err


def test_a_model_without_a_template_is_refused(monkeypatch):
  fake = Fake()
  fake.tokenizer = object()
  monkeypatch.setattr(Run, "open", lambda workdir: fake)
  with pytest.raises(ValueError, match="no chat template"):
    chat.COMMAND.run(["--workdir=x"])
