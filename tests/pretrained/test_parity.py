"""A published folder goes in by the front door; the original's logits come out.

Tolerances are those stated with the recorded arrays: ten times the originals'
own float32 error and more, for another order of sums.
"""

import dataclasses
import functools
import json
import math
import pathlib
import struct
import tempfile

import jax
import numpy as np
from numpy.testing import assert_allclose
import pytest
from safetensors.numpy import load_file, save_file

import dllm_jax
from dllm_jax.core.mask import materialise, TwoStream
from dllm_jax.objectives.autoregressive import Autoregressive
from dllm_jax.parallel import make_mesh
from tests import golden_cases
from tests.pretrained.golden import publish, PUBLISHED


@functools.cache
def loaded(name):
  with tempfile.TemporaryDirectory() as folder:
    path = publish(name, pathlib.Path(folder) / name)
    return golden_cases.load(name).arrays, dllm_jax.load_pretrained(path)


def at(mask):
  return np.asarray(mask, bool)


@pytest.mark.parametrize("name", ["llada_logits", "llada_logits_gqa"])
@pytest.mark.few(1)
def test_llada(name):
  a, model = loaded(name)
  assert_allclose(model.logits(a["input_ids"]), a["logits"], atol=2e-4)
  for side in ("lp", "rp"):
    mask = at(a[f"{side}_attention_mask"])
    ours = model.logits(a[f"{side}_input_ids"], mask)
    assert_allclose(ours[mask], a[f"{side}_logits"][mask], atol=2e-4)
  assert model.sampler == "llada"


def test_dream():
  a, model = loaded("dream_logits")
  assert_allclose(model.logits(a["input_ids"]), a["logits"], atol=2e-4)
  mask = at(a["lp_attention_mask"])
  ours = model.logits(a["lp_input_ids"], mask)
  valid = at(a["lp_valid"])
  assert_allclose(ours[valid], a["lp_logits"][valid], atol=2e-4)
  given = model.logits(a["lp_input_ids"], mask, positions=a["lp_position_ids"])
  assert_allclose(given[mask], ours[mask], atol=1e-5)
  assert model.objective.shift == 1 and model.sampler == "dream"


@pytest.mark.all
def test_llada_moe():
  a, model = loaded("llada_moe")
  assert_allclose(model.logits(a["input_ids"]), a["logits"], atol=2e-4)
  mask = at(a["attention_mask"])
  ours = model.logits(a["input_ids"], mask)
  assert_allclose(ours[mask], a["masked_logits"][mask], atol=2e-4)
  assert model.sampler == "llada"


# Written and run by transformers 5.24.0: `rope_parameters`, `num_local_experts`,
# one tensor an expert. Other sets of recorded arrays need not have them.
@pytest.mark.parametrize("name", golden_cases.present("qwen3_moe", "mixtral"))
@pytest.mark.few(1)
def test_experts_of_autoregressive_models(name):
  a, model = loaded(name)
  assert_allclose(model.logits(a["input_ids"]), a["logits"], atol=2e-4)
  assert isinstance(model.objective, Autoregressive)
  assert not model.unused


@pytest.mark.parametrize("name, atol", [("llada2_moe", 5e-4), ("sdar", 2e-4)])
@pytest.mark.few(1)
def test_block_models(name, atol):
  a, model = loaded(name)
  tokens = a["input_ids"]
  square = a["block_mask"][None] > 0
  everyone = np.ones_like(square)
  assert_allclose(model.logits(tokens, square), a["logits"], atol=atol)
  assert_allclose(model.logits(tokens, everyone), a["logits_full"], atol=atol)
  assert model.sampler == {"llada2_moe": "llada2"}.get(name, name)


@pytest.mark.all
def test_sdar_samples_and_trains_as_published():
  a, model = loaded("sdar")
  # Its own mask is the block-causal one.
  assert_allclose(model.logits(a["input_ids"]), a["logits"], atol=2e-4)
  length = a["train_x0"].shape[1]
  spec = TwoStream(length, model.objective.block_size)
  ones = np.ones((1, 2 * length), np.int32)
  slots = np.arange(2 * length)
  mask = materialise(spec, slots, slots, q_segments=ones, k_segments=ones)
  np.testing.assert_array_equal(mask[0], a["train_mask"])
  tokens = np.concatenate([a["input_ids"][:1], a["train_x0"]], axis=1)
  ours = model.logits(tokens, mask, positions=slots[None] % length)
  assert_allclose(ours, a["train_logits"], atol=2e-4)


def test_mdlm():
  a, model = loaded("mdlm")
  assert_allclose(model.logits(a["xt"]), a["logits_sigma0"], atol=2e-4)
  with tempfile.TemporaryDirectory() as folder:
    path = publish("mdlm", pathlib.Path(folder) / "m", time_conditioning=True)
    told = dllm_jax.load_pretrained(path)
  ours = told.logits(a["xt"], time=a["t"])
  assert_allclose(ours, a["logits_sigma"], atol=2e-4)


@pytest.mark.parametrize("name", ["sedd_absorb", "sedd_uniform"])
@pytest.mark.few(1)
def test_sedd(name):
  a, model = loaded(name)
  ours = model.logits(a["x"], time=a["t"])
  assert_allclose(ours, a["log_score"], atol=2e-4)


def test_bd3lm():
  a, model = loaded("bd3lm")
  length = a["x0"].shape[1]
  spec = TwoStream(length, model.objective.block_size)
  slots = np.arange(2 * length)
  ones = np.ones((len(a["x0"]), 2 * length), np.int32)
  mask = materialise(spec, slots, slots, q_segments=ones, k_segments=ones)
  tokens = np.concatenate([a["xt"], a["x0"]], axis=1)
  positions = np.broadcast_to(slots % length, tokens.shape)
  ours = model.logits(tokens, mask, positions=positions)
  assert_allclose(ours[:, :length], a["logits"], atol=2e-4)


@pytest.mark.all
def test_over_a_mesh():
  a, alone = loaded("llada2_moe")
  config = alone.config
  # Two devices to an axis whatever the sizes, where they are even.
  of_axis = {
    "fsdp": (config.width,),
    "tensor": (config.heads, config.kv_heads or config.heads),
    "expert": (config.experts,),
  }
  pairs = {axis: 2 - max(n % 2 for n in of_axis[axis]) for axis in of_axis}
  sizes = {"data": 1, "context": 1, **pairs}
  devices = jax.devices()[: math.prod(sizes.values())]

  with tempfile.TemporaryDirectory() as folder:
    path = publish("llada2_moe", pathlib.Path(folder) / "m")
    model = dllm_jax.load_pretrained(path, mesh=make_mesh(sizes, devices))
  flat = jax.tree_util.tree_leaves_with_path(model.params)
  named = {
    jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in flat
  }
  (kernel,) = (x for path, x in named.items() if path.endswith("experts/up"))
  share = kernel.shape[1] // sizes["expert"]
  assert kernel.sharding.shard_shape(kernel.shape)[1] == share
  square = np.repeat(a["block_mask"][None], len(a["input_ids"]), axis=0)
  for rows in (1, 2, 4):  # with and without a row for each device
    tokens = np.resize(a["input_ids"], (rows, a["input_ids"].shape[1]))
    ours = model.logits(tokens, square[:1])
    theirs = np.resize(a["logits"], (rows, *a["logits"].shape[1:]))
    assert_allclose(ours, theirs, atol=5e-4)


# Cases of one layout, of other sizes, are among the long tests.
_SAME = (
  "diffusion_gemma_logits",
  "diffusion_gemma_loss",
  "dreamreasoner",
  "fast_dllm_v2",
  "idlm",
  "illada",
  "llada21",
  "llada_moe_published",
  "sdar_moe",
  "stable_diffcoder",
  "wedlm",
  "sft",
  "vrpo",
  "distill",
  "llada_generate",
  "llada_likelihood",
  "dream_g",
)


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=pytest.mark.all)
    if name.startswith(_SAME)
    else name
    for name in (*PUBLISHED, "mdlm", "bd3lm", "sedd_absorb", "sedd_uniform")
  ],
)
@pytest.mark.few(3)
def test_round_trip_is_byte_equal(name, tmp_path):
  theirs = golden_cases.weights(name)
  folder = publish(name, tmp_path / "in")
  model = dllm_jax.load_pretrained(folder)
  assert set(model.used) | set(model.unused) == set(theirs)
  counted = sum(theirs[key].size for key in model.used)
  assert model.parameters == counted
  third = sum(x.nbytes for x in theirs.values()) // 3
  dllm_jax.save_pretrained(model, tmp_path / "out", shard_bytes=third)
  shards = sorted((tmp_path / "out").glob("*.safetensors"))
  assert len(shards) > 1
  back = {}
  for shard in shards:
    back |= load_file(shard)
  assert set(back) == set(theirs)
  for key, tensor in theirs.items():
    assert back[key].dtype == tensor.dtype and back[key].shape == tensor.shape
    assert back[key].tobytes() == tensor.tobytes(), key
  again = dllm_jax.load_pretrained(tmp_path / "out")
  jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
  # A config names the type of the weights, whatever it said of them before.
  kinds = {"dtype": "float32", "torch_dtype": "float32"}
  kinds = {k: v for k, v in kinds.items() if k in model.published}
  assert again.published == dict(model.published) | kinds
  names = [key for shard in shards for key in load_names(shard)]
  assert names == sorted(names)  # As the owners' tools write them.


def load_names(file):
  """Returns the names of a file's tensors in the order in which they lie."""
  with file.open("rb") as data:
    (size,) = struct.unpack("<Q", data.read(8))
    header = json.loads(data.read(size))
  header.pop("__metadata__", None)
  return sorted(header, key=lambda key: header[key]["data_offsets"])


def test_autoregressive_families_load(tmp_path):
  # SDAR's weights are Qwen3's by name and shape.
  folder = publish(
    "sdar", tmp_path / "q", model_type="qwen3", architectures=...
  )
  model = dllm_jax.load_pretrained(folder)
  assert isinstance(model.objective, Autoregressive)
  a, sdar = loaded("sdar")
  length = a["input_ids"].shape[1]
  causal = np.tri(length, dtype=bool)[None]
  assert_allclose(
    model.logits(a["input_ids"]), sdar.logits(a["input_ids"], causal), atol=1e-5
  )


def test_llama_loads(tmp_path):
  # Dream's network without its biases is LLaMA's.
  folder = publish(
    "dream_logits", tmp_path, model_type="llama", architectures=...
  )
  path = folder / "model.safetensors"
  tensors = load_file(path)
  save_file({k: v for k, v in tensors.items() if "bias" not in k}, path)
  model = dllm_jax.load_pretrained(folder)
  a, dream = loaded("dream_logits")
  params = jax.tree_util.tree_map_with_path(
    lambda at, x: 0 * x if at[-1].key == "bias" else x, dream.params
  )
  dream = dataclasses.replace(dream, params=params)
  causal = np.tri(a["input_ids"].shape[1], dtype=bool)[None]
  assert_allclose(
    model.logits(a["input_ids"]),
    dream.logits(a["input_ids"], causal),
    atol=1e-5,
  )
