r"""The autoregressive baseline: next-token prediction, the papers' yardstick.

No corruption: the network sees [bos; x0[:-1]] under a causal mask and its
output at slot i predicts x0_i, so that all L tokens count and the loss is the
exact negative log-likelihood. In sampling the canvas begins with bos (or any
prompt) and the output at slot i predicts slot i + 1 (`shift` 1), one slot a
block.

What stands before the first token is the network's own history. One that was
trained here saw bos before every row, whatever the row. A published one saw what
its tokenizer writes and nothing else: there bos is put only before a first token
that is itself to be predicted.

With `masks_ahead`, the network learns to draft, too: answers are masked, all of
them, and each mask predicts the token after it, given clean text up to its block
and the masks before it in its block. One pass over [z ; x0] has both losses
(I-DLM). Its own drafts, tested, give the autoregressive text in fewer calls.
"""

import dataclasses
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.core import check
from dllm_jax.core.mask import Causal, MaskSpec, TwoStream
from dllm_jax.core.types import Loss, ModelInputs
from dllm_jax.core.vocabulary import cross_entropy, forbid
from dllm_jax.objectives.base import (
  check_choice,
  Discrete,
  Drawn,
  subs,
  TokenSpace,
)
from dllm_jax.objectives.texts import begins_segment, evenly, unshifted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoregressive(Discrete):
  """Next-token prediction.

  Attributes:
    bos_id: what the network sees before a segment's first token; None for
      another token (`begin_id`).
    eos_id: what ends a document, or None.
    begins: whether every row begins so; else only one whose first token is to
      be predicted, not one that is given its first token.
    masks_ahead: masks of a block of drafts, a divisor of rows; 0 for none.
    clean_weight: factor of the next-token loss beside that of drafts; None for
      as much as makes both equal.
    drafted: whose drafts count: those that masks make, or all of an "answer",
      its first token's too, which stands behind a prompt (NeMo Automodel's).

  Examples:
    >>> ar = Autoregressive(vocab_size=5, mask_id=4, bos_id=0)
    >>> ar.begin_id, ar.exact
    (0, True)
  """

  bos_id: int | None = None
  eos_id: int | None = None
  begins: bool = True
  masks_ahead: int = 0
  clean_weight: float | None = 0.2
  drafted: Literal["masks", "answer"] = "masks"

  shift: ClassVar[int] = 1
  block_length: ClassVar[int] = 1
  exact: ClassVar[bool] = True  # nothing is drawn

  def __post_init__(self):
    super().__post_init__()
    if self.mask_id is None:
      raise ValueError("the canvas of sampling needs a mask_id")
    check.at_least(self, 0, "masks_ahead", "clean_weight")
    check_choice("drafted", self.drafted, Literal["masks", "answer"])
    if self.masks_ahead and self.begins:
      raise ValueError(
        "drafts are trained on rows as they are, nothing before them: set begins"
        " false, or masks_ahead 0"
      )
    if self.bos_id is not None and not 0 <= self.bos_id < self.vocab_size:
      raise ValueError(
        f"bos_id {self.bos_id} must lie in [0, {self.vocab_size}) or be None"
      )

  @classmethod
  def over(cls, space: TokenSpace, **fields) -> "Autoregressive":
    """Returns the objective over a token space and its bos token."""
    own = {"bos_id": space.bos_id, "eos_id": space.eos_id}
    fields = own | {
      k: v for k, v in fields.items() if k not in own or v is not None
    }
    return cls(vocab_size=space.vocab_size, mask_id=space.mask_id, **fields)

  @property
  def begin_id(self) -> int:
    """The token before the first one, in training and on a canvas.

    Without a bos it is the mask where rows were trained to begin so, and else
    what ends a document: in a text of many, that stands before the next.
    """
    if self.bos_id is not None:
      return self.bos_id
    if self.begins or self.eos_id is None:
      return self.mask_id
    return self.eos_id

  @property
  def mask_spec(self) -> MaskSpec:
    """A token sees itself and earlier ones."""
    return Causal()

  def draw(self, process, key, batch, *, step) -> Drawn:
    """Returns x0 moved on by one, a bos at each segment; nothing is random."""
    x0 = batch.tokens
    before = jnp.pad(x0[:, :-1], ((0, 0), (1, 0)))
    z = jnp.where(begins_segment(batch.segment_ids), self.begin_id, before)
    return Drawn(t=jnp.ones((x0.shape[0], 1)), z=z)

  def _hidden(self, batch) -> Bool[Array, "B L"]:
    """Returns True at a text's first slot if nothing is to stand before it.

    Where the text has its bos there, which is then not predicted either, and,
    unless all rows begin so, where its first token is given.
    """
    known = jnp.zeros(batch.tokens.shape, bool)
    if self.bos_id is not None:
      known |= batch.tokens == self.bos_id
    if not self.begins:
      known |= ~batch.loss_mask
    return begins_segment(batch.segment_ids) & known

  def seen(self, batch) -> Int[Array, "B L"]:
    """Returns the segments of slots that the network sees, 0 elsewhere."""
    return jnp.where(self._hidden(batch), 0, batch.segment_ids)

  def loss(self, process, denoise, drawn, batch, *, step) -> Loss:
    """Returns the exact negative log-likelihood, nats; with drafts, theirs too."""
    if self.masks_ahead:
      return self._drafted(denoise, batch)
    counted = batch.loss_mask & ~self._hidden(batch)
    weight = evenly(counted)
    if batch.loss_weight is not None:
      weight = weight * batch.loss_weight[:, None]
    inputs = self.inputs(process, drawn.z, drawn.t, batch)
    out = denoise(inputs.replace(segment_ids=self.seen(batch)))
    out = forbid(out, self.mask_id)
    total, terms = cross_entropy(out, batch.tokens, weight)
    return Loss(
      total=total,
      weight=jnp.sum(weight),
      bound=terms * counted,
    )

  def _drafted(self, denoise, batch) -> Loss:
    """Returns the loss of drafts and of the next token, of one pass.

        sum_i 1[z_(i-1) = m] (-log p(x_i | z)) + w sum_i (-log p(x_i | x_<i)),

    both over an answer's tokens i, divided by their number; the mask keeps its
    probability, as published.
    """
    x0, length = batch.tokens, batch.tokens.shape[1]
    z = jnp.where(batch.loss_mask, self.mask_id, x0)
    slots = jnp.arange(2 * length)
    twice = lambda x: jnp.concatenate([x, x], axis=1)
    # A block's masks see those before them; clean tokens need no more than this.
    order = (slots[:, None] >= slots) | (slots >= length)
    out = denoise(
      ModelInputs(
        latent=jnp.concatenate([z, x0], axis=1),
        positions=twice(batch.positions),
        segment_ids=twice(batch.segment_ids),
        cond=batch.cond,
        mask=TwoStream(length, self.masks_ahead, 1),
        extra_mask=order,
      )
    )
    first = begins_segment(batch.segment_ids)
    counted = batch.loss_mask & ~first
    after = jnp.pad(z[:, :-1], ((0, 0), (1, 0))) == self.mask_id
    after |= self.drafted == "answer"
    half = lambda here: unshifted(
      out.replace(hidden=out.hidden[:, here]), batch.segment_ids
    )
    rows = 1.0 if batch.loss_weight is None else batch.loss_weight[:, None]
    weight = evenly(counted) * rows
    drafts, _ = cross_entropy(half(slice(length)), x0, weight * after)
    clean, terms = cross_entropy(half(slice(length, None)), x0, weight)
    factor = self.clean_weight
    if factor is None:
      factor = jax.lax.stop_gradient(drafts / (clean + 1e-8))
    # A text's first token is not predicted: for a bound all are as likely.
    guess = math.log(self.vocab_size - 1)
    return Loss(
      total=drafts + factor * clean,
      weight=jnp.sum(weight),
      bound=jnp.where(first, guess, terms) * batch.loss_mask,
    )

  def log_x0(self, process, logits, z, t) -> Float[Array, "B c V"]:
    """Returns the next token's log-probabilities; known tokens are copied."""
    return subs(logits, z, self.mask_id)

  def posterior(self, process, logits, z, t, s) -> Float[Array, "B c V"]:
    """Returns the same: a step reveals what it reaches, whatever its times."""
    return self.log_x0(process, logits, z, t)
