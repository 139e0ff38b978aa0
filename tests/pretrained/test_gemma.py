"""DiffusionGemma's network and weights, against transformers' arrays."""

import dataclasses
import functools
import os
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose
import pytest

from dllm_jax.core.mask import Causal, Full
from dllm_jax.core.types import ModelInputs
from dllm_jax.core.vocabulary import mean_embedding, reduce
from dllm_jax.models import layers
from dllm_jax.parallel import make_mesh
from dllm_jax.parallel.sharding import shardings
from dllm_jax.pretrained import load_pretrained, save_pretrained
from dllm_jax.pretrained.fields import Fields
from dllm_jax.pretrained.networks import gemma as network_of
from tests import golden_cases
from tests.pretrained.golden import publish
from tests.sampling import published

NAME = "diffusion_gemma_logits"


@functools.cache
def case():
  return golden_cases.load(NAME)


def inputs(tokens, mask, *, first=0, real=None, **more):
  """Returns a pass's inputs from some slot on, positions as slots."""
  rows, length = tokens.shape
  slots = jnp.broadcast_to(jnp.arange(length) + first, tokens.shape)
  real = np.ones(tokens.shape, np.int32) if real is None else real
  return ModelInputs(
    latent=jnp.asarray(tokens),
    positions=slots,
    segment_ids=jnp.asarray(real, jnp.int32),
    mask=mask,
    slot=jnp.full(rows, first),
    **more,
  )


@functools.cache
def program():
  """Returns the four passes of a recorded row, through a cache.

  The prompt, its canvas, that canvas as text, and the next one.
  """
  model, a = published.model(NAME), case().arrays
  apply, width = model.denoiser.apply, a["canvas_ids"].shape[1]

  @jax.jit
  def run(params, prompt, real, said):
    rows, length = prompt.shape
    cache = model.denoiser.cache(rows, length + 2 * width)
    text = inputs(prompt, Causal(), real=real)
    text, cache = apply(params, text, cache)
    told = lambda first, x, cache: apply(
      params,
      inputs(x, Full(), first=first, self_conditioning=said),
      cache,
    )[0]
    first = told(length, a["canvas_ids"], cache)
    more = inputs(a["commit_ids"], Causal(), first=length)
    more, after = apply(params, more, cache)
    second = told(length + width, a["canvas2_ids"], after)
    logits = lambda out: reduce(lambda x: x, out)
    return text.hidden, more.hidden, logits(first), logits(second), cache, after

  return functools.partial(run, model.params)


def nothing():
  a = case().arrays
  width = case().config["hf_config"]["text_config"]["hidden_size"]
  return jnp.zeros((*a["canvas_ids"].shape, width))


def said(logits):
  model, tokens = published.model(NAME), case().arrays["prompt_ids"]
  text = inputs(tokens, Full())
  out = jax.eval_shape(
    lambda p: model.denoiser.apply(p, text, None)[0], model.params
  )
  table = model.params["embed"]["embedding"]
  out = out.replace(unembed=table.T)
  return mean_embedding(out)(jax.nn.softmax(jnp.asarray(logits)))


@pytest.mark.all
def test_logits_of_every_pass():
  a = case().arrays
  real = np.ones(a["prompt_ids"].shape, np.int32)
  text, more, first, second, *_ = program()(a["prompt_ids"], real, nothing())
  assert_allclose(text, a["enc_last_hidden"], atol=1e-4)
  assert_allclose(more, a["enc2_last_hidden"], atol=1e-4)
  assert_allclose(first, a["logits"], atol=1e-4)
  assert_allclose(second, a["logits2"], atol=1e-4)


@pytest.mark.all
def test_logits_told_what_was_said():
  a = case().arrays
  real = np.ones(a["prompt_ids"].shape, np.int32)
  run = lambda x: program()(a["prompt_ids"], real, x)[2:4]
  first, second = run(said(a["sc_input"]))
  assert_allclose(first, a["sc_logits"], atol=1e-4)
  assert_allclose(second, a["sc_logits2"], atol=1e-4)
  some = jnp.where(a["sc_mask"][:, None, None], said(a["sc_input"]), 0)
  assert_allclose(run(some)[0], a["sc_masked_logits"], atol=1e-4)
  flat = said(jnp.zeros_like(a["sc_input"]))
  assert_allclose(run(flat)[0], a["sc_zero_logits"], atol=1e-4)


@pytest.mark.parametrize(
  "side", [pytest.param("lp", marks=pytest.mark.all), "rp"]
)
@pytest.mark.all
def test_padding(side):
  a = case().arrays
  prompt, real = a[f"{side}_prompt_ids"], a[f"{side}_attention_mask"]
  _, _, first, second, *_ = program()(prompt, real, nothing())
  assert_allclose(first, a[f"{side}_logits"], atol=1e-4)
  assert_allclose(second, a[f"{side}_logits2"], atol=1e-4)


@pytest.mark.all
def test_layers_that_lie_apart_are_those_of_the_stack():
  a, run = case().arrays, program()
  args = a["prompt_ids"], np.ones(a["prompt_ids"].shape, np.int32), nothing()
  (params,) = run.args
  jax.tree.map(
    functools.partial(assert_allclose, atol=2e-5),
    run.func(layers.apart(params), *args),
    run(*args),
  )


@pytest.mark.all
def test_cache_keeps_the_window():
  a = case().arrays
  real = np.ones(a["prompt_ids"].shape, np.int32)
  *_, cache, after = program()(a["prompt_ids"], real, nothing())
  window = case().config["hf_config"]["text_config"]["sliding_window"]
  for name, kept in (("cache", cache), ("cache2", after)):
    for part in ("key", "value"):
      sliding, full = getattr(kept, part)[0][0], getattr(kept, part)[-1][0]
      assert sliding.shape[2] == window - 1
      order = np.argsort(np.asarray(kept.slots), axis=1)[:, None, :, None]
      sliding = np.take_along_axis(np.asarray(sliding), order, axis=2)
      want = a[f"{name}_{part[0]}_sliding"]
      assert_allclose(sliding[..., : want.shape[3]], want, atol=1e-4)
      want = a[f"{name}_{part[0]}_full"]
      assert_allclose(full[:, :, : want.shape[2]], want, atol=1e-4)


@pytest.mark.all
def test_alone():
  """Rows with prompts of their own lengths are those alone, as are padded ones."""
  model, a = published.model(NAME), case().arrays
  prompt, canvas = a["prompt_ids"], a["canvas_ids"]
  width, lengths = canvas.shape[1], np.array([prompt.shape[1], 5])
  apply, slots = model.denoiser.apply, prompt.shape[1] + width

  def of(rows, size, starts):
    cache = model.denoiser.cache(len(rows), slots)
    real = np.arange(size) < starts[:, None]
    text = inputs(prompt[rows, :size], Causal(), real=real)
    cache = apply(model.params, text.replace(slot=None), cache)[1]
    own = inputs(canvas[rows], Full())
    places = starts[:, None] + np.arange(width)
    own = own.replace(slot=jnp.asarray(starts), positions=jnp.asarray(places))
    return reduce(lambda x: x, apply(model.params, own, cache)[0])

  both = of(np.array([0, 1]), prompt.shape[1], lengths)
  for row, length in enumerate(lengths):
    alone = of(np.array([row]), length, np.array([length]))
    assert_allclose(both[row], alone[0], atol=5e-5)


def without_cache(config, params, apply):
  """Returns logits of a canvas, and their gradient, over text read before."""
  a = case().arrays
  length = 8
  prompt = np.tile(a["prompt_ids"][:, :length], (4, 1))
  canvas = np.tile(a["canvas_ids"], (4, 1))

  def logits(params):
    text = apply(params, inputs(prompt, Causal()), None)[0]
    told = inputs(canvas, Full(), first=length, past=text.past)
    return reduce(lambda x: x, apply(params, told, None)[0])

  loss = lambda params: jnp.mean(jnp.square(logits(params)))
  return jax.jit(lambda p: (logits(p), jax.grad(loss)(p)))(params)


@pytest.mark.all
def test_past_is_what_a_cache_holds():
  model, a = published.model(NAME), case().arrays
  length = a["prompt_ids"].shape[1]

  @jax.jit
  def run(params):
    text = inputs(a["prompt_ids"], Causal())
    text = model.denoiser.apply(params, text, None)[0]
    told = inputs(a["canvas_ids"], Full(), first=length, past=text.past)
    return reduce(lambda x: x, model.denoiser.apply(params, told, None)[0])

  assert_allclose(run(model.params), a["logits"], atol=1e-4)


MESHES = [
  {"data": 8},
  {"fsdp": 4, "tensor": 2},
  {"expert": 4, "context": 2},
  {"fsdp": 2, "tensor": 2, "expert": 2},
]


@pytest.mark.all
@pytest.mark.parametrize("sizes", MESHES)
def test_meshes(sizes):
  model = published.model(NAME)
  # One head of keys cannot be divided: two that are alike are the same.
  config = dataclasses.replace(model.config, full_kv_heads=2)
  twice = lambda path, x: (
    jnp.repeat(x, 2, axis=2)
    if jax.tree_util.keystr(path, simple=True, separator="/").endswith(
      "run1/layers/attention/k/kernel"
    )
    else x
  )
  params = jax.tree_util.tree_map_with_path(twice, model.params)
  apply = model.family.table.network(config).apply
  want = without_cache(config, params, apply)
  mesh = make_mesh({"data": 1} | sizes)
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, shardings(params, mesh))
    found = without_cache(config, placed, apply)
  # Each is within 2e-5 of float64's, as the recorded logits are.
  assert_allclose(found[0], want[0], atol=5e-5)
  close = lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=2e-5)
  jax.tree.map(close, found[1], want[1])


# ---------------------------------------------------------------- weights


def tensors(folder):
  from safetensors.numpy import load_file

  found = load_file(folder / "model.safetensors")
  return {name: (x.dtype, x.shape, x.tobytes()) for name, x in found.items()}


@pytest.mark.all
def test_export_is_what_was_imported(tmp_path):
  first = publish(NAME, tmp_path / "first")
  model = published.model(NAME)
  model = dataclasses.replace(load_pretrained(first), params=model.params)
  save_pretrained(model, tmp_path / "second")
  assert tensors(tmp_path / "second") == tensors(first)
  again = load_pretrained(tmp_path / "second")
  jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_both_ways_of_writing_a_config():
  one, other = (
    network_of(Fields(case().config[key], "config.json"))
    for key in ("hf_config", "hf_config_5_24")
  )
  assert one == other


@pytest.mark.all
def test_scalars_of_the_text_pass():
  model, a = published.model(NAME), case().arrays
  params = jax.tree.map(lambda x: x, model.params)
  for run in model.config.runs:
    stack = params["period"][run.name.removeprefix("period/")]["layers"]
    stack["text_scale"] = a["encoder_layer_scalar"][list(run.numbers), None]
  real = np.ones(a["prompt_ids"].shape, np.int32)
  first = program().func(params, a["prompt_ids"], real, nothing())[2]
  assert_allclose(first, a["scalar_logits"], atol=1e-4)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"layer_types": ["sliding_attention", "chunked_attention"]}, "chunked"),
    ({"use_bidirectional_attention": "all"}, "'vision'"),
    ({"per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config"),
    ({"unheard": 3}, "unheard"),
  ],
)
def test_configs_that_are_refused(changes, words, tmp_path):
  text = case().config["hf_config"]["text_config"] | changes
  folder = publish(NAME, tmp_path, text_config=text)
  with pytest.raises(ValueError, match=words):
    load_pretrained(folder)


def test_plain_gemma_is_refused_by_name(tmp_path):
  folder = publish(
    NAME, tmp_path, model_type="gemma4", architectures=["Gemma4ForCausalLM"]
  )
  with pytest.raises(ValueError, match="autoregressive Gemma"):
    load_pretrained(folder)


_SCRIPT = """
import sys, numpy as np, torch
from transformers import DiffusionGemmaForBlockDiffusion as Model
logits = []
a = np.load(sys.argv[1])
for folder in sys.argv[2:]:
  model, info = Model.from_pretrained(folder, output_loading_info=True)
  assert not info["missing_keys"] and not info["unexpected_keys"], info
  ids = lambda name: torch.tensor(a[name], dtype=torch.long)
  with torch.no_grad():
    out = model.eval()(
      input_ids=ids("prompt_ids"), decoder_input_ids=ids("canvas_ids")
    )
  logits.append(out.logits.numpy())
assert np.array_equal(logits[0], logits[1]), np.abs(logits[0] - logits[1]).max()
assert np.abs(logits[0] - a["logits"]).max() < 1e-4
"""


@pytest.mark.all
@pytest.mark.parametrize("style", ["hf_config", "hf_config_5_24"])
def test_transformers_reads_an_export(style, tmp_path):
  """`DLLM_TRANSFORMERS` is a Python that has transformers 5.24.0."""
  python = os.environ.get("DLLM_TRANSFORMERS")
  if not python:
    pytest.skip("DLLM_TRANSFORMERS names no Python with transformers 5.24.0")
  first = publish(NAME, tmp_path / "first", **case().config[style])
  save_pretrained(load_pretrained(first), tmp_path / "second")
  clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
  arrays = golden_cases.ROOT / NAME / "io.npz"
  script = [python, "-c", _SCRIPT, arrays, first, tmp_path / "second"]
  subprocess.run(script, check=True, env=clean)
