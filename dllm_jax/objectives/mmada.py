r"""MMaDA: text and pictures by one masked diffusion (arXiv:2505.15809).

Rows are of three kinds (`data.images.sequences`), told by their first token. Of a
picture to be drawn, exactly k = max(1, round(N cos(pi u / 2))) of its N tokens are
masked, u uniform; of what is said of a picture, and of text, each token is masked
with probability p = (1 - eps) u + eps. With CE the cross-entropy of a position:

    L_t2i = mean of CE over masked image tokens and the two marks around them
    L_mmu = mean over rows of  sum CE / (p answer length), over masked tokens
    L_lm  = the same with the row's length, or "answer": with the answer's
    L     = t2i L_t2i + lm L_lm + mmu L_mmu

Each mean is over the rows of its kind of the whole batch, however it is split.
"""

import dataclasses
import math
from typing import Any, Literal, Self

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.core import check
from dllm_jax.core.images import ImageVocabulary
from dllm_jax.core.schedule import Linear, Schedule, SCHEDULES, Sine
from dllm_jax.core.time import TimeRule
from dllm_jax.core.types import Batch, Loss, ModelInputs
from dllm_jax.core.vocabulary import cross_entropy
from dllm_jax.objectives.base import (
  check_choice,
  Discrete,
  Drawn,
  TokenSpace,
)
from dllm_jax.objectives.mdlm import MDLM, Parameterisation
from dllm_jax.objectives.texts import text_sums

Pads = Literal["float", "hard", "none"]

_NO_PART = (
  "autoregressive_weight", "kept_weight", "mask_at_least_one", "normalisation",
  "sampling_epsilon", "shift", "weighting",
)  # fmt: skip
"""Fields of MDLM that its loss and its grid read, and none of those here."""


@struct.dataclass
class Weighted(Drawn):
  """The randomness of a loss, and what it makes of the whole batch.

  Attributes:
    factor: of each position's cross-entropy in the loss.
    share: of each row in the loss's weight; they sum to 1 over the batch.
    bound: of each position's cross-entropy in the likelihood bound.
  """

  factor: Float[Array, "B L"]
  share: Float[Array, "B"]
  bound: Float[Array, "B L"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MMaDA(MDLM):
  """Multimodal large diffusion language models (Yang et al. 2025).

  Attributes:
    schedule: of text.
    image_schedule: of pictures: what share is masked at a time.
    time_rule: how times are drawn.
    images: where image tokens and marks are; None for text alone.
    length: tokens of a row (N + M + 3).
    t2i: the factor of pictures to be drawn.
    lm: the factor of text.
    mmu: the factor of what is said of pictures.
    text_over: what a text's loss is divided by: its "row", as in the first two
      published stages, or its "answer".
    condition_dropout: the probability that a picture is drawn of no text.
    pads: what the fill before a short text is to the rest of its row: "float"
      adds 1 to the scores between other tokens, as the published code does;
      "hard" hides it, as its samplers do; "none" leaves it seen, as in what the
      published weights seem to be trained with.

  Examples:
    >>> mmada = MMaDA(vocab_size=5, mask_id=4)
    >>> float(mmada.masked(0.5)), float(mmada.image_schedule.masked(1.0))
    (0.5, 1.0)
    >>> mmada.images is None  # of text alone
    True
  """

  schedule: Schedule = dataclasses.field(
    default=Linear(), metadata={"choices": SCHEDULES}
  )
  image_schedule: Schedule = dataclasses.field(
    default=Sine(), metadata={"choices": SCHEDULES}
  )
  time_rule: TimeRule = "independent"
  parameterisation: Parameterisation = "softmax"
  images: ImageVocabulary | None = None
  length: int = 0
  t2i: float = 1.0
  lm: float = 0.1
  mmu: float = 0.5
  text_over: Literal["row", "answer"] = "row"
  condition_dropout: float = 0.1
  pads: Pads = "none"

  def __post_init__(self):
    super().__post_init__()
    check.at_least(self, 0.0, "t2i", "lm", "mmu")
    check.within("condition_dropout", self.condition_dropout, "[0, 1]")
    check_choice("pads", self.pads, Pads)
    check_choice("text_over", self.text_over, Literal["row", "answer"])
    usual = {field.name: field.default for field in dataclasses.fields(self)}
    for name in _NO_PART:
      if (value := getattr(self, name)) != usual[name]:
        raise ValueError(
          f"{name} has no part in MMaDA, whose loss and grid are its own: leave"
          f" it {usual[name]!r}, not {value!r}"
        )

  @classmethod
  def over(cls, space: TokenSpace, **fields: Any) -> Self:
    """Returns the objective over a token space, with its images."""
    images = space.images
    if images is not None:
      images.text_room(space.length)
    return super().over(space, images=images, length=space.length, **fields)

  @property
  def prompt_tokens(self) -> int:
    """Tokens before a picture to be drawn and its mark (M + 1)."""
    return self.images.text_room(self.length) + 1

  @property
  def hidden_id(self) -> int | None:
    """The token that samplers hide."""
    return None if self.images is None else self.images.pad

  @property
  def empty_prompt(self) -> tuple[int, ...]:
    """What stands before a picture that is drawn of no text."""
    return self.images.empty_prompt(self.length)

  def drawing(self, tokens: Int[Array, "B L"]) -> Bool[Array, "B 1"]:
    """Returns which rows are pictures to be drawn."""
    if self.images is None:
      return jnp.zeros((tokens.shape[0], 1), bool)
    first = tokens[:, :1]
    return (first == self.images.pad) | (first == self.images.to_image)

  def _said(self, tokens):
    """Returns which rows say something of a picture."""
    if self.images is None:
      return jnp.zeros((tokens.shape[0], 1), bool)
    return tokens[:, :1] == self.images.understand

  def inputs(self, process, z, t, batch: Batch) -> ModelInputs:
    """Returns what the network sees, the fill before a text as `pads` says."""
    inputs = super().inputs(process, z, t, batch)
    if self.images is None or self.pads == "none":
      return inputs
    real = z != self.images.pad
    if self.pads == "hard":
      hidden = jnp.where(real, batch.segment_ids, 0)
      return inputs.replace(segment_ids=hidden)
    return inputs.replace(raised=real.astype(jnp.float32))

  def draw(self, process, key, batch: Batch, *, step) -> Weighted:
    """Returns times, corrupted rows, and each position's factors."""
    key_text, key_time, key_order, key_drop = jax.random.split(key, 4)
    batch = self.supervised(batch)
    text = Discrete.draw(self, process, key_text, batch, step=step)
    t, z = text.t, text.z
    picture = self.drawing(batch.tokens)
    if self.images is not None:
      rows = batch.tokens.shape[0]
      u = jax.random.uniform(key_time, (rows, 1))
      ranks = jax.random.uniform(key_order, (rows, self.images.tokens))
      drop = jax.random.uniform(key_drop, (rows, 1))
      drawn = self.masked_picture(batch.tokens, u, ranks, drop)
      z = jnp.where(picture, drawn, z)
      t = jnp.where(picture, 1.0 - u, t)
    masked = (z == self.mask_id) & batch.loss_mask
    return self.weighted(batch, t, z, masked)

  def masked_picture(
    self,
    tokens: Int[Array, "B L"],
    u: Float[Array, "B 1"],
    ranks: Float[Array, "B N"],
    drop: Float[Array, "B 1"],
  ) -> Int[Array, "B L"]:
    """Returns pictures to be drawn with some tokens masked, some texts dropped.

    Args:
      tokens: the rows.
      u: a uniform a row; cos(pi u / 2) of a picture is masked.
      ranks: uniforms; slot j is masked where the j-th of their order is small.
      drop: a uniform a row; small ones drop the text.
    """
    number = self.images.tokens
    share = jnp.cos(math.pi * 0.5 * u)
    count = jnp.maximum(jnp.round(number * share), 1.0)
    chosen = jnp.argsort(ranks, axis=1) < count
    first = self.prompt_tokens + 1
    old = tokens[:, first : first + number]
    z = tokens.at[:, first : first + number].set(
      jnp.where(chosen, self.mask_id, old)
    )
    empty = jnp.asarray(self.empty_prompt, tokens.dtype)
    prompt = z[:, : self.prompt_tokens]
    prompt = jnp.where(drop < self.condition_dropout, empty, prompt)
    return z.at[:, : self.prompt_tokens].set(prompt)

  def weighted(
    self,
    batch: Batch,
    t: Float[Array, "B #L"],
    z: Int[Array, "B L"],
    masked: Bool[Array, "B L"],
    lengths: Float[Array, "B #L"] | None = None,
  ) -> Weighted:
    """Returns what was drawn with each position's factors.

    Args:
      batch: the rows.
      t: of text, the probability of a mask; of pictures 1 - u.
      z: the corrupted rows.
      masked: which tokens are masked, and count.
      lengths: answers' lengths; None for those of `loss_mask`.
    """
    x0 = batch.tokens
    picture, said = self.drawing(x0), self._said(x0)
    text = ~picture & ~said & jnp.any(batch.loss_mask, axis=1, keepdims=True)
    rows = lambda kind: jnp.maximum(jnp.sum(kind, dtype=jnp.float32), 1.0)
    marks = batch.loss_mask & picture & self._not_code(x0)
    counted = (masked & picture) | marks
    factor = jnp.where(counted, self.t2i / rows(counted), 0.0)
    answer = text_sums(batch.loss_mask.astype(jnp.float32), batch)
    answer = jnp.maximum(answer if lengths is None else lengths, 1.0)
    row = jnp.sum(batch.segment_ids > 0, axis=1, keepdims=True)
    whole = answer if self.text_over == "answer" else jnp.maximum(row, 1)
    p = self.masked(jnp.where(picture, 1.0, t))
    ours = jnp.where(said, self.mmu / (rows(said) * answer), 0.0)
    ours += jnp.where(text, self.lm / (rows(text) * whole), 0.0)
    factor += jnp.where(masked & ~picture, ours / p, 0.0)
    everything = picture | said | text
    share = (everything / rows(everything))[:, 0]
    weight = jnp.where(
      picture,
      self.image_schedule.weight(jnp.where(picture, t, 0.5)),
      self.weight(jnp.where(picture, 0.5, t)),
    )
    bound = jnp.where(masked, weight, 0.0)
    if batch.loss_weight is not None:
      factor *= batch.loss_weight[:, None]
      share *= batch.loss_weight
    return Weighted(t=t, z=z, factor=factor, share=share, bound=bound)

  def _not_code(self, x0):
    return ~self.images.is_code(x0) if self.images else jnp.ones_like(x0, bool)

  def loss(
    self, process, denoise, drawn: Weighted, batch: Batch, *, step
  ) -> Loss:
    """Returns the loss of one network evaluation, kinds together."""
    batch = self.supervised(batch)
    x0, z = batch.tokens, drawn.z
    out = denoise(self.inputs(process, z, drawn.t, batch))
    terms_of = jnp.where(drawn.bound > 0, 1.0, 0.0)
    total, terms = cross_entropy(out, x0, drawn.factor)
    known = jnp.where(drawn.factor != 0, terms, 0.0)
    stop = jax.lax.stop_gradient
    picture, said = self.drawing(x0), self._said(x0)
    parts = {"t2i": picture, "mmu": said, "lm": ~picture & ~said}
    share = jnp.maximum(jnp.sum(drawn.share), 1e-9)
    metrics = {
      f"loss_{name}": stop(
        jnp.sum(jnp.where(kind, drawn.factor * known, 0.0))
        / (getattr(self, name) * share)
      )
      for name, kind in parts.items()
      if getattr(self, name)
    }
    return Loss(
      total=total,
      weight=jnp.sum(drawn.share),
      bound=stop(drawn.bound * known * terms_of),
      metrics=metrics | {"corrupted": jnp.mean(z != x0, where=batch.loss_mask)},
    )

  @property
  def exchangeable(self) -> bool:
    """Whether all tokens are masked at one rate: of text alone."""
    return self.images is None and super().exchangeable

  def corruption(self, process, x0, t) -> Float[Array, "B L"]:
    """Returns the probability that a token of z_t differs from x0's."""
    p = jnp.where(
      self.drawing(x0), self.image_schedule.masked(t), self.masked(t)
    )
    return jnp.broadcast_to(p, x0.shape)

  def restore(self, process, denoise, z, batch, rate) -> Float[Array, "B L"]:
    """Returns -log p(x0 | z) at the masked positions of z, nats; 0 elsewhere."""
    out = denoise(self.inputs(process, z, rate, batch))
    masked = ((z == self.mask_id) & batch.loss_mask).astype(jnp.float32)
    return cross_entropy(out, batch.tokens, masked)[1] * masked

  grid = Discrete.grid  # even times from 1 to 0
