"""What objectives have in common: one pass of the network, and its defaults.

A training loss has two halves. `draw` is all the randomness: times and
corrupted rows, for the whole global batch at once, so that splitting the batch
over microbatches and devices changes nothing. `loss` is a deterministic
function of what was drawn. `Discrete` has the shape of almost every published
loss: draw times, corrupt, call the network once, score each position. An
objective that fits writes `time`, `corrupt`, `inputs` and `weigh`, or `score`
where its terms are no weighted cross-entropy. One that does not fit (two
corruptions, no corruption) writes `draw` and `loss` itself. Nothing here knows
any one system. A method that overrides another has the types of its arguments
from where it is first declared: `core.types.Objective`, or a base class.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, get_args, Self

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from dllm_jax.core import check
from dllm_jax.core.images import ImageVocabulary
from dllm_jax.core.mask import Full, MaskSpec
from dllm_jax.core.noise import Tag
from dllm_jax.core.types import (
  Batch,
  Denoise,
  Loss,
  ModelInputs,
  ModelOutputs,
  Noise,
  Objective,
  Process,
  Reading,
)
from dllm_jax.core.vocabulary import cross_entropy, forbid, reduce
from dllm_jax.objectives.texts import Fill, unshifted, Weights


@struct.dataclass
class Drawn:
  """The randomness of a training loss; every leaf begins with the row axis.

  Attributes:
    t: times.
    z: corrupted rows.
  """

  t: Float[Array, "B #L"]
  z: PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSpace:
  """The token ids and row length that an objective is set up over.

  Attributes:
    vocab_size: real tokens, the mask included.
    mask_id: the mask token.
    bos_id: the token that begins a document, or None.
    eos_id: the token that ends a document, or None.
    length: tokens in a row.
    images: where image tokens are, or None.
  """

  vocab_size: int
  mask_id: int
  bos_id: int | None = None
  eos_id: int | None = None
  length: int = 0
  images: ImageVocabulary | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Discrete(Objective):
  """Defaults of objectives over tokens; a frozen dataclass to inherit from.

  Attributes:
    vocab_size: real tokens, the mask included if there is one.
    mask_id: the mask token; None for processes without one.
  """

  vocab_size: int
  mask_id: int | None = None

  diffuses = True
  """Whether samplers can draw from it: else it only trains a network."""

  def __post_init__(self):
    check.at_least(self, 2, "vocab_size")
    if self.mask_id is not None and not 0 <= self.mask_id < self.vocab_size:
      raise ValueError(
        f"mask_id {self.mask_id} must lie in [0, {self.vocab_size}), the "
        "vocabulary with its mask"
      )

  @classmethod
  def over(cls, space: TokenSpace, **fields: Any) -> Self:
    """Returns the objective over a token space, as a config asks for it.

    Processes without a mask override this to leave it out of the vocabulary.

    Args:
      space: the tokens and the row length.
      **fields: the objective's own fields.
    """
    return cls(vocab_size=space.vocab_size, mask_id=space.mask_id, **fields)

  @classmethod
  def filling(cls, fields: Mapping[str, Any]) -> Fill:
    """Returns what conversations have behind them, for some fields: nothing."""
    return Fill()

  def network_fields(self) -> dict[str, Any]:
    """Returns what the objective needs of a network, as its config's fields."""
    return {"conditioned": True} if self.reads_time else {}

  @property
  def mask_spec(self) -> MaskSpec:
    """Who attends to whom."""
    return Full()

  @property
  def begin_id(self) -> int | None:
    """The token before a canvas's first slot; None if it needs none."""
    return None

  @property
  def reads_time(self) -> bool:
    """Whether the network is told the time.

    If not, its output is a function of z: a sampler may keep it while no row
    has changed, and skip the forward (arXiv:2406.07524, sec. 3.3).
    """
    t = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    return jax.eval_shape(self.conditioning, t) is not None

  def with_blocks(self, size: int) -> Self:
    """Returns the objective with blocks of another size.

    Raises:
      ValueError: it has no blocks.
    """
    raise ValueError(
      f"{type(self).__name__} has no blocks: a block size belongs to block "
      "diffusion"
    )

  def conditioning(self, t: Float[Array, "B #T"]) -> Array | None:
    """Returns what the network is told of the time: nothing."""
    return None

  def inputs(
    self,
    process: Process,
    z: Int[Array, "B L"],
    t: Float[Array, "B #L"],
    batch: Batch,
  ) -> ModelInputs:
    """Returns what the network sees for the latent z at time t."""
    return ModelInputs(
      latent=z,
      conditioning=self.conditioning(t),
      positions=batch.positions,
      segment_ids=batch.segment_ids,
      cond=batch.cond,
      mask=self.mask_spec,
    )

  def score(
    self,
    process: Process,
    out: ModelOutputs,
    x0: Int[Array, "B L"],
    z: Int[Array, "B L"],
    t: Float[Array, "B #L"],
    weights: Weights,
  ) -> tuple[Float[Array, ""], Float[Array, "B L"]]:
    """Returns the summed loss and the bound, from a weighted cross-entropy."""
    total, terms = cross_entropy(forbid(out, self.mask_id), x0, weights.loss)
    return total, weights.bound * terms

  def draw(
    self,
    process: Process,
    key: Key[Array, ""],
    batch: Batch,
    *,
    step: Int[Array, ""],
  ) -> Drawn:
    """Returns times and corrupted rows; unsupervised tokens stay clean."""
    key_t, key_z = jax.random.split(key)
    t = self.times(key_t, batch)
    z = self.corrupt(process, key_z, batch.tokens, t)
    return Drawn(t=t, z=jnp.where(batch.loss_mask, z, batch.tokens))

  def times(self, key: Key[Array, ""], batch: Batch) -> Float[Array, "B #L"]:
    """Returns a time for each text: for each row, or each segment of it."""
    rows, length = batch.tokens.shape
    if not batch.texts_apart:
      return self.time(key, (rows, length))
    key_t, key_order = jax.random.split(key)
    # As many as there could be, in an order that no rule of drawing leaves.
    t = self.time(key_t, (rows * length, 1))
    t = jax.random.permutation(key_order, t).reshape(rows, length)
    number = jnp.maximum(batch.segment_ids - 1, 0)
    return jnp.take_along_axis(t, number, axis=1)

  def outputs(
    self, process: Process, denoise: Denoise, drawn: Drawn, batch: Batch
  ) -> ModelOutputs:
    """Returns what the network says of a corrupted row, `[B, L]` positions."""
    return denoise(self.inputs(process, drawn.z, drawn.t, batch))

  def loss(
    self,
    process: Process,
    denoise: Denoise,
    drawn: Drawn,
    batch: Batch,
    *,
    step: Int[Array, ""],
  ) -> Loss:
    """Returns the loss of one network evaluation, whose outputs may be shifted.

    A row's `loss_weight` multiplies its loss and its share of the weight.
    """
    x0, t, z = batch.tokens, drawn.t, drawn.z
    out = self.outputs(process, denoise, drawn, batch)
    out = unshifted(out, batch.segment_ids) if self.shift else out
    weights = self.weigh(process, x0, z, t, batch)
    if batch.loss_weight is not None:
      row = batch.loss_weight[:, None]
      weights = weights._replace(
        loss=weights.loss * row, count=weights.count * row
      )
    total, bound = self.score(process, out, x0, z, t, weights)
    return Loss(
      total=total,
      weight=jnp.sum(weights.count),
      bound=jax.lax.stop_gradient(bound),
      metrics={"corrupted": jnp.mean(z != x0, where=batch.loss_mask)},
    )

  def prior(self, noise: Noise, shape: tuple[int, int]) -> Int[Array, "B T"]:
    """Returns a canvas of masks."""
    return jnp.full(shape, self.mask_id, jnp.int32)

  def grid(self, steps: int) -> Float[Array, "steps+1"]:
    """Returns even times from 1 to 0."""
    if steps < 1:
      raise ValueError(f"sampling needs at least 1 step, not {steps}")
    return jnp.linspace(1.0, 0.0, steps + 1)

  def reverse(
    self,
    process: Process,
    noise: Noise,
    out: ModelOutputs | tuple[ModelOutputs, ...],
    z: Int[Array, "B T"],
    t: Float[Array, "B #T"],
    s: Float[Array, "B #T"],
    *,
    reading: Reading | None = None,
    window: Int[Array, "B T"] | None = None,
  ) -> Any:
    """Returns a draw from `posterior`, chunk by chunk."""

    def draw(logits, z, t, s, noise, rows):
      seen = logits if reading is None else reading.logits(logits, z, t, rows)
      log_q = self.posterior(process, seen, z, t, s)
      token = noise.categorical(Tag.TOKEN, log_q)
      return token, note(reading, logits, z, rows, log_q, token)

    rows = None if reading is None else reading.rows
    z, noted = reduce(draw, out, z, t, s, noise, rows, window=window)
    return z if reading is None else (z, noted)


def note(reading: Reading | None, *draw: Any) -> Mapping[str, Array]:
  """Returns what a reading notes of a draw; nothing without one."""
  return {} if reading is None else reading.note(*draw)


def corrupt_to(
  key: Key[Array, ""],
  x0: Int[Array, "B L"],
  probability: Float[Array, "B #L"],
  noise_token: int | Int[Array, "B L"],
) -> Int[Array, "B L"]:
  """Returns x0 with each token replaced with the given probability."""
  u = jax.random.uniform(key, x0.shape)
  return jnp.where(u < probability, noise_token, x0)


def subs(
  logits: Float[Array, "B c V"], z: Int[Array, "B c"], mask_id: int
) -> Float[Array, "B c V"]:
  """Returns SUBS log-probabilities (arXiv:2406.07524, sec. 3.2.3).

  The mask has probability 0, and a token that is not masked is copied.
  """
  ids = jnp.arange(logits.shape[-1])
  log_p = jax.nn.log_softmax(jnp.where(ids == mask_id, -jnp.inf, logits))
  copied = jnp.where(ids == z[..., None], 0.0, -jnp.inf)
  return jnp.where((z == mask_id)[..., None], log_p, copied)


def check_choice(name: str, value: str, legal: object) -> None:
  """Checks a field against a Literal type.

  Raises:
    ValueError: the value is none of its literals.
  """
  choices = get_args(legal)
  if value not in choices:
    raise ValueError(f"unknown {name} {value!r}; legal: {', '.join(choices)}")
