"""What conversion refuses, and layouts without a recorded case."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest

from dllm_jax.models import DiTConfig
from dllm_jax.pretrained import convert, DIT, Source, to_ours, to_theirs
from dllm_jax.pretrained.table import flatten

CONFIG = DiTConfig(
  vocab_size=7, width=8, layers=2, heads=2, cond_dim=4, vocab_multiple=4
)


def tensors(config=CONFIG):
  """Returns random published tensors of a config."""
  rng = np.random.default_rng(0)
  width, c = config.width, config.cond_dim
  shapes = {
    "vocab_embed.embedding": (7, width),
    "output_layer.norm_final.weight": (width,),
    "output_layer.linear.weight": (7, width),
    "output_layer.linear.bias": (7,),
  }
  for i in range(config.layers):
    block = {
      "norm1.weight": (width,),
      "attn_qkv.weight": (3 * width, width),
      "attn_out.weight": (width, width),
      "norm2.weight": (width,),
      "mlp.0.weight": (4 * width, width),
      "mlp.0.bias": (4 * width,),
      "mlp.2.weight": (width, 4 * width),
      "mlp.2.bias": (width,),
    }
    if config.adaptive:
      block["adaLN_modulation.weight"] = (6 * width, c)
      block["adaLN_modulation.bias"] = (6 * width,)
    shapes.update({f"blocks.{i}.{key}": value for key, value in block.items()})
  if config.adaptive:
    shapes |= {
      "sigma_map.mlp.0.weight": (c, 256),
      "sigma_map.mlp.0.bias": (c,),
      "sigma_map.mlp.2.weight": (c, c),
      "sigma_map.mlp.2.bias": (c,),
      "output_layer.adaLN_modulation.weight": (2 * width, c),
      "output_layer.adaLN_modulation.bias": (2 * width,),
    }
  made = {
    key: rng.normal(size=shape).astype(np.float32)
    for key, shape in shapes.items()
  }
  if config.tied:
    made["output_layer.linear.weight"] = made["vocab_embed.embedding"]
  return made


def test_layouts_by_hand():
  theirs = tensors()
  ours = to_ours(DIT, theirs, CONFIG).params
  qkv = theirs["blocks.1.attn_qkv.weight"].reshape(3, 2, 4, 8)  # three h d in
  v = ours["layers"]["attention"]["v"]["kernel"]
  np.testing.assert_array_equal(v[1], qkv[2].transpose(2, 0, 1))
  out = theirs["blocks.0.attn_out.weight"].reshape(8, 2, 4)  # out h d
  o = ours["layers"]["attention"]["o"]["kernel"]
  np.testing.assert_array_equal(o[0], out.transpose(1, 2, 0))
  embedding = ours["embed"]["embedding"]
  assert embedding.shape == (8, 8) and not embedding[7].any()
  assert ours["unembed"]["kernel"].shape == (8, 8)


@pytest.mark.parametrize("change", [
    {}, {"tied": True}, {"adaptive": False}, {"adaptive": False, "tied": True}
], ids=str)  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_round_trips(change, prefix):
  config = dataclasses.replace(CONFIG, **change)
  theirs = {prefix + k: v for k, v in tensors(config).items()}
  there = to_ours(DIT, theirs, config)
  back = to_theirs(DIT, there.params, config, source=there.source)
  assert set(back) == set(theirs)
  for key, tensor in theirs.items():
    np.testing.assert_array_equal(back[key].make(), tensor)
  fresh = to_theirs(DIT, there.params, config, source=Source(prefix))
  assert set(fresh) == set(theirs) | {prefix + "rotary_emb.inv_freq"}


def without(name):
  return lambda t: t.pop(name)


def put(name, value):
  return lambda t: t.update({name: value})


@pytest.mark.parametrize("spoil, message", [
    (without("blocks.1.norm2.weight"), "blocks.1.norm2.weight is missing, which"
     " parameter layers/mlp_norm/scale needs"),
    (put("blocks.2.norm1.weight", np.ones(8)), "blocks.2.norm1.weight has no place"),
    (put("vocab_embed.embedding", np.ones((9, 8))), r"shape \(9, 8\), .* \(7, 8\)"),
    (put("blocks.0.attn_qkv.weight", np.ones((16, 8))), r"gives \(24, 8\)"),
    (put("rotary_emb.inv_freq", np.ones(2)), "does not follow from the config"),
])  # fmt: skip
def test_tensors_that_do_not_fit(spoil, message):
  theirs = tensors()
  spoil(theirs)
  with pytest.raises(ValueError, match=message) as error:
    to_ours(DIT, theirs, CONFIG)
  assert "\n" not in str(error.value)


def test_tied_weights_must_agree():
  config = dataclasses.replace(CONFIG, tied=True)
  theirs = tensors(config)
  theirs["output_layer.linear.weight"] = theirs["vocab_embed.embedding"] + 1
  with pytest.raises(ValueError, match="but the config ties them"):
    to_ours(DIT, theirs, config)


def test_parameters_that_do_not_fit():
  params = to_ours(DIT, tensors(), CONFIG).params
  del params["final_norm"]
  with pytest.raises(
    ValueError, match="final_norm/scale must be .* not absent"
  ):
    to_theirs(DIT, params, CONFIG)


def test_regions_are_read_by_parts():
  theirs = tensors()
  whole = flatten(to_ours(DIT, theirs, CONFIG).params)

  def halves(region):
    parts = []
    for axis, size in enumerate(region.shape):
      for part in (slice(0, size // 2), slice(size // 2, size)):
        index = [slice(None)] * len(region.shape)
        index[axis] = part
        parts.append((tuple(index), region.read(tuple(index))))
    return parts

  read = to_ours(DIT, theirs, CONFIG, place=lambda r: (r.path, halves(r)))
  is_pair = lambda x: isinstance(x, tuple)
  for path, parts in jax.tree.leaves(read.params, is_leaf=is_pair):
    for index, part in parts:
      np.testing.assert_array_equal(part, whole[path][index])


def test_other_types():
  params = to_ours(DIT, tensors(), CONFIG, dtype=ml_dtypes.bfloat16).params
  assert {x.dtype for x in jax.tree.leaves(params)} == {
    np.dtype(ml_dtypes.bfloat16)
  }


@pytest.mark.parametrize("threads", [1, 2, 3, 50])
def test_parts_of_matrices_are_read_side_by_side(threads, monkeypatch):
  """Those that are not stacked, too: each part lies together, and none is lost."""
  right = flatten(to_ours(DIT, tensors(), CONFIG).params)
  copied, copy = [], convert._copy

  def note(one, *args):
    copied.append(one.path)
    copy(one, *args)

  monkeypatch.setattr(convert, "_THREADS", threads)
  monkeypatch.setattr(convert, "_CHUNK_BYTES", 100)
  monkeypatch.setattr(convert, "_copy", note)
  found = flatten(to_ours(DIT, tensors(), CONFIG).params)
  for path, array in right.items():
    np.testing.assert_array_equal(found[path], array)
  assert copied.count("embed/embedding") == threads
  layered = copied.count("layers/attention/o/kernel")
  assert layered == 2 * -(-threads // 2)
