"""Runs that were trained from scratch leave in a published layout."""

import dataclasses

import jax
import numpy as np
import pytest

import dllm_jax
from dllm_jax.cli.main import main
from dllm_jax.config import config as configs
from dllm_jax.pretrained import families, table, tokens
from dllm_jax.pretrained.describe import describe
from dllm_jax.run.run import Run
from dllm_jax.training.checkpoint import Checkpoints
from tests import golden_cases
from tests.pretrained.golden import PUBLISHED, published_config
from tests.pretrained.test_published_shapes import CONFIGS

DITS = ("mdlm", "bd3lm", "sedd_absorb", "sedd_uniform")


def read(config):
  """Returns a config's family, network, objective and special tokens."""
  fields = families.Fields(config, "config.json")
  family = families.find(fields)
  network = family.network(fields)
  size = network.vocab_size
  special = tokens.ids(family, fields, size, families.Ids(None))
  objective = families.objective(family, fields, size, special)
  return family, network, objective, special


@pytest.mark.parametrize("name", [*PUBLISHED, *DITS, *CONFIGS])
def test_what_is_described_is_read_again(name):
  config = CONFIGS.get(name) or published_config(golden_cases.load(name))
  family, network, objective, special = read(config)
  length = 16 * (objective.block_length or 4)
  written, fields = describe(
    objective, network, special, length=length, name=family.name
  )
  again = read(fields)
  assert written == again[0] == family
  assert again[1] == network and again[3] == special
  for field in family.settings(families.Fields(fields, "")):
    assert getattr(again[2], field) == getattr(objective, field)
  if name in (*DITS, "sdar", "llada_logits", "dream_logits", "llada_moe"):
    # Its family is the first that holds it.
    found, _ = describe(objective, network, special, length=length)
    assert found == family


def workdir(path, objective, model):
  """Returns a run at step 0 with random parameters, and those."""
  resolved = configs.load("smoke", {"objective": objective})
  resolved.data.tokenizer, resolved.data.length = "byte", 16
  resolved.model.update(model)
  run = Run.create(resolved, path)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(x.dtype),
    run.program.abstract.params["model"],
  )
  checkpoints = Checkpoints(path)
  process = run.objective.init(jax.random.key(0)).replace(constants={})
  checkpoints.save_imported(params, process)
  checkpoints.close()
  return params


@pytest.mark.all
def test_from_scratch_to_a_published_layout(tmp_path, capsys):
  run, out = tmp_path / "run", tmp_path / "out"
  params = workdir(run, "llada", {})
  argv = ["convert", f"--workdir={run}", f"--to_hf={out}"]
  assert main(argv) == 0
  assert '"family": "llada"' in capsys.readouterr().out
  model = dllm_jax.load_pretrained(out)
  assert model.objective.mask_id == model.tokenizer.mask_id == 256
  assert type(model.objective).__name__ == "LLaDA"
  theirs, ours = table.flatten(model.params), table.flatten(params)
  for path, leaf in ours.items():
    # Padded rows of the vocabulary are not published.
    rows = {"embed": np.s_[:257], "unembed": np.s_[:, :257]}
    real = rows.get(path.split("/")[0], np.s_[:])
    np.testing.assert_array_equal(theirs[path][real], leaf[real])

  assert main([*argv[:2], f"--to_hf={tmp_path / 'b'}", "--as=dream"]) == 2
  message = "outputs of dream predict the token 1 slots on, those of this"
  assert message in capsys.readouterr().err
  assert main([*argv[:2], f"--to_hf={tmp_path / 'b'}", "--as=gpt"]) == 2
  assert "unknown family 'gpt'; legal: llada, dream" in capsys.readouterr().err
  assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


def test_what_is_described_is_no_other_family():
  sdar = read(CONFIGS["SDAR-8B"])
  small = dataclasses.replace(sdar[2], block_size=2)
  # By its fields it could be I-DLM's: it says what it is.
  family, fields = describe(small, sdar[1], sdar[3], length=8, name="sdar")
  assert fields["diffusion_objective"] == family.name == "sdar"
  assert read(fields)[0] == family and read(fields)[2].block_size == 2
  # A layout's one field for biases is of four, and a network has three.
  biased = dataclasses.replace(sdar[1], qkv_bias=True)
  with pytest.raises(ValueError, match="sdar has qkv_bias False, not True"):
    describe(sdar[2], biased, sdar[3], length=8, name="sdar")


def test_what_no_layout_holds():
  _, network, objective, special = read(CONFIGS["LLaDA-8B"])
  kind = lambda **changes: dataclasses.replace(network, **changes)
  with pytest.raises(ValueError, match="llada has qk_norm False, not True"):
    describe(objective, kind(qk_norm=True), special, length=8, name="llada")
  with pytest.raises(
    ValueError, match="no published layout .* name one .* --as"
  ):
    describe(objective, kind(conditioned=True), special, length=8)
  with pytest.raises(ValueError, match="name one .*: llada, dream, sdar"):
    describe(objective, kind(qk_norm=True), special, length=8)
  with pytest.raises(ValueError, match="mdlm holds a dit, which this"):
    describe(objective, network, special, length=8, name="mdlm")
