r"""Speculation: drafts of one network, tested by its own autoregressive law.

With p the law of the next token and q that of its draft x, x is taken with
probability min(1, p(x) / q(x)), and else a token drawn from max(0, p - q),
normalised: whatever q is, what comes out has the law p (arXiv:2211.17192,
theorem 1). That needs x to be a draw from q. A draft that is the likeliest token
is a draw from the law that has no other: it is taken with probability p(x).

I-DLM as published drafts the likeliest token, and tests it as if it were drawn
from q: what comes out then has not the law p. That is `rule` "published".
"""

from collections.abc import Mapping
import dataclasses
from typing import get_args, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.core import check
from dllm_jax.core.mask import Causal
from dllm_jax.core.noise import Tag
from dllm_jax.core.types import ModelOutputs, Noise
from dllm_jax.core.vocabulary import best, reduce
from dllm_jax.sampling.policies.ancestral import Stepwise
from dllm_jax.sampling.policies.policy import check_literal, check_mask
from dllm_jax.sampling.policies.processors import Temperature
from dllm_jax.sampling.policies.rows import NONE, Rows
from dllm_jax.sampling.policies.score import confidence

Rule = Literal["drawn", "best", "published"]
Source = Literal["masks", "quadratic", "block"]


class Tested(NamedTuple):
  """What a test of drafts came to.

  Attributes:
    accepted: how many drafts from the left are taken.
    tokens: those, and the one that follows them.
    info: what is noted of each of them, as policies do.
  """

  accepted: Int[Array, "B"]
  tokens: Int[Array, "B n+1"]
  info: Mapping[str, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speculation(Stepwise):
  """Drafts some tokens, and tests all of them in one call.

  Attributes:
    drafts: tokens that are drafted at a time (n); 0 for as many as the network
      was trained to.
    source: where drafts come from. "masks": n masks behind the tested tokens,
      in the same causal call, whose outputs are shifted; after a rejection they
      are worth nothing, and a call is made without drafts (I-DLM). "quadratic":
      n masks behind the last token and n behind each of the tested ones, in the
      same call, so that there are drafts wherever a test ends ("quadratic
      decoding", arXiv:2507.11851). "block": a call of its own, which
      reads the last token and n masks both ways, and whose outputs are not
      shifted (Nemotron-Labs-Diffusion).
    rule: "drawn": drafts are drawn from their law, and tested so. "best": they
      are the likeliest tokens, and tested as such. Both are exact. "published":
      the likeliest, tested as if they were drawn.
    threshold: a probability from which on drafts of a block are final; calls are
      made until all are, the best one in each. None: one call.
  """

  steps: int = 1
  drafts: int = 0
  source: Source = "masks"
  rule: Rule = "drawn"
  threshold: float | None = None

  forces = True
  proposes = False

  def __post_init__(self):
    super().__post_init__()
    check_mask(self)
    check.at_least(self, 0, "drafts")
    self._check_objective()
    if not self.drafts:
      ahead = getattr(self.objective, "masks_ahead", 0)
      if self.objective.opens:
        ahead = self.objective.block_length - 1
      object.__setattr__(self, "drafts", ahead or 3)
    if self.counts:
      raise ValueError(
        "speculation has no repetition penalty of the sampler's: leave it 1, or"
        " let rows have their own"
      )
    check_literal("source", self.source, get_args(Source))
    check_literal("rule", self.rule, get_args(Rule))
    if self.rule == "published" and self.source == "quadratic":
      raise ValueError(
        "rule 'published' drafts by masks behind the last draft: use source"
        " 'masks', or rule 'drawn' or 'best'"
      )
    if self.threshold is not None:
      check.within("a confidence threshold", self.threshold, "(0, 1]")
      if self.source != "block":
        raise ValueError(
          "a threshold is for drafts of a call of their own: use source 'block',"
          " or leave it None"
        )
      if self.rule == "drawn":
        raise ValueError(
          "drafts that are chosen by confidence are not drawn from a law: use"
          " rule 'best', which is exact too"
        )

  def _check_objective(self) -> None:
    """Raises ValueError unless there is an autoregressive law to test by."""
    objective = self.objective
    own = objective.stored_spec if objective.opens else objective.mask_spec
    follows = objective.opens or objective.shift == 1
    if not (isinstance(own, Causal) and follows):
      raise ValueError(
        f"drafts are tested by the law of the next token, which"
        f" {type(objective).__name__}'s network does not have: use a preset of"
        " its own, or a network that reads its context causally"
      )
    if objective.opens and self.source != "block":
      raise ValueError(
        "this network drafts by reading a block both ways: use source 'block'"
        " (preset nemotron_speculative)"
      )

  @property
  def width(self) -> int:
    """Slots that a call reads: the last token, drafts and, behind them, masks."""
    groups = {"masks": 1, "quadratic": 1 + self.drafts, "block": 0}[self.source]
    return 1 + self.drafts + groups * self.drafts

  def _best(self, logits, z, rows):
    """Returns the likeliest token, filters and processors considered."""
    law = self.law(self.filtered(logits, z, rows, None), z, rows)
    return best(law), law

  def _next(self, logits, z, rows) -> Float[Array, "B c V"]:
    """Returns the log-probabilities of the next token."""
    read = self.filtered(logits, z, rows, None)
    return jax.nn.log_softmax(self.drawn(read, z, rows))

  def _tested(self, logits, z, rows) -> Float[Array, "B c V"]:
    """Returns the law that a test reads: as published, of temperature alone."""
    if self.rule != "published":
      return self._next(logits, z, rows)
    for one in (*self.filters, *self.processors):
      if isinstance(one, Temperature):
        logits = one(logits, z, None)
    # Deviates: a mask is never drawn.
    return jax.nn.log_softmax(self._legal(logits))

  def draft(
    self,
    noise: Noise,
    out: ModelOutputs,
    z: Int[Array, "B n"],
    rows: Rows = NONE,
  ) -> tuple[Int[Array, "B n"], Float[Array, "B n"]]:
    """Returns a draft for each position of `out`, and how likely it is."""

    def draw(logits, z, noise, rows):
      if self.rule == "drawn" and not self._always_best(rows):
        law = self._next(logits, z, rows)
        token = noise.categorical(Tag.TOKEN, law)
        return token, confidence(law, token)
      token, _ = self._best(logits, z, rows)
      return token, confidence(logits, token)

    return reduce(draw, out, z, noise, unpenalised(rows))

  def _always_best(self, rows: Rows) -> bool:
    """Whether every row's text is the likeliest token after another."""
    return rows.options is None and self._greedy

  def test(
    self,
    noise: Noise,
    out: ModelOutputs,
    law: ModelOutputs,
    drafts: Int[Array, "B n+1"],
    count: Int[Array, "B"],
    rows: Rows = NONE,
    given: Bool[Array, "B n+1"] | None = None,
  ) -> Tested:
    """Returns how many drafts are taken, and the token behind them.

    Args:
      noise: of the slots that are tested, and of the one behind them.
      out: what predicts those slots, of the tokens before each.
      law: what drafted them, aligned.
      drafts: the drafts, and what is given; the last one is no draft.
      count: how many drafts of each row there are, all n or none.
      rows: what is known of the rows.
      given: slots whose token stands already, and is taken; None for none.
    """

    def look(logits, draft, noise, rows, plain):
      logits, drafted = logits
      if self._always_best(rows):
        token, own = self._best(logits, draft, rows)
        return (
          token == draft,
          token,
          token,
          self._noted(own, draft, token, token),
        )
      at = lambda x: jnp.take_along_axis(x, draft[..., None], axis=-1)[..., 0]
      p = self._tested(logits, draft, rows)
      if self.rule == "best":
        ids = jnp.arange(p.shape[-1])
        q = jnp.where(ids == draft[..., None], 0.0, -jnp.inf)
      else:
        q = self._tested(drafted, draft, plain)
      u = noise.uniform(Tag.TRANSFER, 1)[..., 0]
      rest = jnp.maximum(jnp.exp(p) - jnp.exp(q), 0.0)
      # Nothing is left where both are one, up to rounding: then p's own.
      some = jnp.sum(rest, axis=-1, keepdims=True) > 0.0
      instead = noise.categorical(
        Tag.RESIDUAL, jnp.where(some, jnp.log(rest), p)
      )
      own = self._next(logits, draft, rows)
      fresh = noise.categorical(Tag.TOKEN, own)
      read = self.filtered(logits, draft, rows, None)
      noted = self._noted(self.law(read, draft, rows), draft, instead, fresh)
      return jnp.log(u) < at(p) - at(q), instead, fresh, noted

    take, instead, fresh, noted = reduce(
      look,
      (out, law),
      drafts,
      noise,
      written(rows, drafts if given is None else jnp.where(given, -1, drafts)),
      unpenalised(rows),
    )
    return _counted(take, drafts, count, given, instead, fresh, noted)

  def _noted(self, law, *tokens) -> dict[str, Array]:
    """Returns what is noted of draws, of each of some tokens."""
    each = [self.noted(law, token) for token in tokens]
    log_prob = jnp.stack([one["log_prob"] for one in each], axis=-1)
    return each[0] | {"log_prob": log_prob}


def _counted(take, drafts, count, given, instead, fresh, noted) -> Tested:
  """Returns how many drafts are taken, and what stands there then.

  Args:
    take: which drafts their tests take.
    drafts: they, and what is given.
    count: how many drafts there are.
    given: slots whose token stands already, or None.
    instead: tokens in place of drafts.
    fresh: tokens where there was no draft.
    noted: of each of these three.
  """
  if given is not None:
    take |= given
  index = jnp.arange(drafts.shape[1])
  there = index < count[:, None]
  accepted = jnp.sum(jnp.cumprod(take & there, axis=1), axis=1)
  rejected = accepted < count
  behind = jnp.where(rejected[:, None], instead, fresh)
  if given is not None:
    behind = jnp.where(given, drafts, behind)
  drafted = index < accepted[:, None]
  # How likely each was: as a draft, as what came instead of one, or as new.
  kind = jnp.where(drafted, 0, 2 - rejected[:, None])[..., None]
  log_prob = jnp.take_along_axis(noted["log_prob"], kind, axis=-1)[..., 0]
  return Tested(
    accepted.astype(jnp.int32),
    jnp.where(drafted, drafts, behind),
    {**noted, "log_prob": log_prob},
  )


def unpenalised(rows: Rows) -> Rows:
  """Returns rows whose drafts do not depend on what was written before.

  A draft's law is asked for again when it is tested, when there is more.
  """
  if rows.options is None:
    return rows
  ones = jnp.ones_like(rows.options.repetition_penalty)
  options = rows.options.replace(
    repetition_penalty=ones,
    presence_penalty=0 * ones,
    frequency_penalty=0 * ones,
  )
  return rows.replace(options=options)


def written(rows: Rows, drafts: Int[Array, "B n+1"]) -> Rows:
  """Returns rows in which each tested slot has the drafts before it counted."""
  if rows.counts is None:
    return rows
  ids = jnp.arange(rows.counts.shape[-1])
  before = jnp.cumsum(drafts[..., None] == ids, axis=1, dtype=jnp.int32)
  before = jnp.pad(before[:, :-1], ((0, 0), (1, 0), (0, 0)))
  add = lambda counts: None if counts is None else counts + before
  return rows.replace(counts=add(rows.counts), written=add(rows.written))
