r"""What a row chose, as arrays, and what it does to logits.

`Options` are the choices of a batch, `Rows` is how policies get them: every leaf
is `[B, 1, n]`, handed whole to each chunk of positions, or `[B, W]`, cut like the
logits. What no row of a batch uses is skipped at run time, so that one program
serves any mix. In this order:

    logits + bias -> ends forbidden before `min_tokens` -> repetition ->
    presence and frequency -> temperature -> top-k -> top-p -> min-p

The first line changes what confidence is read from, as `Stepwise.filters` do; the
second what tokens are drawn from, and confidence too where the sampler sharpens.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32

from dllm_jax.sampling.constraints.proposal import Proposal
from dllm_jax.sampling.policies.processors import (
  heated,
  Logits,
  min_p,
  MinP,
  penalised,
  Processor,
  RepetitionPenalty,
  Temperature,
  top_k,
  top_p,
  TopK,
  TopP,
)


@struct.dataclass
class Options:
  """What each row of a batch chose; see `sampling.options.RowOptions`.

  Attributes:
    temperature: divides logits; 0 for the best token.
    top_k: tokens to draw among; 0 for all.
    top_p: the nucleus, in (0, 1]; 1 for all.
    min_p: the least probability beside the best token's; 0 for none.
    threshold: the confidence from which slots are revealed together; read by
      the selection `Threshold` alone.
    repetition_penalty: above 0; 1 for none.
    presence_penalty: subtracted once from what the row has written; 0 for none.
    frequency_penalty: subtracted for each time that it stands there.
    bias_ids: tokens with a bias; -1 in unused places.
    bias: what is added to their logits.
    end_ids: what ends a row; -1 in unused places.
    min_tokens: new slots in which nothing ends the row.
    seed: of each row's noise; None for that of the call.
    steps: network calls for each block, at most; None for the policy's.
  """

  temperature: Float[Array, "B"]
  top_k: Int[Array, "B"]
  top_p: Float[Array, "B"]
  min_p: Float[Array, "B"]
  threshold: Float[Array, "B"]
  repetition_penalty: Float[Array, "B"]
  presence_penalty: Float[Array, "B"]
  frequency_penalty: Float[Array, "B"]
  bias_ids: Int[Array, "B N"]
  bias: Float[Array, "B N"]
  end_ids: Int[Array, "B E"]
  min_tokens: Int[Array, "B"]
  seed: UInt32[Array, "B"] | None = None
  steps: Int[Array, "B"] | None = None

  @property
  def penalises(self) -> Bool[Array, ""]:
    """Returns whether a row asks how often tokens stand in it."""
    return jnp.any(
      (self.repetition_penalty != 1.0)
      | (self.presence_penalty != 0.0)
      | (self.frequency_penalty != 0.0)
    )


@struct.dataclass
class Rows:
  """What a policy knows of the rows beside their logits.

  Attributes:
    counts: how often each token stands in its row; None where nobody asks.
    written: the same of slots that were free: the prompt does not count.
    early: slots in which nothing may end the row.
    options: the rows' own, leaves `[B, 1, n]`; None where the sampler's numbers
      hold for all.
    proposal: a text of each row's language; None where no row has one.
  """

  counts: Int[Array, "B 1 V"] | None = None
  written: Int[Array, "B 1 V"] | None = None
  early: Bool[Array, "B W"] | None = None
  options: Options | None = None
  proposal: Proposal | None = None

  @classmethod
  def of(cls, options: Options | None, **fields) -> "Rows":
    """Returns rows with options, as chunks want them."""
    wide = lambda x: x.reshape(x.shape[0], 1, -1)
    return cls(options=jax.tree.map(wide, options), **fields)

  def fixed(self, processors: Sequence[Processor]) -> tuple[Processor, ...]:
    """Returns the processors that hold for all rows: those nobody chose."""
    if self.options is None:
      return tuple(processors)
    return tuple(p for p in processors if not isinstance(p, CHOSEN))

  @property
  def warm(self) -> Bool[Array, "B 1"]:
    """Returns which rows draw their tokens."""
    return self.options.temperature[..., 0] > 0.0

  @property
  def plain(self) -> Bool[Array, ""]:
    """Returns whether every row takes the best token of logits as they are."""
    chosen = self.options
    cuts = (chosen.top_k > 0) | (chosen.top_p < 1.0) | (chosen.min_p > 0.0)
    return ~(self._adjusts | jnp.any(self.warm) | jnp.any(cuts))

  @property
  def _adjusts(self) -> Bool[Array, ""]:
    used = jnp.any(self.options.bias_ids >= 0) | self.options.penalises
    return used | jnp.any(self.early)

  @property
  def threshold(self) -> Float[Array, "B 1"] | None:
    """Returns the confidence from which each row reveals slots together."""
    return None if self.options is None else self.options.threshold[..., 0]

  @property
  def steps(self) -> Int[Array, "B"] | None:
    """Returns the network calls of each row for a block, if rows have their own."""
    if self.options is None or self.options.steps is None:
      return None
    return self.options.steps[:, 0, 0]

  def within(self, law: Logits, read: Logits) -> Logits:
    """Returns what of a law is in the rows' languages; see `Proposal`."""
    return law if self.proposal is None else self.proposal.within(law, read)

  def chosen(self, law: Logits) -> Logits:
    """Returns a law with the tokens of a proposed text only, if there is one."""
    return law if self.proposal is None else self.proposal.chosen(law)

  def adjusted(self, logits: Logits) -> Logits:
    """Returns logits with biases and penalties, without ends too early."""
    if self.options is None:
      return logits
    return lax.cond(self._adjusts, self._adjusted, lambda x: x, logits)

  def _adjusted(self, logits):
    chosen, vocab = self.options, logits.shape[-1]
    logits = logits + _spread(chosen.bias_ids, chosen.bias, vocab)
    ones = jnp.ones_like(chosen.end_ids, jnp.float32)
    ends = _spread(chosen.end_ids, ones, vocab) > 0
    logits = jnp.where(self.early[..., None] & ends, -jnp.inf, logits)
    return penalised(
      logits,
      self.counts,
      self.written,
      repetition=chosen.repetition_penalty,
      presence=chosen.presence_penalty,
      frequency=chosen.frequency_penalty,
    )

  def shaped(self, logits: Logits, *, greedy: bool) -> Logits:
    """Returns logits after temperature, top-k, top-p and min-p.

    Args:
      logits: of a chunk.
      greedy: whether rows without temperature are cut, too, or left as they are.
    """
    chosen, warm = self.options, self.warm[..., None]
    some = warm | greedy
    heat = jnp.where(warm, chosen.temperature, 1.0)
    heats = heat != 1.0
    best, nucleus = some & (chosen.top_k > 0), some & (chosen.top_p < 1.0)
    least = some & (chosen.min_p > 0.0)

    def shape(x):
      x = _where_any(heats, lambda x: heated(x, heat), x)
      x = _where_any(best, lambda x: top_k(x, chosen.top_k), x)
      x = _where_any(nucleus, lambda x: top_p(x, chosen.top_p), x)
      return _where_any(least, lambda x: min_p(x, chosen.min_p), x)

    used = jnp.any(heats | best | nucleus | least)
    return lax.cond(used, shape, lambda x: x, logits)


def _where_any(
  rows: Bool[Array, "B 1 1"], fn: Callable[[Logits], Logits], x: Logits
) -> Logits:
  """Returns fn(x) in some rows and x in the others; computed if there are any."""
  changed = lambda x: jnp.where(rows, fn(x), x)
  return lax.cond(jnp.any(rows), changed, lambda x: x, x)


def plainly(
  look: Callable[[Any, Rows], PyTree], policy: Any, rows: Rows
) -> PyTree:
  """Returns look(policy, rows), as cheap as what the rows chose allows.

  Where rows have options, but each takes the best token of unchanged logits, the
  policy is one that does so for all, and rows have none: each thing that options
  change is a pass over the vocabulary, whose result a condition would hand on.
  """
  if rows.options is None:
    return look(policy, rows)
  greedy = dataclasses.replace(
    policy,
    filters=rows.fixed(policy.filters),
    processors=(*rows.fixed(policy.processors), Temperature(0.0)),
  )
  return lax.cond(
    rows.plain,
    lambda: look(greedy, rows.replace(options=None)),
    lambda: look(policy, rows),
  )


NONE = Rows()
"""Rows that chose nothing."""
CHOSEN = (Temperature, TopK, TopP, MinP, RepetitionPenalty)
"""Processors whose numbers are a row's own where rows have options."""


def _spread(
  ids: Int[Array, "B 1 N"], values: Float[Array, "B 1 N"], vocab: int
) -> Float[Array, "B 1 V"]:
  """Returns values at their ids, summed; none at ids below 0."""
  ids = jnp.where(ids < 0, vocab, ids)
  zeros = jnp.zeros((vocab,), jnp.float32)
  put = lambda ids, values: zeros.at[ids].add(values, mode="drop")
  return jax.vmap(jax.vmap(put))(ids, values)
