"""Texts of a batch: what they are averaged over, and what is behind them.

A text is a row, or a segment of one where `Batch.texts_apart`: a conversation
that is packed with others counts as it would alone.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dllm_jax.core.types import Batch, ModelOutputs
from dllm_jax.core.vocabulary import cross_entropy, forbid

Normalisation = Literal[
  "token", "masked", "weight", "sequence", "masked_sequence", "batch"
]
FillKind = Literal["counted", "seen", "none"]


class Weights(NamedTuple):
  """What each position's term is multiplied by.

  Attributes:
    loss: the factor in the training loss; 0 where a position does not count.
    count: what a position adds to the normalisation.
    bound: the factor in the likelihood bound.
  """

  loss: Float[Array, "B L"]
  count: Float[Array, "B L"]
  bound: Float[Array, "B L"]


class Fill(NamedTuple):
  """What a conversation has behind it.

  Attributes:
    kind: end-of-text tokens that count as answers do, such tokens that are only
      seen, or nothing.
    multiple: the tokens of which a filled conversation has a multiple; 0: it
      fills its row, and nothing where rows hold several.
  """

  kind: FillKind = "none"
  multiple: int = 0


def evenly(loss_mask: Bool[Array, "B L"]) -> Float[Array, "B L"]:
  """Returns a count of one for each supervised token."""
  return loss_mask.astype(jnp.float32)


def text_sums(
  values: Float[Array, "B L"], batch: Batch
) -> Float[Array, "B #L"]:
  """Returns the sum over each token's own text."""
  if not batch.texts_apart:
    return jnp.sum(values, axis=1, keepdims=True)
  return _by_segment(jax.ops.segment_sum, values, batch.segment_ids)


def text_least(
  values: Float[Array, "B L"], batch: Batch
) -> Float[Array, "B #L"]:
  """Returns the least value of each token's own text."""
  if not batch.texts_apart:
    return jnp.min(values, axis=1, keepdims=True)
  return _by_segment(jax.ops.segment_min, values, batch.segment_ids)


def _by_segment(reduce, values, segment_ids):
  number = values.shape[1] + 1
  own = lambda values, ids: reduce(values, ids, number)[ids]
  return jax.vmap(own)(values, segment_ids)


def normalise(weights: Weights, rule: Normalisation, batch: Batch) -> Weights:
  """Returns weights whose loss is an average of the named kind.

  "token": over supervised tokens of the batch. "masked": over those that were
  masked. "weight": over those, by the factors of the loss, which are divided out
  (WeDLM). "sequence": each text's loss over its supervised tokens (its answer),
  then over texts. "masked_sequence": over its masked ones, then over texts.
  "batch": each text's sum, over texts. A text without a token to average over
  is left out. All are taken over the whole accumulated batch.
  """
  masked = evenly(weights.bound != 0)
  if rule == "token":
    return weights
  if rule == "masked":
    return weights._replace(count=masked)
  if rule == "weight":
    return weights._replace(count=weights.loss)
  counted = masked if rule == "masked_sequence" else evenly(batch.loss_mask)
  tokens = jnp.maximum(text_sums(counted, batch), 1.0)
  if rule != "batch":
    weights = weights._replace(loss=weights.loss / tokens)
  return weights._replace(count=counted / tokens)


def with_one_masked(
  key: Key[Array, ""], z: Int[Array, "B L"], batch: Batch, mask_id: int
) -> Int[Array, "B L"]:
  """Returns z with one supervised token masked in each text that has no mask."""
  masked = evenly((z == mask_id) & batch.loss_mask)
  u = jnp.where(batch.loss_mask, jax.random.uniform(key, z.shape), 2.0)
  chosen = batch.loss_mask & (u == text_least(u, batch))
  return jnp.where(chosen & (text_sums(masked, batch) == 0), mask_id, z)


def unshifted(
  out: ModelOutputs, segment_ids: Int[Array, "B L"]
) -> ModelOutputs:
  """Returns shifted outputs at the slots they predict; a segment's first stays."""
  before = jnp.pad(out.hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))
  first = begins_segment(segment_ids)[..., None]
  return out.replace(hidden=jnp.where(first, out.hidden, before))


def begins_segment(segment_ids: Int[Array, "B L"]) -> Bool[Array, "B L"]:
  """Returns True at the first token of each segment."""
  before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  return segment_ids != before


def next_token_loss(
  out: ModelOutputs,
  batch: Batch,
  rule: Normalisation,
  mask_id: int | None,
  weight: Float[Array, ""],
) -> Float[Array, ""]:
  """Returns the summed cross-entropy of supervised tokens given those before.

  Each term is divided as the loss is: the sum over the loss's weight is an
  average of the same kind.

  Args:
    out: what a causal pass over clean tokens says.
    batch: the rows.
    rule: how the loss is normalised.
    mask_id: a token that is never next, or None.
    weight: the loss's.
  """
  out = forbid(unshifted(out, batch.segment_ids), mask_id)
  one = evenly(batch.loss_mask & ~begins_segment(batch.segment_ids))
  scale = normalise(Weights(one, one, one), rule, batch).loss
  if rule == "weight":
    scale *= weight / jnp.maximum(jnp.sum(one), 1.0)
  if batch.loss_weight is not None:
    scale *= batch.loss_weight[:, None]
  return cross_entropy(out, batch.tokens, scale)[0]
