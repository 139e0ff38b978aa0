"""The commands in docs/sampling.md are legal."""

import pathlib
import re
import shlex

import pytest

from dllm_jax.cli import command as commands
from dllm_jax.cli.commands import sample
from dllm_jax.data.tokenizer import Bytes
from dllm_jax.objectives.diffusion_gemma import DiffusionGemma
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.sampling.infill import parse
from dllm_jax.sampling.presets import PRESETS, SamplerConfig

PAGE = pathlib.Path(__file__).parent.parent.parent / "docs" / "sampling.md"
TEXT = PAGE.read_text(encoding="utf-8")
LINES = [
  line
  for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S)
  for line in block.replace("\\\n", " ").splitlines()
  if line.startswith("dllm sample")
]


@pytest.mark.parametrize("line", LINES)
def test_examples_are_legal(line):
  argv = shlex.split(line)[2:]
  values = commands.parse(sample.COMMAND, argv)
  config = commands.sampler(values, argv, SamplerConfig())
  objective = MDLM(vocab_size=66, mask_id=65)
  if config.preset == "diffusion_gemma":
    objective = DiffusionGemma(vocab_size=66, canvas=16)
  length = values.length or 128
  config.build(objective, length=length)
  for text in values.infill:
    assert None in parse(text, Bytes())


def test_every_preset_is_explained():
  named = set(re.findall(r"`([a-z0-9_]+)`", TEXT))
  assert set(PRESETS) <= named
