"""The image tokenizer against the original: `golden/magvit2`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dllm_jax.core.images import lookup_free
from dllm_jax.models.image_tokenizer import (
  decode,
  features,
  ImageTokenizerConfig,
)
from dllm_jax.pretrained.layouts import magvit2
from tests import golden_cases

TOLERANCE = dict(atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def case():
  return golden_cases.load("magvit2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The published folder's form: widths are in no config."""
  made = tmp_path_factory.mktemp("magvit2")
  save_file(golden_cases.weights("magvit2"), made / magvit2.WEIGHTS)
  (made / "config.json").write_text('{"_class_name": "MAGVITv2"}')
  return made


@pytest.fixture(scope="module")
def tokenizer(folder):
  return magvit2.read(folder)


def last(x):
  """Returns NCHW as NHWC."""
  return np.moveaxis(x, 1, -1)


def looked(tokenizer, pixels):
  run = functools.partial(features, tokenizer.config)
  return jax.jit(run)(tokenizer.params, last(pixels))


@pytest.mark.parametrize(
  "name",
  [
    "odd",
    *(pytest.param(n, marks=pytest.mark.all) for n in ("r0", "r1", "flat")),
  ],
)
def test_features_and_ids(case, tokenizer, name):
  if f"{name}_features" not in case.arrays:
    pytest.skip("not in this set")
  z = looked(tokenizer, case.arrays[f"{name}_pixels"])
  np.testing.assert_allclose(
    z, last(case.arrays[f"{name}_features"]), **TOLERANCE
  )
  ids = np.asarray(lookup_free.ids(z)).reshape(len(z), -1)
  np.testing.assert_array_equal(ids, case.arrays[f"{name}_ids"])


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.all
def test_pixels(case, tokenizer, which):
  one = case.config["resolutions"][which]
  name, grid = one["name"], tuple(one["grid"])
  ids = case.arrays[f"{name}_decode_ids"]
  run = jax.jit(functools.partial(decode, tokenizer.config))
  shown = run(tokenizer.params, ids.reshape(-1, *grid))
  expected = last(case.arrays[f"{name}_decoded"])
  np.testing.assert_allclose(shown, expected, **TOLERANCE)
  again = run(tokenizer.params, case.arrays[f"{name}_ids"].reshape(-1, *grid))
  expected = last(case.arrays[f"{name}_reconstructed"])
  np.testing.assert_allclose(again, expected, **TOLERANCE)
  pixels = tokenizer.decode(ids, grid).astype(int)
  off = np.abs(pixels - case.arrays[f"{name}_decoded_uint8"])
  assert off.max() <= 1 and np.mean(off > 0) < 1e-3


def test_protocol_encodes(case, tokenizer):
  pixels = last(case.arrays["r1_pixels"])
  np.testing.assert_array_equal(tokenizer.encode(pixels), case.arrays["r1_ids"])
  with pytest.raises(ValueError, match=r"40 x 24 .* multiple of 16"):
    tokenizer.encode(np.zeros((1, 24, 40, 3)))


def test_quantiser(case):
  z = last(case.arrays["quant_z"])
  np.testing.assert_array_equal(
    np.moveaxis(lookup_free.code(z), -1, 1),
    np.round(case.arrays["quant_codes"]),
  )
  np.testing.assert_allclose(
    np.moveaxis(lookup_free.straight_through(z), -1, 1),
    case.arrays["quant_codes"],
    atol=1e-6,
  )
  ids = np.asarray(lookup_free.ids(z))
  np.testing.assert_array_equal(ids, case.arrays["quant_ids"][:, 0])
  bits = z.shape[-1]
  np.testing.assert_array_equal(
    lookup_free.code_of(ids, bits), lookup_free.code(z)
  )


def test_quantiser_losses_and_gradients(case):
  z, said = jnp.asarray(last(case.arrays["quant_z"])), case.config["quantizer"]
  loss = lambda z: lookup_free.terms(z, beta=said["beta"])
  weights = said["commit_loss_multiplier"], said["entropy_multiplier"]
  names = "quantizer_loss", "entropy_loss"
  for i, (name, weight) in enumerate(zip(names, weights, strict=True)):
    value, grad = jax.value_and_grad(lambda z: weight * loss(z)[i])(z)
    np.testing.assert_allclose(value, case.arrays[name], rtol=1e-5)
    expected = last(case.arrays[f"{name}_grad"])
    np.testing.assert_allclose(grad, expected, atol=1e-7)
  cotangent = last(case.arrays["straight_through_cotangent"])
  grad = jax.grad(
    lambda z: jnp.sum(lookup_free.straight_through(z) * cotangent)
  )(z)
  expected = last(case.arrays["straight_through_grad"])
  np.testing.assert_allclose(grad, expected, atol=1e-6)


def test_import_export_import(folder, tokenizer, tmp_path):
  """Tensors go out as they came in, buffers too, and the files are equal."""
  magvit2.write(tmp_path / "out", tokenizer)
  found = load_file(tmp_path / "out" / magvit2.WEIGHTS)
  expected = load_file(folder / magvit2.WEIGHTS)
  assert found.keys() == expected.keys()
  for name, tensor in expected.items():
    assert found[name].dtype == tensor.dtype, name
    np.testing.assert_array_equal(found[name], tensor, err_msg=name)
  magvit2.write(tmp_path / "again", magvit2.read(tmp_path / "out"))
  for name in (magvit2.WEIGHTS, "config.json"):
    one, other = (tmp_path / f / name for f in ("out", "again"))
    assert one.read_bytes() == other.read_bytes()


def test_folders_that_are_none(tmp_path):
  with pytest.raises(FileNotFoundError, match="give the folder"):
    magvit2.read(tmp_path / "none")
  save_file({"a": np.zeros(1, np.float32)}, tmp_path / magvit2.WEIGHTS)
  with pytest.raises(ValueError, match="lacks tensor encoder"):
    magvit2.read(tmp_path)


def test_defaults_are_the_published_shape(case):
  shapes = {n: tuple(s) for n, s in case.config["full"]["tensors"].items()}
  assert magvit2.shape_of(shapes) == ImageTokenizerConfig()


@pytest.mark.all
def test_full_width(case):
  """The published width, by the recipe of its weights."""
  full = case.config["full"]
  names = sorted(n for n in full["tensors"] if not n.startswith("quantize."))
  tensors = {}
  for k, name in enumerate(names):
    shape = full["tensors"][name]
    raw = np.random.PCG64([full["seed"], k]).random_raw(int(np.prod(shape)))
    v = ((raw >> np.uint64(40)) / 2**23 - 1.0).reshape(shape)
    norm = "norm" in name.split(".")[-2]
    if name.endswith("bias"):
      v = (0.2 if norm else 0.1) * v
    elif norm:
      v = 1 + 0.3 * v
    else:
      v = v * np.sqrt(3 / np.prod(shape[1:]))
    tensors[name] = v.astype(np.float32)
  for name, total in full["weight_sums"].items():
    np.testing.assert_allclose(tensors[name].sum(dtype=np.float64), total)
  assert sum(t.size for t in tensors.values()) == full["parameters"]
  shapes = {n: t.shape for n, t in tensors.items()}
  made = magvit2.MagvitTokenizer(
    magvit2.shape_of(shapes), magvit2.to_ours(tensors)
  )
  z = looked(made, case.arrays["full_pixels"])
  np.testing.assert_allclose(z, last(case.arrays["full_features"]), **TOLERANCE)
  grid = (full["height"] // 16, full["width"] // 16)
  ids = case.arrays["full_decode_ids"].reshape(-1, *grid)
  run = jax.jit(functools.partial(decode, made.config))
  shown = run(made.params, ids)
  expected = last(case.arrays["full_decoded"])
  np.testing.assert_allclose(shown, expected, **TOLERANCE)
