"""What one request may choose: checked here, stacked to arrays, told to policies.

What is chosen is data: requests with any choices are rows of one batch and one
compiled program. What shapes a program is the sampler's: policy, cache, blocks,
canvas and the most steps. How many tokens are wanted at most is a request's template, or
`continuation(prompt, new_tokens=...)`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import numbers

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int
import numpy as np

from dllm_jax.core import check
from dllm_jax.core.types import Objective
from dllm_jax.sampling.constraints.automaton import Automaton
from dllm_jax.sampling.policies.policy import Policy
from dllm_jax.sampling.policies.rows import Options, Rows
from dllm_jax.sampling.requests import Requests
from dllm_jax.sampling.window import take, Window

ENDS = 8
"""End tokens of a row, at most, unless `stack` is told otherwise."""
BIASES = 64
"""Tokens of a row with a bias, at most, unless `stack` is told otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowOptions:
  """What one request chooses; None for what its sampler does.

  Attributes:
    temperature: divides the logits; 0 takes the best token.
    top_k: draw among the k best tokens; 0 for all.
    top_p: draw among the fewest tokens that hold this probability, in (0, 1].
    min_p: draw among tokens at least so probable beside the best, in [0, 1].
    threshold: reveal all slots at least so sure, in (0, 1]; for samplers that
      reveal by a threshold.
    steps: network calls for each block, at most, no more than the sampler's; for
      samplers whose rows may have steps of their own (`Sampler.row_steps`).
    repetition_penalty: l / penalty where l > 0, l * penalty elsewhere, for tokens
      that stand in the row, its prompt included (arXiv:1909.05858, sec. 4.1);
      above 0, 1 for none.
    presence_penalty: nats off the logit of a token that the row has written.
    frequency_penalty: nats for each time that it has.
    logit_bias: nats added to the logits of tokens, by id.
    end_ids: what ends the row: it stops after the block in which it draws one.
    min_tokens: new slots in which no end is drawn.
    seed: with the request's number it decides the noise; taken modulo 2^32.
    language: what the text has to be in (`constraints.automaton_of`).
    span: (first, behind the last) slot of the template that the language is of;
      from the first to the last that is sampled, if it is None.
  """

  temperature: float | None = None
  top_k: int | None = None
  top_p: float | None = None
  min_p: float | None = None
  threshold: float | None = None
  steps: int | None = None
  repetition_penalty: float | None = None
  presence_penalty: float | None = None
  frequency_penalty: float | None = None
  logit_bias: Mapping[int, float] | None = None
  end_ids: Sequence[int] | None = None
  min_tokens: int | None = None
  seed: int | None = None
  language: Automaton | None = None
  span: tuple[int, int] | None = None

  def __post_init__(self):
    for name, interval in _INTERVALS.items():
      _check(name, getattr(self, name), interval, whole=name in _WHOLE)
    _check("seed", self.seed, "(-inf, inf)", whole=True)
    for token, value in (self.logit_bias or {}).items():
      _check("a token of logit_bias", token, "[0, inf)", whole=True)
      _check(f"logit_bias of token {token}", value, "(-inf, inf)")
    for token in self.end_ids or ():
      _check("a token of end_ids", token, "[0, inf)", whole=True)

  @property
  def given(self) -> dict[str, object]:
    """Returns what was chosen, by name."""
    fields = (field.name for field in dataclasses.fields(self))
    values = {name: getattr(self, name) for name in fields}
    return {name: v for name, v in values.items() if v is not None}


_INTERVALS = {
  "temperature": "[0, inf)",
  "top_k": "[0, inf)",
  "top_p": "(0, 1]",
  "min_p": "[0, 1]",
  "threshold": "(0, 1]",
  "steps": "[1, inf)",
  "repetition_penalty": "(0, inf)",
  "presence_penalty": "(-inf, inf)",
  "frequency_penalty": "(-inf, inf)",
  "min_tokens": "[0, inf)",
}
_WHOLE = ("top_k", "min_tokens", "steps")
_NEUTRAL = {
  "temperature": 1.0,
  "top_k": 0,
  "top_p": 1.0,
  "min_p": 0.0,
  "threshold": 1.0,
  "repetition_penalty": 1.0,
  "presence_penalty": 0.0,
  "frequency_penalty": 0.0,
  "min_tokens": 0,
}
_NARROW = {float: np.float32, int: np.int32}
_OF_ANY = ("end_ids", "seed")
"""What processes that draw no tokens heed as well."""


def _check(
  name: str, value: float | None, interval: str, *, whole: bool = False
) -> None:
  """Raises ValueError unless a value is None or a number in an interval."""
  if value is None:
    return
  kind = numbers.Integral if whole else numbers.Real
  if isinstance(value, bool) or not isinstance(value, kind):
    what = "a whole number" if whole else "a number"
    raise ValueError(f"{name} must be {what}, not {value!r}")
  check.within(name, value, interval)


def stack(
  rows: Sequence[RowOptions],
  *,
  defaults: RowOptions,
  objective: Objective,
  steps: int | None = None,
  ends: int = ENDS,
  biases: int = BIASES,
) -> Options:
  """Returns what rows chose as arrays, and the sampler's numbers elsewhere.

  Args:
    rows: what each chose.
    defaults: of what a row leaves out: `SamplerConfig.options`.
    objective: what the tokens must fit.
    steps: that the sampler has and rows may lower, `Sampler.row_steps`.
    ends: end tokens that there is room for.
    biases: tokens with a bias that there is room for.

  Raises:
    ValueError: a token is outside the vocabulary, there are too many, a row
      chooses what the sampler or the objective cannot heed, or only some rows
      have a seed.
  """
  for row in rows:
    check_row(row, defaults=defaults, objective=objective)
    _check_steps(row.steps, steps)
  seeds = [row.seed for row in rows]
  if None in seeds and any(seed is not None for seed in seeds):
    raise ValueError("give each row a seed, or none: the others have no number")
  full = [_NEUTRAL | defaults.given | row.given for row in rows]
  for row, fields in zip(rows, full, strict=True):
    if row.language is not None and not fields.get("end_ids"):
      fields["end_ids"] = row.language.end_ids
  kinds = {name: type(value) for name, value in _NEUTRAL.items()}
  single = {
    name: np.asarray([row[name] for row in full], _NARROW[kind])
    for name, kind in kinds.items()
  }
  bias = [dict(row.get("logit_bias", {})) for row in full]
  return Options(
    **single,
    steps=None
    if steps is None
    else np.asarray([row.steps or steps for row in rows], np.int32),
    bias_ids=_padded("logit_bias", [list(b) for b in bias], -1, biases),
    bias=_padded("logit_bias", [list(b.values()) for b in bias], 0.0, biases),
    end_ids=_padded(
      "end_ids", [list(row.get("end_ids", ())) for row in full], -1, ends
    ),
    seed=None
    if None in seeds
    else np.asarray([seed % 2**32 for seed in seeds], np.uint32),
  )


def check_row(
  row: RowOptions, *, defaults: RowOptions, objective: Objective
) -> None:
  """Raises ValueError unless a sampler and an objective can heed a choice."""
  if row.threshold is not None and defaults.threshold is None:
    raise ValueError(
      "threshold means nothing to this sampler, which reveals by another rule: "
      "leave it out, or serve a preset with a threshold, such as fast_dllm"
    )
  deaf = [name for name in row.given if name not in _OF_ANY]
  if deaf and hasattr(objective, "step_law"):
    raise ValueError(
      f"{deaf[0]} means nothing to {type(objective).__name__}, which moves "
      "vectors and draws no tokens: leave it out"
    )
  for name in ("logit_bias", "end_ids"):
    for token in getattr(row, name) or ():
      if not 0 <= token < objective.vocab_size:
        raise ValueError(
          f"{name} has token {token}, outside the vocabulary [0, "
          f"{objective.vocab_size}): use ids of the model's tokenizer"
        )


def _check_steps(wanted: int | None, most: int | None) -> None:
  """Raises ValueError unless a row may have steps, of a sampler with so many."""
  if wanted is None:
    return
  if most is None:
    raise ValueError(
      "steps of a row mean nothing to this sampler, which plans all of them from "
      "the start: leave them out, or choose another sampler.steps"
    )
  if wanted > most:
    raise ValueError(
      f"steps must be at most {most}, the network calls for a block of this "
      f"sampler, not {wanted}: choose a higher sampler.steps"
    )


def _padded(
  name: str, rows: Sequence[Sequence], empty: float, room: int
) -> np.ndarray:
  """Returns rows of one length, `[B, room]`."""
  most = max(map(len, rows), default=0)
  if most > room:
    raise ValueError(
      f"{name} has {most} tokens: there is room for {room}, leave some out"
    )
  kind = np.float32 if isinstance(empty, float) else np.int32
  made = np.full((len(rows), room), empty, kind)
  for i, row in enumerate(rows):
    made[i, : len(row)] = row
  return made


def known(
  requests: Requests,
  policy: Policy,
  tokens: Int[Array, "B T"],
  free: Bool[Array, "B T"],
  window: Window,
) -> Rows:
  """Returns what a policy gets to know of rows, in a window of their canvases."""
  options, objective = requests.options, policy.objective
  count = lambda among: _counts(tokens, among, objective)
  if options is None:
    return Rows(counts=count(requests.valid) if policy.counts else None)
  early = jnp.cumsum(free, axis=1) <= options.min_tokens[:, None]
  both = lambda: (count(requests.valid), count(free))
  none = lambda: jax.tree.map(jnp.zeros_like, jax.eval_shape(both))
  counts, written = lax.cond(options.penalises, both, none)
  early = take(early & free, window)
  return Rows.of(options, counts=counts, written=written, early=early)


def _counts(
  tokens: Int[Array, "B T"], among: Bool[Array, "B T"], objective: Objective
) -> Int[Array, "B 1 V"]:
  """Returns how often each token stands in some slots, masks left out."""
  mask_id = -1 if objective.mask_id is None else objective.mask_id
  real = among & (tokens != mask_id)
  zeros = jnp.zeros((objective.vocab_size,), jnp.int32)
  row = lambda tokens, real: zeros.at[tokens].add(real.astype(jnp.int32))
  return jax.vmap(row)(tokens, real)[:, None]
