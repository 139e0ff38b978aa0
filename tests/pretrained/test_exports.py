"""What leaves: the type that a config names, order, and one set of weights."""

import dataclasses
import json

import pytest
from safetensors.numpy import load_file

import dllm_jax
from dllm_jax.cli.main import main
from dllm_jax.pretrained import families, files
from dllm_jax.pretrained.describe import retrained
from dllm_jax.pretrained.families import Fields
from tests.pretrained.golden import publish
from tests.pretrained.test_describe import workdir


def stated(folder):
  """Returns the types that a config names, and those of its weights."""
  config = json.loads((folder / "config.json").read_text())
  named = {k: config[k] for k in ("dtype", "torch_dtype") if k in config}
  tensors = load_file(folder / "model.safetensors")
  assert list(tensors) == sorted(tensors)
  return named, {str(tensor.dtype) for tensor in tensors.values()}


# huggingface/transformers issue 31861: it is the type of the weights as saved.
@pytest.mark.parametrize(
  ("named", "asked", "said"),
  [
    ({"torch_dtype": "bfloat16"}, "float32", {"torch_dtype": "float32"}),
    ({"dtype": "bfloat16"}, "float32", {"dtype": "float32"}),
    ({"torch_dtype": "float32"}, "bfloat16", {"torch_dtype": "bfloat16"}),
    ({"torch_dtype": "float16"}, "bfloat16", {"torch_dtype": "bfloat16"}),
    ({"dtype": "bfloat16"}, None, {"dtype": "float32"}),
    (
      {"dtype": "float32", "torch_dtype": "float32"},
      "bfloat16",
      {"dtype": "bfloat16", "torch_dtype": "bfloat16"},
    ),
    ({}, None, {}),
    ({}, "bfloat16", {"torch_dtype": "bfloat16"}),
  ],
  ids=str,
)
def test_a_config_names_the_type_of_its_weights(named, asked, said, tmp_path):
  source = publish("llada_logits", tmp_path / "in", **named)
  model = dllm_jax.load_pretrained(source)
  dllm_jax.save_pretrained(model, tmp_path / "out", dtype=asked)
  assert stated(tmp_path / "out") == (said, {asked or "float32"})


@pytest.mark.all
def test_a_run_from_scratch_leaves_in_the_type_that_is_asked_for(tmp_path):
  workdir(tmp_path / "run", "llada", {})
  argv = ["convert", f"--workdir={tmp_path / 'run'}"]
  for kind in ("bfloat16", "float32"):
    out = tmp_path / kind
    assert main([*argv, f"--to_hf={out}", f"--dtype={kind}"]) == 0
    named, types = stated(out)
    assert types == {kind} and set(named.values()) <= {kind}


@pytest.mark.all
def test_an_import_goes_back_in_the_type_that_is_asked_for(tmp_path):
  source = publish("llada_logits", tmp_path / "in", torch_dtype="bfloat16")
  run = tmp_path / "run"
  into = [f"--from_hf={source}", f"--workdir={run}", "--dtype=bfloat16"]
  assert main(["convert", *into]) == 0
  out = [f"--to_hf={tmp_path / 'out'}", f"--workdir={run}", "--dtype=float32"]
  assert main(["convert", *out]) == 0
  said = ({"torch_dtype": "float32"}, {"float32"})
  assert stated(tmp_path / "out") == said


def test_shards_that_were_left_behind_are_told_of(tmp_path):
  source = publish("llada_logits", tmp_path / "in")
  model = dllm_jax.load_pretrained(source)
  dllm_jax.save_pretrained(model, tmp_path / "cut", shard_bytes=100_000)
  shard = next((tmp_path / "cut").glob("model-00001-*"))
  (source / shard.name).write_bytes(shard.read_bytes())
  said = f"model.safetensors, which is read, and {shard.name}"
  with pytest.warns(UserWarning, match=said):
    assert dllm_jax.load_pretrained(source)


# huggingface/diffusers issue 14719: after saving into the same folder, the old
# weights were loaded without a word.
def test_an_index_beside_a_whole_file_is_no_choice(tmp_path):
  source = publish("llada_logits", tmp_path / "in")
  model = dllm_jax.load_pretrained(source)
  both = tmp_path / "both"
  dllm_jax.pretrained.save_pretrained(model, both, shard_bytes=100_000)
  assert dllm_jax.load_pretrained(both)
  (both / "model.safetensors").write_bytes(
    (source / "model.safetensors").read_bytes()
  )
  said = "model.safetensors and, in model.safetensors.index.json.*remove it"
  with pytest.raises(ValueError, match=said):
    dllm_jax.load_pretrained(both)
  # With a shard gone too: the whole file is not hidden.
  next(both.glob("model-00001*")).unlink()
  with pytest.raises(ValueError, match=said):
    dllm_jax.load_pretrained(both)
  # An index may name the whole file itself.
  (both / "model.safetensors.index.json").write_text(
    json.dumps({"weight_map": dict.fromkeys(model.used, "model.safetensors")})
  )
  assert dllm_jax.load_pretrained(both)


# A folder whose config says other blocks than its weights learned is read as
# another model by its owners' code.
def test_a_config_says_what_a_run_was_trained_with(tmp_path):
  for name in ("sdar", "sedd_absorb"):
    folder = publish(name, tmp_path / name)
    fields = Fields(files.read_config(folder), folder / "config.json")
    family = families.find(fields)
    model = dllm_jax.load_pretrained(folder)
    told = lambda **now: retrained(
      family, fields, dataclasses.replace(model.objective, **now)
    )
    assert told() == fields.values
    if name == "sdar":
      block = model.objective.block_size * 2
      assert told(block_size=block) == fields.values | {"block_size": block}
    else:
      with pytest.raises(ValueError, match="says scale_by_sigma True, but"):
        told(scale_by_sigma=False)
