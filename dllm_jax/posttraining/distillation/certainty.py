r"""Certainty forcing: what dParallel and d3LLM share.

Of each answer one block is looked at. What lies before it is known, what lies
after it is masked, and of the block itself a part M, or the rest M' of it:

    prompt  a b c d | e f g h | i j k l      the answer, the second block of it
    prompt  a b c d | e _ _ h | _ _ _ _      M = f, g
    prompt  a b c d | _ f g _ | _ _ _ _      M' = e, h

The loss is a weighted sum of cross-entropies over M and M', and of entropies of
those predictions among them that are right already: a network that is right
should be sure of it, so that more slots pass a threshold at once.
"""

import abc
import dataclasses
from typing import Literal, NamedTuple

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dllm_jax.core import check
from dllm_jax.core.types import Batch, Denoise, Loss, Objective, Process
from dllm_jax.core.vocabulary import forbid, reduce
from dllm_jax.objectives.base import check_choice, Drawn
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.objectives.texts import unshifted
from dllm_jax.posttraining.objective import InPlaceOf
from dllm_jax.sampling.policies.score import entropy

Normalisation = Literal["masked_sequence", "masked"]


@struct.dataclass
class Answers(Batch):
  """Answers of a teacher, one a row, behind their prompts.

  Attributes:
    length: tokens of each answer, its end included; what fills a row is not.
    before: how many slots of the answer stood already when each was revealed.
  """

  length: Int[Array, "B"] | None = None
  before: Int[Array, "B L"] | None = None


@struct.dataclass
class Masks:
  """What is hidden of some rows, in one or two ways each.

  Attributes:
    z: the rows with masks.
    masked: the masked tokens of the block: those that count.
  """

  z: Int[Array, "B n L"]
  masked: Bool[Array, "B n L"]


class Region(NamedTuple):
  """A block of each answer.

  Attributes:
    inside: its slots.
    after: those behind it.
  """

  inside: Bool[Array, "B L"]
  after: Bool[Array, "B L"]


def answer_slots(batch: Batch) -> Int[Array, "B L"]:
  """Returns the number of each slot in its row's answer, from 0.

  An answer begins at the first slot that counts; slots before it are below 0.
  """
  start = jnp.argmax(batch.loss_mask, axis=1)
  return jnp.arange(batch.tokens.shape[1]) - start[:, None]


def counted(batch: Batch) -> Int[Array, "B"]:
  """Returns the number of slots that count in each row."""
  return jnp.sum(batch.loss_mask, axis=1)


def region(
  batch: Batch,
  block: Int[Array, "B"],
  size: int | Int[Array, ""],
  *,
  last: Int[Array, "B"],
) -> Region:
  """Returns a block of each answer; the last one goes on to the answer's end.

  Args:
    batch: the answers.
    block: the number of the block in each row.
    size: slots of a block.
    last: the number of the last block.
  """
  slot = answer_slots(batch)
  begin = (block * size)[:, None]
  over = (slot >= begin + size) & (block < last)[:, None] & batch.loss_mask
  inside = (slot >= begin) & ~over & batch.loss_mask
  return Region(inside, over)


def blocks_of(
  length: Int[Array, "B"], size: int | Int[Array, ""]
) -> Int[Array, "B"]:
  """Returns how many blocks hold so many slots, at least one."""
  # Deviates: the originals count one more, empty and without a loss, where the
  # size divides the length.
  return jnp.maximum(-(-length // size), 1)


def hide(
  batch: Batch,
  where: Region,
  hidden: Bool[Array, "B L"],
  mask_id: int,
  *,
  complement: bool = True,
) -> Masks:
  """Returns rows of which a part of a block is hidden, and what follows it.

  Args:
    batch: the answers.
    where: the block.
    hidden: what is hidden of it; read nowhere else.
    mask_id: the mask token.
    complement: whether the rest of the block is hidden in a second copy.
  """
  parts = [where.inside & hidden]
  if complement:
    parts.append(where.inside & ~hidden)
  masked = jnp.stack(parts, axis=1)
  covered = masked | where.after[:, None]
  z = jnp.where(covered, mask_id, batch.tokens[:, None])
  return Masks(z=z, masked=masked)


def certain(ratio: float | Array) -> float | Array:
  """Returns the probability that a slot of the block is hidden, above 0."""
  low = 1e-3  # LLaDA's smallest mask probability, which both originals keep.
  return (1.0 - low) * ratio + low


class Terms(NamedTuple):
  """What is said of hidden tokens.

  Attributes:
    nats: the cross-entropy of each, at temperature 1; 0 elsewhere.
    entropy: of its prediction at the temperature; 0 where that is wrong.
    right: whether the best token is the right one.
  """

  nats: Float[Array, "B n W"]
  entropy: Float[Array, "B n W"]
  right: Bool[Array, "B n W"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CertaintyForcing(abc.ABC):
  """Fields and the loss that both methods have.

  Attributes:
    temperature: of the entropies' distribution, above 0.
    entropy_weight: factor of the entropies.
    normalisation: what a term is a mean over: the members of each row, and then
      rows ("masked_sequence"), or those of the whole batch ("masked"), as in the
      originals where a batch has several rows; needs one microbatch.
  """

  temperature: float = 0.5
  entropy_weight: float = 2.0
  normalisation: Normalisation = "masked_sequence"

  def __post_init__(self):
    name = type(self).__name__.lower()
    if self.temperature <= 0.0:
      raise ValueError(
        f"{name}.temperature must be above 0, not {self.temperature}"
      )
    check.at_least(self, 0, "entropy_weight", prefix=f"{name}.")
    check_choice(f"{name}.normalisation", self.normalisation, Normalisation)

  def check(self, objective: Objective) -> None:
    """Checks that a network can be distilled so.

    Raises:
      ValueError: it is no masked diffusion.
    """
    if not isinstance(objective, MDLM):
      raise ValueError(
        f"{type(self).__name__.lower()} is for masked diffusion (mdlm, llada, "
        f"dream, bd3lm), which {type(objective).__name__} is not; uniform "
        "diffusion (udlm) is distilled by --method=dcd"
      )

  @abc.abstractmethod
  def draw(
    self,
    objective: Objective,
    process: Process,
    key: Key[Array, ""],
    batch: Answers,
    progress: Float[Array, ""],
  ) -> Masks:
    """Returns what is hidden of each answer.

    Args:
      objective: how the network was trained.
      process: its arrays.
      key: the randomness.
      batch: the answers.
      progress: the share of the training that is done, in [0, 1].
    """

  @abc.abstractmethod
  def factors(self) -> tuple[tuple[float, float], ...]:
    """Returns the factors of cross-entropy and entropy, of M and then M'."""

  def width(self, length: int) -> int:
    """Returns the most tokens of a row that are hidden in its block."""
    return length

  def loss(
    self,
    objective: Objective,
    process: Process,
    denoise: Denoise,
    masks: Masks,
    batch: Batch,
  ) -> Loss:
    """Returns the loss, a deterministic function of what is hidden.

    The bound is 0: this is no likelihood. Metrics: `cross_entropy` of hidden
    tokens and `entropy` of those that are right, nats; `right`, their share.
    """
    terms = hidden_terms(
      objective, process, denoise, masks, batch,
      temperature=self.temperature, width=self.width(batch.tokens.shape[1]),
    )  # fmt: skip
    total = lambda x: jnp.sum(x, axis=-1, dtype=jnp.float32)
    nats, h, right = map(total, terms)
    members = total(masks.masked)
    rows = jnp.sum(jnp.any(members > 0, axis=1), dtype=jnp.float32)
    mean = lambda sums, count: sums / jnp.maximum(count, 1.0)
    batch_mean = lambda sums, count: mean(jnp.sum(sums, 0), jnp.sum(count, 0))
    factors = jnp.asarray(self.factors())
    if self.normalisation == "masked":
      each = jnp.stack([batch_mean(nats, members), batch_mean(h, right)], -1)
      value = rows * jnp.sum(factors * each)
    else:
      each = jnp.stack([mean(nats, members), mean(h, right)], -1)
      value = jnp.sum(factors * each)
    everything = lambda a, b: mean(jnp.sum(a), jnp.sum(b))
    return Loss(
      total=value,
      weight=rows,
      bound=jnp.zeros(batch.tokens.shape, jnp.float32),
      metrics={
        "cross_entropy": everything(nats, members),
        "entropy": everything(h, right),
        "right": everything(right, members),
      },
    )


def hidden_terms(
  objective: Objective,
  process: Process,
  denoise: Denoise,
  masks: Masks,
  batch: Batch,
  *,
  temperature: float,
  width: int,
) -> Terms:
  """Returns what a network says of hidden tokens, in one call.

  Args:
    objective: how the network was trained.
    process: its arrays.
    denoise: the network.
    masks: what is hidden.
    batch: the answers.
    temperature: of entropies.
    width: the most tokens that are hidden in a row: so many positions (W) are
      multiplied by the vocabulary.
  """
  copies = masks.z.shape[1]
  flat = lambda x: x.reshape(-1, *x.shape[2:])
  z, masked = flat(masks.z), flat(masks.masked)
  rows = jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0), batch)
  covered = jnp.sum((z == objective.mask_id) & rows.loss_mask, axis=1)
  rate = covered / jnp.maximum(counted(rows), 1)
  t = objective.when(rate[:, None].astype(jnp.float32))
  out = objective.outputs(process, denoise, Drawn(t=t, z=z), rows)
  out = unshifted(out, rows.segment_ids) if objective.shift else out
  if objective.parameterisation == "subs":
    out = forbid(out, objective.mask_id)

  slots = jnp.argsort(~masked, axis=1, stable=True)[:, :width]
  at = lambda x: jnp.take_along_axis(x, slots, axis=1)

  def read(logits, x0, counts):
    log_p = jax.nn.log_softmax(logits)
    nats = -jnp.take_along_axis(log_p, x0[..., None], axis=-1)[..., 0]
    right = counts & (jnp.argmax(logits, axis=-1) == x0)
    h = jnp.where(right, entropy(logits / temperature), 0.0)
    return jnp.where(counts, nats, 0.0), h, right

  found = reduce(read, out, at(rows.tokens), at(masked), window=slots, live=3)
  return Terms(*(x.reshape(-1, copies, *x.shape[1:]) for x in found))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forced(InPlaceOf):
  """The loss of a method.

  Attributes:
    method: how it is distilled.
    steps: of the training, which curricula are spread over.
  """

  method: CertaintyForcing
  steps: int

  def draw(
    self,
    process: Process,
    key: Key[Array, ""],
    batch: Answers,
    *,
    step: Int[Array, ""],
  ) -> Masks:
    """Returns what is hidden of each answer."""
    progress = jnp.minimum(step / self.steps, 1.0)
    return self.method.draw(self.objective, process, key, batch, progress)

  def loss(
    self,
    process: Process,
    denoise: Denoise,
    drawn: Masks,
    batch: Answers,
    *,
    step: Int[Array, ""],
  ) -> Loss:
    """Returns the method's loss."""
    return self.method.loss(self.objective, process, denoise, drawn, batch)
