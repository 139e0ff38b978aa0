"""DiffusionGemma as google-deepmind/gemma saves it: names, axes and shape.

Its checkpoints are trees of arrays, nested as its modules are or with the modules'
paths as keys ("transformer/layer_0/attn/q_einsum"); a matrix is an array, or "w"
of one. After gemma at 7691fd4 (`gm/nn/gemma4`, `diffusion/_transformer.py`).
There are N heads, G of keys, K features of a head, F hidden ones, E experts:

    embedder/input_embedding              [V, D]
    self_conditioner/pre_norm/scale       [D]
    self_conditioner/ffw/gating_einsum    [2, F, D]    linear [F, D]
    layer_i/attn/q_einsum/w               [N, D, K]    attn_vec_einsum/w [N, K, D]
    layer_i/attn/kv_einsum/w              [2, G, D, K] k_einsum/w [G, D, K] if full
    layer_i/mlp2/gating_einsum            [2, F, D]    linear [F, D]
    layer_i/mlp/{gating_einsum,linear}/w  [E, 2, F, D] [E, F, D]
    layer_i/mlp/router_logits/w           [D, E]

`mlp` are the experts there and `mlp2` what all positions have, with norms to match;
one `skip_scale` a layer is both of the published scalars.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import re
from typing import Any
import warnings

import numpy as np

from dllm_jax.core.paths import Path
from dllm_jax.models import GemmaConfig
from dllm_jax.pretrained.layouts import gemma

Shapes = Mapping[str, tuple[int, ...]]

# What shapes do not say, as the one published model has it.
_WINDOW, _CHOSEN, _ENDS, _IMAGE = 1024, 8, (1, 106, 50), 258_880
# Parts that read pictures and sound, and what an older training left.
_OTHERS = re.compile(
  r"(vision_encoder|audio_encoder|distill_\w+)/.+|embedder/(mm|audio)_.+"
)
_NORMS = {
  "pre_attention_norm": "input_layernorm",
  "post_attention_norm": "post_attention_layernorm",
  "pre_ffw2_norm": "pre_feedforward_layernorm",
  "post_ffw2_norm": "post_feedforward_layernorm_1",
  "pre_ffw_norm": "pre_feedforward_layernorm_2",
  "post_ffw1_norm": "post_feedforward_layernorm_2",
  "post_ffw_norm": "post_feedforward_layernorm",
}
_DECODER, _TEXT = "model.decoder.", "model.encoder.language_model."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
  """A published tensor of a checkpoint.

  Attributes:
    name: its published name.
    source: the array that it is made of.
    shape: its shape.
    turn: the array to the tensor.
  """

  name: str
  source: str
  shape: tuple[int, ...]
  turn: Callable[[np.ndarray], np.ndarray] = dataclasses.field(repr=False)


def config(shapes: Shapes, folder: Path) -> dict[str, Any]:
  """Returns the `config.json` of a checkpoint, by its arrays' shapes.

  Raises:
    ValueError: they are not those of DiffusionGemma.
  """
  own = _named(shapes, folder)
  found = {name: shapes[key] for name, key in own.items()}
  layers = len({name.partition("/")[0] for name in found if "layer_" in name})
  full = [i for i in range(layers) if f"layer_{i}/attn/k_einsum" in found]
  of = lambda i, name: found[f"layer_{i}/{name}"]
  vocabulary, width = found["embedder/input_embedding"]
  heads, _, features = of(0, "attn/q_einsum")
  network = GemmaConfig(
    vocab_size=vocabulary,
    width=width,
    layers=layers,
    heads=heads,
    kv_heads=of(0, "attn/kv_einsum")[1],
    head_dim=features,
    full_layers=tuple(full),
    full_kv_heads=of(full[0], "attn/k_einsum")[0] if full else None,
    full_head_dim=of(full[0], "attn/k_einsum")[2] if full else None,
    window=_WINDOW,
    mlp_dim=of(0, "mlp2/gating_einsum")[1],
    experts=of(0, "mlp/gating_einsum")[0],
    experts_per_token=_CHOSEN,
    expert_dim=of(0, "mlp/gating_einsum")[2],
  )
  (family,) = gemma.FAMILIES
  ids = {"image_token_id": _IMAGE, "bos_token_id": 2, "pad_token_id": 0}
  return gemma.described(network) | {
    "model_type": family.model_types[0],
    "architectures": list(family.architectures),
    "canvas_length": 256,
    "eos_token_id": [one for one in _ENDS if one < vocabulary],
    **{name: one for name, one in ids.items() if one < vocabulary},
  }


def tensors(shapes: Shapes, folder: Path) -> Iterator[Tensor]:
  """Yields the published tensors of a checkpoint.

  Raises:
    ValueError: its arrays are not those of DiffusionGemma.
  """
  own = _named(shapes, folder)
  left = dict(own)
  for name, key in own.items():
    for theirs, turn in _published(name):
      left.pop(name, None)
      # Shapes of what is made, without an array.
      empty = np.broadcast_to(np.int8(0), shapes[key])
      shape = turn(empty).shape
      yield Tensor(name=theirs, source=key, shape=shape, turn=turn)
  if left:
    raise ValueError(
      f"{folder}: array {next(iter(left.values()))} has no place in"
      " DiffusionGemma; save the network's own parameters alone"
    )


def _named(shapes: Shapes, folder: Path) -> dict[str, str]:
  """Returns the keys of a checkpoint by the names of one that is nested."""
  found = {
    key.removeprefix("transformer/").removesuffix("/w"): key for key in shapes
  }
  if any("stacked_layers/" in name for name in found):
    raise ValueError(
      f"{folder} has its layers stacked: load it with gemma's ckpts.load_params"
      " and save what that returns with ckpts.save_params"
    )
  others = [name for name in found if _OTHERS.fullmatch(name)]
  if others:
    warnings.warn(
      f"{folder}: {len(others)} arrays ({others[0]}, ...) do not read text and are"
      " left out, of an export too",
      stacklevel=2,
    )
  own = {k: key for k, key in found.items() if k not in others}
  needed = ("embedder/input_embedding", "self_conditioner/pre_norm/scale",
            "layer_0/attn/q_einsum", "layer_0/attn/kv_einsum",
            "layer_0/mlp2/gating_einsum", "layer_0/mlp/gating_einsum")  # fmt: skip
  for name in needed:
    if name not in own:
      what = "an autoregressive Gemma" if "layer_0" in str(own) else "no Gemma"
      raise ValueError(
        f"{folder} was written by Orbax and holds {what}: array {name} is missing;"
        " give DiffusionGemma's checkpoint, or a folder with config.json and"
        " safetensors"
      )
  return own


_Turn = Callable[[np.ndarray], np.ndarray]


def _published(name: str) -> list[tuple[str, _Turn]]:
  """Returns the tensors that an array holds, and how it becomes each."""
  same = lambda x: x
  whole = {
    "embedder/input_embedding": "embed_tokens.weight",
    "final_norm/scale": "norm.weight",
    "self_conditioner/pre_norm/scale": "self_conditioning.pre_norm.weight",
  }
  if name in whole:
    return [(_DECODER + whole[name], same)]
  if name.startswith("self_conditioner/ffw/"):
    own = name.removeprefix("self_conditioner/ffw/")
    return _perceptron(_DECODER + "self_conditioning.", own)
  found = re.fullmatch(r"layer_(\d+)/(.+)", name)
  if not found:
    return []
  layer, own = f"layers.{found[1]}.", found[2]
  if own == "skip_scale":
    scalar = layer + "layer_scalar"
    return [(_DECODER + scalar, same), (_TEXT + scalar, same)]
  norm = _NORMS.get(own.removesuffix("/scale"))
  if norm:
    return [(f"{_DECODER}{layer}{norm}.weight", same)]
  part, _, own = own.partition("/")
  if part == "attn":
    return _attention(f"{_DECODER}{layer}self_attn.", own)
  if part == "mlp2":
    return _perceptron(f"{_DECODER}{layer}mlp.", own)
  return _experts(_DECODER + layer, own) if part == "mlp" else []


def _perceptron(where: str, own: str) -> list[tuple[str, _Turn]]:
  match own:
    case "gating_einsum":
      return [
        (where + "gate_proj.weight", lambda x: x[0]),
        (where + "up_proj.weight", lambda x: x[1]),
      ]
    case "linear":
      return [(where + "down_proj.weight", lambda x: x.T)]
  return []


def _attention(where: str, own: str) -> list[tuple[str, _Turn]]:
  # [heads, D, K] to [heads K, D].
  rows = lambda x: np.swapaxes(x, 1, 2).reshape(-1, x.shape[1])
  match own:
    case "q_einsum" | "k_einsum":
      return [(f"{where}{own[0]}_proj.weight", rows)]
    case "kv_einsum":
      return [
        (where + "k_proj.weight", lambda x: rows(x[0])),
        (where + "v_proj.weight", lambda x: rows(x[1])),
      ]
    case "query_norm/scale" | "key_norm/scale":
      return [(f"{where}{own[0]}_norm.weight", lambda x: x)]
    case "attn_vec_einsum":
      flat = lambda x: x.reshape(-1, x.shape[2]).T
      return [(where + "o_proj.weight", flat)]
  return []


def _experts(where: str, own: str) -> list[tuple[str, _Turn]]:
  fused = lambda x: x.reshape(x.shape[0], -1, x.shape[3])
  match own:
    case "router_logits":
      return [(where + "router.proj.weight", lambda x: x.T)]
    case "router_scale":
      return [(where + "router.scale", lambda x: x)]
    case "per_expert_scale":
      return [(where + "router.per_expert_scale", lambda x: x)]
    case "gating_einsum":
      return [(where + "experts.gate_up_proj", fused)]
    case "linear":
      return [(where + "experts.down_proj", lambda x: np.swapaxes(x, 1, 2))]
  return []
