"""Samplers as a config or the command line says them.

A preset (`catalogue`) is a policy and defaults; every field of `SamplerConfig`
overrides one. What the network sees is not a preset's choice but its
objective's: block-causal networks are sampled in their own blocks,
autoregressive ones slot by slot.
"""

from collections.abc import Sequence
import dataclasses

from dllm_jax.core import check
from dllm_jax.core.mask import BlockCausal, Causal
from dllm_jax.core.types import Objective
from dllm_jax.sampling.catalogue import (
  check_owner,
  IDS,
  images_of,
  OF_TOKENS,
  OWNERS,
  Preset,
  PRESETS,
  RULES,
  token_ids,
)
from dllm_jax.sampling.constraints.language import LANGUAGES
from dllm_jax.sampling.forward import CACHES
from dllm_jax.sampling.options import RowOptions
from dllm_jax.sampling.policies.guidance import Guidance
from dllm_jax.sampling.policies.policy import Policy
from dllm_jax.sampling.policies.processors import (
  Banned,
  Forced,
  MinP,
  RepetitionPenalty,
  Temperature,
  TopK,
  TopP,
  Within,
)
from dllm_jax.sampling.policies.renoising import Renoise
from dllm_jax.sampling.policies.selection import (
  EntropyBound,
  Factor,
  Threshold,
)
from dllm_jax.sampling.requests import bucket
from dllm_jax.sampling.sampler import Sampler


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig:
  """How to sample, as a config or the command line says it.

  Attributes:
    preset: a published sampler, whose defaults the other fields override.
    steps: network calls for each block; 0 for the preset's, or as many as the
      block has slots.
    block_length: slots sampled together, left to right, a divisor of the canvas;
      0 for the preset's, or the objective's own blocks.
    temperature: divides the logits; 0 takes the best token; -1 for the preset's.
    top_k: draw among the k best tokens; 0 for all.
    top_p: draw among the fewest tokens that hold this probability, in (0, 1];
      None for the preset's.
    min_p: draw among tokens at least so probable beside the best, in [0, 1]; 0
      for all.
    threshold: reveal all slots at least so sure, in (0, 1]; None for the
      preset's rule.
    factor: reveal by confidence factor, above 0; None for the preset's rule.
    entropy_bound: reveal while entropies sum to no more, nats; None for the
      preset's rule.
    eta: how readily tokens are masked again, in [0, 1]; None for the preset's.
    kappa: share of the posterior in Psi sampling, in [0, 1]; None for the
      preset's.
    hot: the temperature of renoising at its first call; None for the preset's.
    cold: the temperature that its last calls approach; None for the preset's.
    rest: mean entropy of a canvas that is done, nats; None for the preset's.
    stable: calls whose best tokens a stable canvas has; None for the preset's.
    start: masks of each gap at first, of those whose gaps grow; None for 4.
    score_temperature: of noise on the order of slots (Dream's `alg_temp`); None
      for the preset's.
    cache: "none", "prefix", "dual", "block"; None for the preset's.
    refresh: calls between passes over the canvas, for prefix and dual caches; 0
      for one at each block's entry.
    reach: slots from a block's start that a prefix cache recomputes, which saves
      work where prompts leave no more than these; 0 for the canvas.
    cfg_scale: classifier-free guidance; 0 for none.
    null_label: the label of no class: guidance is then of the class, and else
      of the prompt.
    repetition_penalty: above 1 makes tokens that stand already rarer.
    banned: ids that are never drawn, separated by commas (or by "+", as
      `--model_args banned=5+6` has it, where commas separate other things).
    forced: ids of which every drawn token is one, likewise.
    doubted: ids that are drawn as others, but count with confidence 0: slots
      whose draw is another one are revealed first; likewise.
    suppress_end: whether what ends a row is never drawn (LLaDA's
      `logits_eos_inf` forbids one of its two ends: say that by `banned`).
    doubt_end: whether what ends a row counts with confidence 0 (LLaDA's
      `confidence_eos_eot_inf`).
    stop: whether a row stops at what ends it; None for the preset's.
    extend: whether slots after a block are hidden until it is written.
    context: slots that are seen at once; 0 for all.
    choices: texts of which what is sampled has to be one, separated by "|".
    regex: a regular expression that the whole of it has to match.
    json_schema: a file, or the JSON itself, of a schema that it has to fit.

  Examples:
    >>> from dllm_jax.objectives import MDLM
    >>> config = SamplerConfig(preset="fast_dllm", block_length=4, threshold=0.8)
    >>> sampler = config.build(MDLM(vocab_size=5, mask_id=4), length=8)
    >>> sampler.length, sampler.policy.selection.value
    (8, 0.8)
  """

  preset: str = "mdlm"
  steps: int = 0
  block_length: int = 0
  temperature: float = -1.0
  top_k: int = 0
  top_p: float | None = None
  min_p: float = 0.0
  threshold: float | None = None
  factor: float | None = None
  entropy_bound: float | None = None
  eta: float | None = None
  kappa: float | None = None
  hot: float | None = None
  cold: float | None = None
  rest: float | None = None
  stable: int | None = None
  start: int | None = None
  score_temperature: float | None = None
  cache: str | None = None
  refresh: int = 0
  reach: int = 0
  cfg_scale: float = 0.0
  null_label: int | None = None
  repetition_penalty: float = 1.0
  banned: str = ""
  forced: str = ""
  doubted: str = ""
  suppress_end: bool = False
  doubt_end: bool = False
  stop: bool | None = None
  extend: bool = False
  context: int = 0
  choices: str = ""
  regex: str = ""
  json_schema: str = ""

  def __post_init__(self):
    if self.preset not in PRESETS:
      raise ValueError(
        f"unknown sampler.preset {self.preset!r};"
        f" {check.close(self.preset, PRESETS)}legal: {', '.join(PRESETS)}"
      )
    counts = ("steps", "block_length", "top_k", "refresh", "reach", "context")
    check.at_least(self, 0, *counts, prefix="sampler.")
    for name in ("top_p", "threshold"):
      value = getattr(self, name)
      if value is not None and not 0.0 < value <= 1.0:
        raise ValueError(f"sampler.{name} must lie in (0, 1], not {value}")
    if not 0 <= self.temperature < float("inf") and self.temperature != -1.0:
      raise ValueError(
        "sampler.temperature must be at least 0, or -1 for the preset's, not "
        f"{self.temperature}"
      )
    if self.cache is not None and self.cache not in CACHES:
      raise ValueError(
        f"unknown sampler.cache {self.cache!r}; legal: {', '.join(CACHES)}"
      )
    rules = [n for n in RULES if getattr(self, n) is not None]
    if len(rules) > 1:
      raise ValueError(
        f"sampler.{rules[0]} and sampler.{rules[1]} are two rules of what is "
        "revealed; give one"
      )
    for name in OWNERS:
      value = getattr(self, name)
      if not (value is None or value is False or value == ""):
        check_owner(name, self.preset)
    self._processors(PRESETS[self.preset], ends=())

  def options(self, end_ids: Sequence[int] = ()) -> RowOptions:
    """Returns what rows do that choose nothing: `stack` wants it.

    Args:
      end_ids: the tokens that end a row.
    """
    preset = PRESETS[self.preset]
    rule = preset.fields.get("selection")
    threshold = None if rule is None else rule.threshold
    if self.factor is not None or self.entropy_bound is not None:
      threshold = None
    stop = preset.stops if self.stop is None else self.stop
    stop |= any(getattr(self, name) for name in LANGUAGES)
    return RowOptions(
      temperature=self.temperature
      if self.temperature >= 0
      else preset.temperature,
      top_k=self.top_k,
      top_p=preset.top_p if self.top_p is None else self.top_p,
      min_p=self.min_p,
      threshold=threshold if self.threshold is None else self.threshold,
      repetition_penalty=self.repetition_penalty,
      end_ids=tuple(end_ids) if stop else (),
    )

  def canvas(self, objective: Objective, slots: int) -> int:
    """Returns the canvas for rows of so many slots: a bucket of whole blocks."""
    own = PRESETS[self.preset].block_length
    block = self.block_length or objective.block_length or own or 1
    return bucket(slots, multiple=block)

  def build(
    self,
    objective: Objective,
    *,
    length: int,
    end_ids: Sequence[int] = (),
    top: int = 0,
    fill_id: int | None = None,
  ) -> Sampler:
    """Returns the sampler for a canvas.

    Args:
      objective: what the network was trained for.
      length: slots of the canvas.
      end_ids: the tokens that end a row.
      top: how many of the likeliest tokens a generation keeps of each draw.
      fill_id: the padding that stands behind one, where the preset has it so.

    Raises:
      ValueError: a field does not fit the canvas or the objective.
    """
    preset = PRESETS[self.preset]
    block = self._block(preset, objective, length)
    spec = objective.mask_spec
    cache = self.cache
    if cache is None:
      left_to_right = isinstance(spec, Causal) and block == 1
      exact = isinstance(spec, BlockCausal) or left_to_right or objective.opens
      exact |= objective.two_passes
      elsewhere = "none" if preset.cache == "block" else preset.cache
      cache = "block" if exact else elsewhere
    if (self.stop or self.suppress_end or self.doubt_end) and not end_ids:
      raise ValueError(
        "sampler.stop, sampler.suppress_end and sampler.doubt_end need a "
        "tokenizer with an end of text; leave them out"
      )
    self._check_tokens(objective, end_ids)
    return Sampler(
      policy=self._policy(preset, objective, block or length, end_ids, top),
      length=length,
      block_length=block,
      blocks_from="start" if isinstance(spec, BlockCausal) else "prompt",
      cache=cache,
      refresh=self.refresh,
      reach=self.reach or None,
      guidance=self._guidance(objective),
      end_ids=tuple(self.options(end_ids).end_ids),
      fill_id=fill_id if preset.fills else None,
      extend=self.extend,
      context=self.context or None,
    )

  def _block(
    self, preset: Preset, objective: Objective, length: int
  ) -> int | None:
    """Returns the block length; None for the whole canvas."""
    block = self.block_length or objective.block_length or preset.block_length
    if block and length % block and not objective.two_passes:
      raise ValueError(
        f"sampler.block_length {block} does not divide the canvas of {length} "
        f"slots; legal: a divisor of {length}"
      )
    return block or None

  def _check_tokens(self, objective: Objective, ends: Sequence[int]) -> None:
    """Raises ValueError if what is to be drawn cannot be."""
    if hasattr(objective, "step_law"):
      usual = {f.name: f.default for f in dataclasses.fields(self)}
      for name in (n for n in OF_TOKENS if getattr(self, n) != usual[n]):
        raise ValueError(
          f"sampler.{name} means nothing to {type(objective).__name__}, which "
          "moves vectors and draws no tokens: leave it out"
        )
    for name in IDS:
      for token in token_ids(name, getattr(self, name)):
        if not 0 <= token < objective.vocab_size:
          raise ValueError(
            f"sampler.{name} has token {token}, outside the vocabulary [0, "
            f"{objective.vocab_size}): use ids of the model's tokenizer"
          )
    forced = token_ids("forced", self.forced) or range(objective.vocab_size)
    banned = {objective.mask_id, *token_ids("banned", self.banned)}
    banned |= {*ends} if self.suppress_end else set()
    if banned.issuperset(forced):
      raise ValueError(
        "no token is left to draw: sampler.banned, sampler.forced, "
        "sampler.suppress_end and the mask rule out all of them; leave one out"
      )

  @property
  def draws(self) -> bool:
    """Whether it is of pictures."""
    return PRESETS[self.preset].draws

  def _guidance(self, objective: Objective) -> Guidance | None:
    if self.cfg_scale == 0.0:
      return None
    if self.draws:
      return Guidance(
        scale=self.cfg_scale,
        kind="empty",
        prompt=objective.empty_prompt,
        hidden=objective.hidden_id,
      )
    kind = "prompt" if self.null_label is None else "class"
    return Guidance(scale=self.cfg_scale, kind=kind, null_label=self.null_label)

  def _policy(
    self,
    preset: Preset,
    objective: Objective,
    slots: int,
    ends: Sequence[int],
    top: int,
  ) -> Policy:
    own = preset.steps or slots
    steps = self.steps or (min(own, slots) if preset.capped else own)
    if steps > slots and preset.capped:
      raise ValueError(
        f"sampler.steps {steps} is more than the {slots} slots of a block; use "
        "at most one step a slot"
      )
    filters, processors = self._processors(preset, ends=ends)
    fields = preset.fields | {"sharpens": preset.sharpens, "top": top}
    if preset.draws:
      images, plan = images_of(self.preset, objective), fields["selection"]
      filters = (Within(images.offset, images.stop), *filters)
      fields["selection"] = dataclasses.replace(plan, total=images.tokens)
    rule = None
    if self.threshold is not None:
      least = getattr(fields.get("selection"), "least", None)
      rule = Threshold(value=self.threshold, least=least)
    if self.factor is not None:
      rule = Factor(value=self.factor)
    if self.entropy_bound is not None and preset.policy is Renoise:
      fields["bound"] = self.entropy_bound
    elif self.entropy_bound is not None:
      rule = EntropyBound(value=self.entropy_bound)
    if rule is not None:
      fields["selection"] = fields.get("selection", rule).by(rule)
    if self.eta is not None:
      fields["rule"] = dataclasses.replace(fields["rule"], eta=self.eta)
    own = ("kappa", "hot", "cold", "rest", "stable", "start")
    fields |= {k: x for k in own if (x := getattr(self, k)) is not None}
    if self.score_temperature is not None:
      fields["noise_temperature"] = self.score_temperature
    doubted = token_ids("doubted", self.doubted)
    doubted += tuple(ends) if self.doubt_end else ()
    if doubted:
      fields["doubts"] = (Banned(doubted),)
    return preset.policy(
      objective=objective,
      steps=steps,
      filters=filters,
      processors=processors,
      **fields,
    )

  def _processors(
    self, preset: Preset, *, ends: Sequence[int]
  ) -> tuple[tuple, tuple]:
    """Returns filters and processors."""
    banned = token_ids("banned", self.banned)
    if self.suppress_end:
      banned += tuple(ends)
    filters = [Banned(banned)] if banned else []
    if self.forced:
      filters.append(Forced(token_ids("forced", self.forced)))
    if self.repetition_penalty != 1.0:
      filters.append(RepetitionPenalty(self.repetition_penalty))
    chosen = self.options()
    temperature, shape = chosen.temperature, []
    if self.top_k:
      shape.append(TopK(self.top_k))
    if chosen.top_p < 1.0:
      shape.append(TopP(chosen.top_p))
    if self.min_p:
      shape.append(MinP(self.min_p))
    if preset.sharpens:
      # Greedy draws leave the confidence that of the filtered network.
      heat = [] if temperature in (0.0, 1.0) else [Temperature(temperature)]
      best = [Temperature(0.0)] if temperature == 0.0 else []
      return tuple(filters + heat + shape), tuple(best)
    if temperature == 0.0:  # which leaves nothing to cut
      shape = []
    return tuple(filters), (Temperature(temperature), *shape)
