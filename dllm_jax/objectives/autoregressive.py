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
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dllm_jax.core.mask import Causal, MaskSpec
from dllm_jax.core.types import Loss
from dllm_jax.core.vocabulary import cross_entropy, forbid
from dllm_jax.objectives.base import Discrete, Drawn, subs, TokenSpace
from dllm_jax.objectives.texts import begins_segment, evenly


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoregressive(Discrete):
  """Next-token prediction.

  Attributes:
    bos_id: what the network sees before a segment's first token; None for
      another token (`begin_id`).
    eos_id: what ends a document, or None.
    begins: whether every row begins so; else only one whose first token is to
      be predicted, not one that is given its first token.

  Examples:
    >>> ar = Autoregressive(vocab_size=5, mask_id=4, bos_id=0)
    >>> ar.begin_id, ar.exact
    (0, True)
  """

  bos_id: int | None = None
  eos_id: int | None = None
  begins: bool = True

  shift: ClassVar[int] = 1
  block_length: ClassVar[int] = 1
  exact: ClassVar[bool] = True  # nothing is drawn

  def __post_init__(self):
    super().__post_init__()
    if self.mask_id is None:
      raise ValueError("the canvas of sampling needs a mask_id")
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

  def loss(self, process, denoise, drawn, batch, *, step) -> Loss:
    """Returns the exact negative log-likelihood, nats."""
    hidden = self._hidden(batch)
    counted = batch.loss_mask & ~hidden
    weight = evenly(counted)
    if batch.loss_weight is not None:
      weight = weight * batch.loss_weight[:, None]
    inputs = self.inputs(process, drawn.z, drawn.t, batch)
    segments = jnp.where(hidden, 0, batch.segment_ids)
    out = denoise(inputs.replace(segment_ids=segments))
    out = forbid(out, self.mask_id)
    total, terms = cross_entropy(out, batch.tokens, weight)
    return Loss(
      total=total,
      weight=jnp.sum(weight),
      bound=terms * counted,
    )

  def log_x0(self, process, logits, z, t) -> Float[Array, "B c V"]:
    """Returns the next token's log-probabilities; known tokens are copied."""
    return subs(logits, z, self.mask_id)

  def posterior(self, process, logits, z, t, s) -> Float[Array, "B c V"]:
    """Returns the same: a step reveals what it reaches, whatever its times."""
    return self.log_x0(process, logits, z, t)
