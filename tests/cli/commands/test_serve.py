"""`dllm serve`: keys, flags, and what docs/serving.md says of them."""

import pathlib
import re
import shlex
import socket

import pytest

from dllm_jax.cli import command as commands
from dllm_jax.cli.commands import serve
from dllm_jax.serving.http import protocol, server

ROOT = pathlib.Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def key(*flags):
  return serve._key(commands.parse(serve.COMMAND, flags))


def test_a_key_comes_from_one_place(tmp_path, monkeypatch):
  monkeypatch.delenv("DLLM_API_KEY", raising=False)
  file = tmp_path / "key"
  file.write_text("of the file\nrest")
  assert key() is None
  assert key("--api_key=k") == "k"
  assert key(f"--api_key_file={file}") == "of the file"
  monkeypatch.setenv("DLLM_API_KEY", "around")
  assert key() == "around"
  with pytest.raises(commands.UsageError, match="--api_key and DLLM_API_KEY"):
    key("--api_key=k")
  monkeypatch.delenv("DLLM_API_KEY")
  file.write_text("\n")
  with pytest.raises(commands.UsageError, match="printable ASCII"):
    key(f"--api_key_file={file}")


def test_a_port_that_is_taken_is_told():
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    with pytest.raises(ValueError, match=f"port {port} .*choose another"):
      server._listening("127.0.0.1", port)
  server._listening("127.0.0.1", 0).close()
  with pytest.raises(ValueError, match="--host"):
    server._listening("192.0.2.1", 0)


def test_every_field_is_explained():
  named = set(re.findall(r"`([a-z_]+)`", TEXT))
  fields = {*protocol.Completion.model_fields, *protocol.Chat.model_fields}
  assert fields - {"stream_options"} <= named
  assert "stream_options.include_usage" in TEXT


def test_every_limit_is_stated_as_it_is():
  values = commands.parse(serve.COMMAND, [])
  table = re.findall(r"\| `--([a-z_]+)` \| ([^|]+) \|", TEXT)
  assert len(table) >= 9
  for name, said in table:
    default = values[name].default
    wanted = {2**20: "1 MiB", 0: ("trained length", "as many as slots")}
    wanted = wanted.get(default, f"{default:g}")
    assert said in wanted, name


def test_commands_are_legal():
  lines = [
    line
    for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("dllm serve")
  ]
  assert lines
  for line in lines:
    commands.parse(serve.COMMAND, shlex.split(line)[2:])
