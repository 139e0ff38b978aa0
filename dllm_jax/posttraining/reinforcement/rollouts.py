"""Rollouts as rows: what was sampled, what it earned, what others say of it.

    slots    prompt prompt answer answer end fill fill | unused
    region                 1      1      1   1    1
    ending                               1   1    1
    loss_mask              1      1      1

What is masked of a row follows from its seeds, which lie in it: it is the same
for the old, the new and the reference policy, in any microbatch, on any mesh.
"""

from typing import Literal

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree
import numpy as np

from dllm_jax.core.types import Batch

Tail = Literal["seen", "hidden"]


@struct.dataclass
class Rollouts(Batch):
  """Rows of rollouts; `loss_mask` is the answer up to its first end.

  Attributes:
    region: the slots that were sampled, what fills them up included.
    ending: those that hold what ends an answer, or stand behind it.
    round: in which of the method's views a slot is asked for, -1 for none.
    advantage: A of each token; of an answer, at all slots the same.
    seed: of what is masked of the row.
    batch_seed: of what a whole batch has in common; the same in its rows.
    place: where the row stands in its update's batch, in [0, 1).
    share: 1 over the rows of that batch.
    old: the scores under the policy that sampled it; None: the policy itself.
    reference: the scores under the reference; None where none is asked.
    returns: what a value model is trained towards, or None.
    values: what it said before, or None.
  """

  region: Bool[Array, "B L"] | None = None
  ending: Bool[Array, "B L"] | None = None
  round: Int[Array, "B L"] | None = None
  advantage: Float[Array, "B L"] | None = None
  seed: Int[Array, "B"] | None = None
  batch_seed: Int[Array, "B"] | None = None
  place: Float[Array, "B"] | None = None
  share: Float[Array, "B"] | None = None
  old: PyTree = None
  reference: PyTree = None
  returns: Float[Array, "B L"] | None = None
  values: Float[Array, "B L"] | None = None


def texts(batch: Rollouts, tail: Tail = "seen") -> Batch:
  """Returns the rows as a network is asked of them.

  Args:
    batch: the rollouts.
    tail: whether what fills up a region is seen by the rest.
  """
  segments = batch.segment_ids
  if tail == "hidden":
    segments = jnp.where(batch.region & ~batch.loss_mask, 0, segments)
  return Batch(
    tokens=batch.tokens,
    loss_mask=batch.region,
    segment_ids=segments,
    positions=batch.positions,
    cond=batch.cond,
  )


def row_keys(batch: Rollouts) -> Key[Array, "B"]:
  """Returns a key for each row."""
  return jax.vmap(jax.random.key)(batch.seed)


def row_uniforms(batch: Rollouts, *shape: int) -> Float[Array, "B ..."]:
  """Returns uniforms in [0, 1) for each row, a function of its seed."""
  draw = lambda key: jax.random.uniform(key, shape)
  return jax.vmap(draw)(row_keys(batch))


def batch_key(batch: Rollouts) -> Key[Array, ""]:
  """Returns the key of what the rows of a batch have in common."""
  return jax.random.key(batch.batch_seed[0])


def answer(
  tokens: Int[np.ndarray, "L"],
  given: int,
  sampled: int,
  ends: tuple[int, ...],
) -> list[int]:
  """Returns the tokens of a canvas's answer, up to its first end.

  Args:
    tokens: the canvas.
    given: tokens of the prompt.
    sampled: slots that were sampled behind it.
    ends: tokens that end an answer.
  """
  found = tokens[given : given + sampled]
  where = np.flatnonzero(np.isin(found, ends))
  return found[: where[0] if len(where) else None].tolist()


def rows(
  tokens: Int[np.ndarray, "B L"],
  given: Int[np.ndarray, "B"],
  sampled: int,
  ends: tuple[int, ...],
) -> Rollouts:
  """Returns finished canvases as rows, without what they earned.

  Args:
    tokens: the canvases.
    given: tokens of each prompt.
    sampled: slots that were sampled behind each prompt.
    ends: tokens that end an answer.
  """
  shape, given = tokens.shape, np.asarray(given)[:, None]
  slots = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
  region = (slots >= given) & (slots < given + sampled)
  end = region & np.isin(tokens, ends)
  behind = np.cumsum(end, axis=1) - end > 0
  used = slots < given + sampled
  return Rollouts(
    tokens=np.where(used, tokens, 0).astype(np.int32),
    loss_mask=region & ~behind,
    segment_ids=used.astype(np.int32),
    positions=np.where(used, slots, 0).astype(np.int32),
    region=region,
    ending=region & (end | behind),
    round=np.full(shape, -1, np.int32),
    advantage=np.zeros(shape, np.float32),
    seed=np.zeros(shape[:1], np.int32),
    batch_seed=np.zeros(shape[:1], np.int32),
    place=np.zeros(shape[:1], np.float32),
    share=np.full(shape[:1], 1 / shape[0], np.float32),
  )
