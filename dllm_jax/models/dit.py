"""The DiT that MDLM, SEDD, BD3-LM and UDLM were published with.

A bidirectional transformer with weight-only LayerNorm, GELU perceptrons, rotary
positions and adaptive norms told sigma (arXiv:2406.07524, arXiv:2310.16834).
Two-stream inputs [z ; x0] carry each stream's own positions, so that both
halves rotate alike. What a published network does after its logits (SUBS, scaling by
sigma) is its objective's. Paths of the parameters, N layers stacked first:

    embed/embedding                [V, D]
    time/{hidden,out}/{kernel,bias}                 (adaptive)
    classes/embedding              [classes + 1, C] (num_classes; last = null)
    layers/attention_norm/scale    [N, D]
    layers/attention/{q,k,v}/kernel [N, D, H, K]
    layers/attention/o/kernel      [N, H, K, D]
    layers/mlp_norm/scale          [N, D]
    layers/mlp/up/{kernel,bias}    [N, D, F], [N, F]
    layers/mlp/down/{kernel,bias}  [N, F, D], [N, D]
    layers/modulation/{kernel,bias} [N, C, 6 D]     (adaptive)
    final_norm/scale               [D]
    final_modulation/{kernel,bias} [C, 2 D]         (adaptive)
    unembed/kernel                 [D, V]           (not tied)
    unembed/bias                   [V]

With `latent_dim` and `output_dim`, for objectives over vectors, `input/` and
`output/{kernel,bias}` take the places of `embed` and `unembed`.
"""

import dataclasses

from flax import linen as nn
import jax.numpy as jnp

from dllm_jax.core.types import Denoiser, KVCache, ModelInputs, ModelOutputs
from dllm_jax.models import layers
from dllm_jax.models.adapters import ADAPTERS, LoRA
from dllm_jax.models.attention.context import Strategy
from dllm_jax.models.attention.dispatch import (
  Implementation,
)
from dllm_jax.models.block import denoiser, layer_runs, Run, trunk
from dllm_jax.models.layers import LayerNorm, Linear, TimeEmbedding, Weight
from dllm_jax.models.perceptron import GeluMlp
from dllm_jax.models.quantised import Matmul
from dllm_jax.models.rotary import Unscaled
from dllm_jax.models.shape import Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig(Shape):
  """The shape and the arithmetic of a DiT; defaults are MDLM's 110M.

  Attributes:
    vocab_size: real tokens, the mask included.
    width: features of a position (D).
    layers: blocks (N).
    heads: attention heads (H), a divisor of width.
    mlp_dim: hidden features of the perceptron (F); None for 4 width.
    adaptive: adaLN-zero, told sigma; False for plain norms and no gates.
    cond_dim: features of sigma and class (C).
    num_classes: class labels that `cond` may name, num_classes itself being the
      null label; 0 for none.
    tied: the unembedding is the embedding.
    latent_dim: features of vector inputs; None for tokens.
    output_dim: features of vector outputs; None for logits.
    dropout: rate on the output of each branch while it is trained.
    norm_eps: added to variances.
    rope_theta: base of the rotary wavelengths.
    vocab_multiple: the vocabulary is padded to a multiple of this.
    dtype: of activations, "float32" or "bfloat16".
    param_dtype: of stored parameters, "float32" or "bfloat16".
    remat: what a layer keeps for its backward pass (`layers.REMAT`).
    unroll: layers to a step of the scan.
    attention: implementation (`attention.IMPLEMENTATIONS`).
    context: how attention meets the keys of other devices where the mesh divides
      positions, "all_gather" or "ring" (`context.STRATEGIES`).
    matmul: how layers multiply by their matrices, "default" (in `dtype`), "int8"
      or "fp8" (`quantised`).
    adapter: low-rank changes of the matrices of attention and perceptrons, "lora"
      or "dora" with their fields (`adapters`), which are then all that trains.
  """

  vocab_size: int
  width: int = 768
  layers: int = 12
  heads: int = 12
  mlp_dim: int | None = None
  adaptive: bool = True
  cond_dim: int = 128
  num_classes: int = 0
  tied: bool = False
  latent_dim: int | None = None
  output_dim: int | None = None
  dropout: float = 0.0
  norm_eps: float = 1e-5
  rope_theta: float = 10_000.0
  vocab_multiple: int = 128
  dtype: str = "float32"
  param_dtype: str = "float32"
  remat: str = "none"
  unroll: int = 1
  attention: Implementation = None
  context: Strategy = "all_gather"
  matmul: Matmul = "default"
  adapter: LoRA = dataclasses.field(
    default=LoRA(), metadata={"choices": ADAPTERS}
  )

  def __post_init__(self):
    layers.check_at_least(
        self, 1, "vocab_size", "width", "layers", "heads", "mlp_dim",
        "cond_dim", "latent_dim", "output_dim", "vocab_multiple", "unroll",
    )  # fmt: skip
    if self.width % (2 * self.heads):
      raise ValueError(
        f"width {self.width} must be a multiple of twice the heads"
        f" {self.heads}, so that a head's features pair up"
      )
    if self.num_classes and not self.adaptive:
      raise ValueError(
        "num_classes needs adaptive=True: labels enter by adaptive norms"
      )
    self.check_common()
    object.__setattr__(self, "mlp_dim", self.mlp_dim or 4 * self.width)

  qk_norm = False
  qkv_bias = False
  rope_scaling = Unscaled()

  @property
  def conditioned(self) -> bool:
    """Whether the network is told the time."""
    return self.adaptive

  @property
  def kv_heads(self) -> int:
    """Key and value heads: as many as query heads."""
    return self.heads

  @property
  def head_dim(self) -> int:
    """Features of a head."""
    return self.width // self.heads

  @property
  def rotary_dim(self) -> int:
    """Rotated features of a head: all."""
    return self.head_dim

  @property
  def runs(self) -> tuple[Run, ...]:
    """The stacks of layers: one."""
    return layer_runs([False] * self.layers)


def dit(config: DiTConfig) -> Denoiser:
  """Returns the network as `(init, apply)`.

  `conditioning` is sigma; absent, it is 0 and still goes through its map, as in
  networks published without time conditioning. An absent `cond` adds nothing,
  unlike the null label.
  """
  return denoiser(_DiT(config), config.param_dtype)


class _DiT(nn.Module):
  config: DiTConfig
  apart: bool = False

  @nn.compact
  def __call__(self, inputs: ModelInputs, cache: KVCache | None):
    c = self.config
    x, embedding = self._embed(inputs.latent)
    x, cache, _ = trunk(
      c,
      x,
      inputs,
      cache,
      self._conditioning(inputs),
      norm=LayerNorm,
      mlp=GeluMlp,
      apart=self.apart,
    )
    if c.output_dim is not None:
      linear = Linear((c.width,), (c.output_dim,), bias=True, name="output")
      return ModelOutputs(hidden=linear(x)), cache
    kernel, bias = _Unembed(c, name="unembed")()
    out = ModelOutputs(
      hidden=x,
      unembed=embedding.T if c.tied else kernel,
      bias=bias,
      vocab_size=c.vocab_size,
      tied=c.tied,
    )
    return out, cache

  def _embed(self, latent):
    c = self.config
    if latent.ndim != (2 if c.latent_dim is None else 3):
      raise ValueError(
        f"a DiT with latent_dim {c.latent_dim} takes"
        f" {'tokens [B, T]' if c.latent_dim is None else 'vectors [B, T, E]'},"
        f" not {latent.shape}"
      )
    if c.latent_dim is not None:
      linear = Linear((c.latent_dim,), (c.width,), bias=True, name="input")
      return linear(latent), None
    shape = (c.padded_vocab, c.width)
    embedding = Weight("embedding", shape, name="embed")()
    return layers.lookup(embedding, latent), embedding

  def _conditioning(self, inputs):
    c = self.config
    if not c.adaptive:
      return None
    sigma = inputs.conditioning
    if sigma is None:
      sigma = jnp.zeros((inputs.latent.shape[0], 1))
    total = nn.silu(TimeEmbedding(c.cond_dim, name="time")(sigma))
    if c.num_classes:
      shape = (c.num_classes + 1, c.cond_dim)
      table = Weight("embedding", shape, name="classes")()
      if inputs.cond is not None:
        total += nn.silu(table[inputs.cond])[:, None]
    return total


class _Unembed(nn.Module):
  """The kernel, unless it is tied, and the logits' bias; zero at first."""

  config: DiTConfig

  @nn.compact
  def __call__(self):
    c = self.config
    zeros = nn.initializers.zeros
    bias = self.param("bias", zeros, (c.padded_vocab,))
    if c.tied:
      return None, bias
    return self.param("kernel", zeros, (c.width, c.padded_vocab)), bias
