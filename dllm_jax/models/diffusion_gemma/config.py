"""The shape of DiffusionGemma: what its two kinds of layers have of their own."""

import dataclasses
import itertools
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from dllm_jax.core.mask import Causal, Full, MaskSpec, Sliding
from dllm_jax.core.types import KVCache
from dllm_jax.models import layers, moe
from dllm_jax.models.adapters import ADAPTERS, LoRA
from dllm_jax.models.attention.context import Strategy
from dllm_jax.models.attention.dispatch import Implementation
from dllm_jax.models.block import Run
from dllm_jax.models.quantised import Matmul
from dllm_jax.models.rotary import Proportional, rotary_tables, Unscaled
from dllm_jax.models.shape import Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaConfig(Shape):
  """The shape and the arithmetic of DiffusionGemma.

  Attributes:
    vocab_size: real tokens.
    width: features of a position (D).
    layers: blocks.
    heads: query heads (H), of both kinds of layers.
    kv_heads: key and value heads of windowed layers, a divisor of heads.
    head_dim: features of their heads, even.
    full_layers: numbers of the layers that see all text, from 0; None for every
      sixth. The last has to be one.
    full_kv_heads: key heads of full layers; None for kv_heads.
    full_head_dim: features of their heads; None for head_dim.
    window: slots that a text position sees in the other layers (W), its own
      among them.
    mlp_dim: hidden features of the perceptron that all positions have.
    experts: experts beside it (E).
    experts_per_token: how many of them a position has.
    expert_dim: hidden features of an expert.
    norm_eps: added to mean squares.
    rope_theta: base of the rotary wavelengths in windowed layers.
    full_rope_theta: of those in full layers.
    full_rotary_share: of the pairs of a head that turn in full layers.
    softcap: bound of |logits|.
    embedding_std: deviation of the first embeddings.
    dropout: rate on the output of each branch, where a dropout key is given.
    balance_weight: factor of the balance loss in `aux["loss"]`.
    experts_implementation: `moe.IMPLEMENTATIONS`; None for the platform's.
    vocab_multiple: the vocabulary is padded to a multiple of this.
    dtype: of activations, "float32" or "bfloat16".
    param_dtype: of stored parameters, "float32" or "bfloat16".
    remat: what a layer keeps for its backward pass (`layers.REMAT`).
    unroll: layers to a step of the scan.
    attention: implementation (`attention.IMPLEMENTATIONS`), of text without a
      cache, and of canvases that read one: by the kernel of `attention.kept` if
      "cudnn" or "flash" on a GPU. Text that reads a cache has the reference.
    context: how attention meets the keys of other devices (`context.STRATEGIES`).
    matmul: how layers multiply by their matrices (`quantised`).
    adapter: low-rank changes of matrices, "lora" or "dora" (`adapters`).
  """

  vocab_size: int
  width: int = 384
  layers: int = 6
  heads: int = 6
  kv_heads: int | None = None
  head_dim: int | None = None
  full_layers: tuple[int, ...] | None = None
  full_kv_heads: int | None = None
  full_head_dim: int | None = None
  window: int = 1024
  mlp_dim: int | None = None
  experts: int = 8
  experts_per_token: int = 2
  expert_dim: int | None = None
  norm_eps: float = 1e-6
  rope_theta: float = 10_000.0
  full_rope_theta: float = 1_000_000.0
  full_rotary_share: float = 0.25
  softcap: float = 30.0
  embedding_std: float = 0.02
  dropout: float = 0.0
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

  two_passes: ClassVar[bool] = True
  tied: ClassVar[bool] = True
  qk_norm: ClassVar[bool] = True
  qkv_bias: ClassVar[bool] = False
  conditioned: ClassVar[bool] = False
  num_classes: ClassVar[int] = 0
  latent_dim: ClassVar[None] = None
  output_dim: ClassVar[None] = None
  router: ClassVar[str] = "softmax"
  router_bias: ClassVar[bool] = False
  router_groups: ClassVar[int] = 1
  router_top_groups: ClassVar[int] = 1
  router_normalised: ClassVar[bool] = True
  router_scale: ClassVar[float] = 1.0
  shared_dim: ClassVar[int] = 0
  expert_block: ClassVar[int] = 1
  expert_capacity: ClassVar[int] = 0

  def __post_init__(self):
    layers.check_at_least(
        self, 1, "vocab_size", "width", "layers", "heads", "kv_heads",
        "head_dim", "full_kv_heads", "full_head_dim", "mlp_dim", "experts",
        "experts_per_token", "expert_dim", "vocab_multiple", "unroll",
    )  # fmt: skip
    layers.check_at_least(self, 2, "window")
    layers.check_choice(
      "experts_implementation", self.experts_implementation, moe.IMPLEMENTATIONS
    )
    self.check_common()
    sixth = (
      i for i in range(self.layers) if i % 6 == 5 or i + 1 == self.layers
    )
    fill = dict(
      kv_heads=self.kv_heads or self.heads,
      head_dim=self.head_dim or self.width // self.heads,
      full_layers=tuple(
        sixth if self.full_layers is None else self.full_layers
      ),
      mlp_dim=self.mlp_dim or -(-8 * self.width // (3 * 64)) * 64,
    )
    fill |= dict(
      full_kv_heads=self.full_kv_heads or fill["kv_heads"],
      full_head_dim=self.full_head_dim or fill["head_dim"],
      expert_dim=self.expert_dim or fill["mlp_dim"],
    )
    for name, value in fill.items():
      object.__setattr__(self, name, value)
    self._check()

  def _check(self) -> None:
    for kind in (self.windowed, self.full):
      if self.heads % kind.kv_heads:
        raise ValueError(
          f"kv_heads {kind.kv_heads} must divide heads {self.heads}"
        )
      if kind.head_dim % 2:
        raise ValueError(
          f"a head of {kind.head_dim} features must be even: they turn in pairs"
        )
    legal = range(self.layers)
    if not set(self.full_layers) <= set(legal) or legal[-1] not in (
      self.full_layers
    ):
      raise ValueError(
        f"full_layers {self.full_layers} must lie among {self.layers} layers and"
        f" have the last, {legal[-1]}"
      )
    if self.experts_per_token > self.experts:
      raise ValueError(
        f"experts_per_token {self.experts_per_token} is more than the"
        f" {self.experts} experts"
      )

  @property
  def windowed(self) -> "Kind":
    """The layers that see a window of the text."""
    return Kind(
      kv_heads=self.kv_heads,
      head_dim=self.head_dim,
      theta=self.rope_theta,
      window=self.window,
    )

  @property
  def full(self) -> "Kind":
    """The layers that see all of it."""
    return Kind(
      kv_heads=self.full_kv_heads,
      head_dim=self.full_head_dim,
      theta=self.full_rope_theta,
      share=self.full_rotary_share,
    )

  @property
  def period(self) -> int:
    """Layers after which the sequence of kinds repeats itself."""
    full = [i in self.full_layers for i in range(self.layers)]
    same = lambda p: full == full[:p] * (self.layers // p)
    return next(p for p in range(1, self.layers + 1) if same(p))

  @property
  def runs(self) -> tuple[Run, ...]:
    """The stacks of layers: of each run of equal layers in a period, all."""
    found, first, period = [], 0, self.period
    kinds = (i in self.full_layers for i in range(period))
    for _, same in itertools.groupby(kinds):
      each = len(list(same))
      count = each * (self.layers // period)
      name = f"period/run{len(found)}"
      found.append(Run(name, first, count, True, each, period))
      first += each
    return tuple(found)

  def kind(self, run: Run) -> "Kind":
    """Returns the kind of a stack's layers."""
    return self.full if run.first in self.full_layers else self.windowed

  def cache(self, batch: int, slots: int) -> KVCache:
    """Returns an empty cache; windowed layers have W - 1 places at most."""
    few = min(self.window - 1, slots)

    def empty(run):
      kind = self.kind(run)
      places = slots if kind.window is None else few
      shape = (run.layers, batch, kind.kv_heads, places, kind.head_dim)
      return jnp.zeros(shape, self.dtype)

    return KVCache(
      key=tuple(map(empty, self.runs)),
      value=tuple(map(empty, self.runs)),
      segment_ids=jnp.zeros((batch, slots), jnp.int32),
      slots=jnp.full((batch, few), -1, jnp.int32),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
  """What the layers of a kind have of their own.

  Attributes:
    kv_heads: key and value heads.
    head_dim: features of a head.
    theta: base of the rotary wavelengths.
    share: of the pairs of a head that turn; None for all.
    window: slots that a text position sees; None for all, and values are keys.
  """

  kv_heads: int
  head_dim: int
  theta: float
  share: float | None = None
  window: int | None = None

  def tables(self, positions) -> tuple[Array, Array]:
    """Returns cosines and sines of positions."""
    turn = Unscaled() if self.share is None else Proportional(share=self.share)
    return rotary_tables(
      positions, dim=self.head_dim, theta=self.theta, scaling=turn
    )

  def spec(self, text: bool) -> MaskSpec:
    """Returns which of a pass's own positions see each other."""
    if not text:
      return Full()
    return Causal() if self.window is None else Sliding(self.window)
