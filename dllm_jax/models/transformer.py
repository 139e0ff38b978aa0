"""A LLaMA-like transformer: RMSNorm, SwiGLU, rotary positions, grouped queries.

Bidirectional or causal by the mask spec of its inputs alone. Parameters are a
plain dict with these paths, N layers stacked first (D width, H heads, G key and
value heads, K head features, F hidden features of the perceptron, C features of
conditioning, E experts, V padded vocabulary); those in brackets depend on the
config, and `layers` is `run0/layers`, `run1/layers`, ... where some layers have
experts and others have none:

    embed/embedding                [V, D]           (token inputs)
    positions/embedding            [P, D]           (learned_positions)
    input/{kernel,bias}            [E, D], [D]      (vector inputs)
    time/{hidden,out}/{kernel,bias}                 (conditioned)
    classes/embedding              [classes + 1, C] (num_classes; last = none)
    layers/attention_norm/scale    [N, D]
    layers/attention/{q,k,v}/kernel [N, D, H or G, K]
    layers/attention/{q,k,v}/bias  [N, H or G, K]   (qkv_bias)
    layers/attention/{q,k}_norm/scale [N, K]        (qk_norm)
    layers/attention/o/kernel      [N, H, K, D]
    layers/mlp_norm/scale          [N, D]
    layers/mlp/{gate,up}/kernel    [N, D, F]
    layers/mlp/down/kernel         [N, F, D]
    layers/mlp/router/kernel       [N, D, E]        (experts)
    layers/mlp/router/expert_bias  [N, E]           (router_bias)
    layers/mlp/experts/{gate,up}   [N, E, D, F]     (experts; F expert_dim)
    layers/mlp/experts/down        [N, E, F, D]     (experts)
    layers/mlp/shared/{gate,up,down}/kernel         (shared_dim)
    layers/modulation/{kernel,bias} [N, C, 6 D]     (conditioned or classes)
    final_norm/scale               [D]
    final_modulation/{kernel,bias} [C, 2 D]         (conditioned or classes)
    .../lora_a, .../lora_b         [N, in, r], [N, r, out] beside kernels of
                                   attention and perceptrons (adapter)
    .../lora_magnitude             [N, out]         (adapter "dora")
    unembed/kernel                 [D, V]           (neither tied nor vectors)
    output/{kernel,bias}           [D, O], [O]      (vector outputs)

Sharding rules, name tables and adapters depend on these paths.
"""

import dataclasses

from flax import linen as nn
import jax.numpy as jnp

from dllm_jax.core.axes import BATCH_AXES, constrain, CONTEXT
from dllm_jax.core.types import Denoiser, KVCache, ModelInputs, ModelOutputs
from dllm_jax.models import layers, moe
from dllm_jax.models.adapters import ADAPTERS, LoRA
from dllm_jax.models.attention.context import Strategy
from dllm_jax.models.attention.dispatch import (
  Implementation,
)
from dllm_jax.models.block import denoiser, layer_runs, Run, trunk
from dllm_jax.models.layers import Linear, RMSNorm, TimeEmbedding, Weight
from dllm_jax.models.perceptron import SwiGLU
from dllm_jax.models.quantised import Matmul
from dllm_jax.models.rotary import Scaling, SCALINGS, Unscaled
from dllm_jax.models.shape import Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(Shape):
  """The shape and the arithmetic of a transformer.

  Attributes:
    vocab_size: real tokens, the mask included.
    width: features of a position (D).
    layers: blocks (N).
    heads: query heads (H).
    kv_heads: key and value heads (G), a divisor of heads; None for heads.
    head_dim: features of a head (K), even; None for width / heads.
    mlp_dim: hidden features of the perceptron (F); None for 8/3 width, up to a
      multiple of 64.
    norm_eps: added to mean squares.
    rope_theta: base of the rotary wavelengths.
    rope_scaling: how wavelengths grow for a longer context (`rotary.SCALINGS`).
    rotary_dim: rotated features of a head, even; None for all.
    qk_norm: RMSNorm of each query and key head before rotation.
    qkv_bias: biases on queries, keys and values.
    tied: the unembedding is the embedding.
    embedding_std: deviation of the first embeddings. What a branch adds is of
      deviation 0.1 to 1 from the start, beside which 0.02 is lost: a small
      network learns sooner with 1.
    learned_positions: embeddings of so many positions, added to those of tokens
      (arXiv:1706.03762, sec. 3.5, learned), beside rotary ones; 0 for none. A row
      with more is refused. With few tokens that stand where they stand, as those
      of pictures, a small network learns sooner.
    dropout: rate on the output of each branch while it is trained.
    conditioned: told the time by adaptive norms; an absent time reads as 0.
    num_classes: class labels that `cond` may name; 0 for none. A row without a
      label has the class `num_classes`.
    cond_dim: features of time and class together (C).
    latent_dim: features of vector inputs; None for tokens.
    output_dim: features of vector outputs; None for logits.
    experts: experts of a routed layer (E); 0 for plain perceptrons everywhere.
    experts_per_token: how many of them a position has (k).
    expert_dim: hidden features of an expert; None for mlp_dim.
    shared_dim: hidden features of the expert that all positions have; 0: none.
    dense_layers: layers that keep a plain perceptron, by number from 0.
    router: what turns logits into scores, "softmax" or "sigmoid".
    router_bias: a bias on scores that decides the choice and nothing else.
    expert_capacity: experts that a block of neighbours may choose from; 0 for
      all (`moe.shortlist`).
    expert_block: positions of such a block.
    router_groups: groups of experts.
    router_top_groups: how many of them a position may choose from.
    router_normalised: whether a position's scores are divided by their sum.
    router_scale: factor of the experts' sum.
    balance_weight: factor of the balance loss in `aux["loss"]`, which training
      adds to the loss.
    experts_implementation: `moe.IMPLEMENTATIONS`; None for the platform's.
    vocab_multiple: the vocabulary is padded to a multiple of this.
    dtype: of activations, "float32" or "bfloat16".
    param_dtype: of stored parameters, "float32" or "bfloat16".
    remat: what a layer keeps for its backward pass (`layers.REMAT`).
    unroll: layers to a step of the scan; more compile longer, run faster. With all
      of them samplers on CPUs hold each layer's matrices by themselves.
    attention: implementation (`attention.IMPLEMENTATIONS`).
    context: how attention meets the keys of other devices where the mesh divides
      positions, "all_gather" or "ring" (`context.STRATEGIES`).
    matmul: how layers multiply by their matrices, "default" (in `dtype`), "int8"
      or "fp8" (`quantised`).
    adapter: low-rank changes of the matrices of attention and perceptrons, "lora"
      or "dora" with their fields (`adapters`), which are then all that trains.
  """

  vocab_size: int
  width: int = 384
  layers: int = 6
  heads: int = 6
  kv_heads: int | None = None
  head_dim: int | None = None
  mlp_dim: int | None = None
  norm_eps: float = 1e-6
  rope_theta: float = 10_000.0
  rope_scaling: Scaling = dataclasses.field(
    default=Unscaled(), metadata={"choices": SCALINGS}
  )
  rotary_dim: int | None = None
  qk_norm: bool = False
  qkv_bias: bool = False
  tied: bool = False
  embedding_std: float = 0.02
  learned_positions: int = 0
  dropout: float = 0.0
  conditioned: bool = False
  num_classes: int = 0
  cond_dim: int = 128
  latent_dim: int | None = None
  output_dim: int | None = None
  experts: int = 0
  experts_per_token: int = 2
  expert_dim: int | None = None
  shared_dim: int = 0
  dense_layers: tuple[int, ...] = ()
  router: str = "softmax"
  router_bias: bool = False
  expert_capacity: int = 0
  expert_block: int = 1
  router_groups: int = 1
  router_top_groups: int = 1
  router_normalised: bool = False
  router_scale: float = 1.0
  balance_weight: float = 0.0
  experts_implementation: str | None = None
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
        self, 1, "vocab_size", "width", "layers", "heads", "kv_heads",
        "head_dim", "mlp_dim", "cond_dim", "latent_dim", "output_dim",
        "vocab_multiple", "unroll",
    )  # fmt: skip
    layers.check_at_least(self, 0, "learned_positions")
    if self.head_dim is None and self.width % self.heads:
      raise ValueError(
        f"width {self.width} is no multiple of heads {self.heads}; change one"
        " or set head_dim"
      )
    if self.heads % (self.kv_heads or self.heads):
      raise ValueError(
        f"kv_heads {self.kv_heads} must divide heads {self.heads}"
      )
    head_dim = self.head_dim or self.width // self.heads
    rotary_dim = head_dim if self.rotary_dim is None else self.rotary_dim
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
      raise ValueError(
        f"rotated features {rotary_dim} of a head of {head_dim} must be even,"
        " above 0 and no more than the head has; set head_dim or rotary_dim"
      )
    if self.embedding_std <= 0:
      raise ValueError(
        f"embedding_std must be above 0, not {self.embedding_std}"
      )
    self._check_experts()
    self.check_common()
    fill = dict(
      kv_heads=self.kv_heads or self.heads,
      head_dim=head_dim,
      rotary_dim=rotary_dim,
      mlp_dim=self.mlp_dim or -(-8 * self.width // (3 * 64)) * 64,
      dense_layers=tuple(self.dense_layers),
    )
    fill["expert_dim"] = self.expert_dim or fill["mlp_dim"]
    for name, value in fill.items():
      object.__setattr__(self, name, value)

  def _check_experts(self) -> None:
    layers.check_at_least(self, 0, "experts", "shared_dim", "expert_capacity")
    layers.check_at_least(
        self, 1, "experts_per_token", "expert_dim", "expert_block",
        "router_groups", "router_top_groups",
    )  # fmt: skip
    layers.check_choice("router", self.router, moe.ROUTERS)
    if self.experts_implementation not in moe.IMPLEMENTATIONS:
      raise ValueError(
        f"experts_implementation {self.experts_implementation!r} is unknown;"
        f" choose one of {', '.join(map(str, moe.IMPLEMENTATIONS))}"
      )
    if not self.experts:
      return
    groups, top = self.router_groups, self.router_top_groups
    if self.experts % groups or top > groups:
      raise ValueError(
        f"router_groups {groups} must divide experts {self.experts} and be at"
        f" least router_top_groups {top}"
      )
    if self.experts_per_token > self.experts // groups * top:
      raise ValueError(
        f"experts_per_token {self.experts_per_token} is more than the"
        f" {self.experts // groups * top} experts a position may choose from"
      )
    capacity = self.expert_capacity
    if capacity and not self.experts_per_token <= capacity <= self.experts:
      raise ValueError(
        f"expert_capacity {capacity} must be at least experts_per_token"
        f" {self.experts_per_token} and at most experts {self.experts}, or 0"
      )

  @property
  def runs(self) -> tuple[Run, ...]:
    """The stacks of layers: one, or one for each run of equal layers."""
    return layer_runs([
      self.experts > 0 and i not in self.dense_layers
      for i in range(self.layers)
    ])

  @property
  def modulated(self) -> bool:
    """Whether norms depend on the time or on a class."""
    return self.conditioned or self.num_classes > 0


def transformer(config: TransformerConfig) -> Denoiser:
  """Returns the network as `(init, apply)`.

  `apply` reads every field of `ModelInputs`. With a cache, the keys and
  values of the T positions are written at their slots in every layer, and the
  positions attend to all filled slots by the mask spec.
  """
  return denoiser(_Transformer(config), config.param_dtype)


class _Transformer(nn.Module):
  config: TransformerConfig
  apart: bool = False

  @nn.compact
  def __call__(self, inputs: ModelInputs, cache: KVCache | None):
    c = self.config
    x, embedding = self._embed(inputs.latent)
    if c.learned_positions:
      x += self._positions(inputs, cache)
    conditioning = self._conditioning(inputs)
    x, cache, aux = trunk(
        c, x, inputs, cache, conditioning,
        norm=RMSNorm, mlp=SwiGLU, experts=moe.Experts, apart=self.apart,
    )  # fmt: skip
    if "balance" in aux and c.balance_weight:
      aux["loss"] = c.balance_weight * jnp.mean(aux["balance"])
    return self._output(x, embedding).replace(aux=aux), cache

  def _embed(self, latent):
    c = self.config
    if c.latent_dim is not None:
      if latent.ndim != 3 or latent.shape[-1] != c.latent_dim:
        raise ValueError(
          f"a network with latent_dim {c.latent_dim} takes vectors"
          f" [B, T, {c.latent_dim}], not {latent.shape}"
        )
      linear = Linear((c.latent_dim,), (c.width,), bias=True, name="input")
      return linear(latent), None
    if latent.ndim != 2:
      raise ValueError(
        f"a network without latent_dim takes tokens [B, T], not {latent.shape}"
      )
    shape = (c.padded_vocab, c.width)
    init = nn.initializers.normal(c.embedding_std)
    embedding = Weight("embedding", shape, init, name="embed")()
    return layers.lookup(embedding, latent), embedding

  def _positions(self, inputs, cache):
    c = self.config
    known = inputs if cache is None else cache
    slots = known.segment_ids.shape[1]
    if slots > c.learned_positions:
      raise ValueError(
        f"rows of {slots} positions, and model.learned_positions embeds"
        f" {c.learned_positions}: raise it, or shorten rows"
      )
    shape = (c.learned_positions, c.width)
    init = nn.initializers.normal(c.embedding_std)
    table = Weight("embedding", shape, init, name="positions")()
    return constrain(table[inputs.positions], BATCH_AXES, CONTEXT)

  def _conditioning(self, inputs):
    c = self.config
    total = 0.0
    batch = inputs.segment_ids.shape[0]
    if c.conditioned:
      t = inputs.conditioning
      t = jnp.zeros((batch, 1)) if t is None else t
      total += TimeEmbedding(c.cond_dim, name="time")(t)
    if c.num_classes:
      label = inputs.cond
      label = jnp.full((batch,), c.num_classes) if label is None else label
      shape = (c.num_classes + 1, c.cond_dim)
      total += Weight("embedding", shape, name="classes")()[label][:, None]
    return nn.silu(total) if c.modulated else None

  def _output(self, x, embedding):
    c = self.config
    if c.output_dim is not None:
      linear = Linear((c.width,), (c.output_dim,), bias=True, name="output")
      return ModelOutputs(hidden=linear(x))
    if c.tied:
      unembed = embedding.T
    else:
      shape = (c.width, c.padded_vocab)
      unembed = Weight("kernel", shape, name="unembed")()
    return ModelOutputs(
      hidden=x, unembed=unembed, vocab_size=c.vocab_size, tied=c.tied
    )
