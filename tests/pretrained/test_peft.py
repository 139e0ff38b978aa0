"""Adapters in PEFT's folders: names, shapes, values, and what is refused.

The folders in `peft` are PEFT's own (`peft/record.py`). With `DLLM_PEFT` the
Python of an environment that has it, it also loads what is written here.
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess

import numpy as np
from numpy.testing import assert_allclose
import pytest
from safetensors.numpy import load_file, save_file

from dllm_jax.cli.main import main
from dllm_jax.models import DoRA, LoRA, merge_adapters
from dllm_jax.pretrained import load_pretrained
from dllm_jax.pretrained.peft import load_adapter, save_adapter
from dllm_jax.pretrained.table import flatten, shapes, unflatten
from tests.pretrained.golden import publish

PEFT = pathlib.Path(__file__).parent / "peft"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def base():
  return load_pretrained(PEFT / "base")


def adapted(model, folder):
  """Returns a model's network and parameters with a folder's adapter."""
  adapter, params = load_adapter(
    folder, model.family.table, model.params, model.config
  )
  return dataclasses.replace(model.config, adapter=adapter), params


@pytest.mark.parametrize("name", ["lora", "dora"])
@pytest.mark.few(1)
def test_same_logits(name, base):
  recorded = np.load(PEFT / "logits.npz")
  network, params = adapted(base, PEFT / name)
  model = dataclasses.replace(
    base,
    denoiser=base.family.table.network(network),
    config=network,
    params=params,
  )
  found = model.logits(recorded["tokens"])
  assert_allclose(found, recorded[name], rtol=1e-4, atol=1e-4)
  assert np.abs(recorded[name] - recorded["base"]).max() > 1

  merged = dataclasses.replace(base, params=merge_adapters(params, network))
  assert_allclose(merged.logits(recorded["tokens"]), found, atol=1e-4)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_there_and_back(name, base, tmp_path):
  network, params = adapted(base, PEFT / name)
  save_adapter(tmp_path / "out", base.family.table, params, network)
  theirs, ours = (
    load_file(folder / WEIGHTS) for folder in (PEFT / name, tmp_path / "out")
  )
  assert set(theirs) == set(ours)
  fields = json.loads((tmp_path / "out" / CONFIG).read_text())
  original = json.loads((PEFT / name / CONFIG).read_text())
  for field in ("target_modules",):
    assert set(fields[field]) == set(original[field])
  if name == "lora":
    for key, tensor in theirs.items():
      assert ours[key].tobytes() == tensor.tobytes(), key
    for field in ("r", "lora_alpha", "use_rslora", "use_dora", "peft_type"):
      assert fields[field] == original[field]
    return
  # Of one rank: the lower ones have zeros, and B the scale that they had.
  assert fields["r"] == 3
  assert fields["use_dora"]
  assert fields["use_rslora"]
  for key, tensor in theirs.items():
    if key.endswith("magnitude_vector"):
      assert_allclose(ours[key], tensor, rtol=1e-6)
    elif key.endswith("lora_A.weight"):
      assert_allclose(ours[key][: len(tensor)], tensor)
      assert not ours[key][len(tensor) :].any()
  again, params = adapted(base, tmp_path / "out")
  first = flatten(adapted(base, PEFT / name)[1])
  assert again.adapter == network.adapter
  for path, leaf in flatten(params).items():
    assert_allclose(leaf, first[path], rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.all
def test_fused_matrices(tmp_path):
  """q, k and v of one published matrix: one adapter along a diagonal."""
  model = load_pretrained(publish("llada2_moe", tmp_path / "in"))
  table = model.family.table
  network = dataclasses.replace(
    model.config,
    adapter=DoRA(rank=2, alpha=3.0, targets=".*layers/attention/[qv]"),
  )
  rng = np.random.default_rng(0)
  flat = {
    path: rng.normal(size=leaf.shape).astype(np.float32)
    for path, leaf in shapes(table, network).items()
    if "lora_" in path
  }
  params = unflatten(flatten(model.params) | flat)
  ranks = save_adapter(tmp_path / "out", table, params, network)
  assert set(ranks.values()) == {4}
  fields = json.loads((tmp_path / "out" / CONFIG).read_text())
  assert fields["target_modules"] == ["query_key_value"]
  assert set(fields["alpha_pattern"].values()) == {6}
  adapter, read = load_adapter(
    tmp_path / "out", table, model.params, model.config
  )
  assert (adapter.rank, adapter.scale) == (4, 1.5)
  whole, again = (
    flatten(merge_adapters(p, dataclasses.replace(network, adapter=a)))
    for p, a in ((params, network.adapter), (read, adapter))
  )
  for path, leaf in whole.items():
    assert_allclose(again[path], leaf, rtol=1e-4, atol=1e-5, err_msg=path)


def test_names_that_others_have_too(tmp_path):
  """LLaDA's `ff_out` is also its unembedding, which has no adapter."""
  model = load_pretrained(publish("llada_logits", tmp_path / "in"))
  table = model.family.table
  network = dataclasses.replace(model.config, adapter=LoRA(rank=2))
  zeros = {
    path: np.zeros(leaf.shape, np.float32)
    for path, leaf in shapes(table, network).items()
    if "lora_" in path
  }
  params = unflatten(flatten(model.params) | zeros)
  save_adapter(tmp_path / "out", table, params, network)
  targets = json.loads((tmp_path / "out" / CONFIG).read_text())[
    "target_modules"
  ]
  assert re.fullmatch(targets, "model.transformer.blocks.1.ff_out")
  assert not re.fullmatch(targets, "model.transformer.ff_out")
  assert not re.fullmatch(targets, "model.transformer.blocks.11.ff_out")
  assert load_adapter(tmp_path / "out", table, params, model.config)[0] == LoRA(
    rank=2
  )


def change(folder, tmp_path, fields=None, tensors=None):
  """Returns a copy of one of PEFT's folders with changes."""
  target = shutil.copytree(PEFT / folder, tmp_path / "changed")
  if fields:
    old = json.loads((target / CONFIG).read_text())
    (target / CONFIG).write_text(json.dumps(old | fields))
  if tensors:
    save_file(tensors(load_file(target / WEIGHTS)), target / WEIGHTS)
  return target


def without(part):
  return lambda found: {k: v for k, v in found.items() if part not in k}


def renamed(old, new):
  return lambda found: {k.replace(old, new): v for k, v in found.items()}


@pytest.mark.parametrize(
  "folder, fields, tensors, message",
  [
    ("lora", {"peft_type": "IA3"}, None, "peft_type 'IA3' is no adapter here"),
    ("lora", {"modules_to_save": ["lm_head"]}, None, "modules_to_save"),
    ("lora", {"bias": "all"}, None, "bias 'all' changes"),
    ("lora", {"new_kind": 3}, None, "new_kind 3 changes"),
    ("lora", {"init_lora_weights": "pissa"}, None, "has changed the weights"),
    ("lora", {"r": "4"}, None, "r must be a number"),
    ("lora", None, without("lora_B"), "lacks lora_A or lora_B"),
    ("lora", None, renamed("v_proj", "w_proj"), "no place for an adapter of"),
    ("lora", None, renamed("v_proj", "q_proj"), "has the shapes"),
    ("lora", None, renamed("lora_A", "lora_C"), "is no part of an adapter"),
    ("lora", None, lambda found: {}, "holds no tensors"),
    ("dora", None, without("magnitude"), "has the shapes"),
    ("dora", None, without("layers.1.self_attn.q"), "but not on"),
  ],
)
def test_refused(folder, fields, tensors, message, base, tmp_path):
  path = change(folder, tmp_path, fields, tensors)
  with pytest.raises(ValueError, match=message) as caught:
    adapted(base, path)
  assert "\n" not in str(caught.value)


def test_layers_without_one(base, tmp_path):
  path = change("lora", tmp_path, None, without("layers.1.self_attn.q"))
  _, params = adapted(base, path)
  assert not params["layers"]["attention"]["q"]["lora_a"][1].any()
  assert params["layers"]["attention"]["q"]["lora_a"][0].any()


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_missing_files(name, base, tmp_path):
  path = change("lora", tmp_path)
  (path / name).unlink()
  with pytest.raises(FileNotFoundError, match=name):
    adapted(base, path)


def test_no_adapters(base, tmp_path):
  with pytest.raises(ValueError, match="no adapters"):
    save_adapter(tmp_path / "x", base.family.table, base.params, base.config)


@pytest.mark.all
@pytest.mark.parametrize("name", ["lora", "dora"])
def test_command(name, base, tmp_path, capsys):
  run, out = tmp_path / "run", tmp_path / "out"
  argv = ["convert", f"--from_hf={PEFT / 'base'}", f"--workdir={run}"]
  assert main([*argv, f"--adapter={PEFT / name}"]) == 0, capsys.readouterr()
  assert main(["convert", f"--workdir={run}", f"--to_peft={out}"]) == 0
  network, params = adapted(base, PEFT / name)
  _, read = adapted(base, out)
  for path, leaf in flatten(params).items():
    assert_allclose(
      flatten(read)[path], leaf, rtol=1e-5, atol=1e-6, err_msg=path
    )
  python = os.environ.get("DLLM_PEFT")
  if python:
    script = [python, PEFT / "record.py", "logits", PEFT / "base", out]
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([*script, tmp_path / "logits.npy"], check=True, env=clean)
    theirs = np.load(PEFT / "logits.npz")[name]
    assert_allclose(np.load(tmp_path / "logits.npy"), theirs, atol=1e-4)


@pytest.mark.parametrize(
  "argv, message",
  [
    (["--to_hf=a", "--to_peft=b"], "give one of --from_hf, --to_hf, --to_peft"),
    (["--to_hf=a", "--adapter=b"], "--adapter is read onto the weights"),
  ],
)
def test_bad_commands(argv, message, capsys):
  assert main(["convert", "--workdir=x", *argv]) == 2
  assert message in capsys.readouterr().err
