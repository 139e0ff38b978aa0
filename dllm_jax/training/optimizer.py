"""The optimiser: AdamW or another of optax's, its schedule, mask and clipping."""

import dataclasses
import re
from typing import get_args, Literal

import jax
from jaxtyping import PyTree
import optax

from dllm_jax.training.frozen import is_leaf

Rounding = Literal["none", "stochastic", "nearest"]
"""What becomes of updates to parameters that a network has in bfloat16.

"none" keeps masters of them in float32 while they train; "stochastic" rounds each
update up or down at random, right on average (`core.rounding`), and "nearest"
loses those below 1/512 of a parameter, which at the rates of fine-tuning are
nearly all.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
  """An optimiser and its learning-rate schedule, to be built by `build`.

  Attributes:
    name: which of optax's rules: "adamw", "lion", "adafactor" or "muon".
    learning_rate: the peak learning rate.
    schedule: "constant", "cosine" (to `final_fraction` of the peak at the last
      step) or "wsd" (constant, then linear over the last `decay_steps`).
    warmup_steps: steps of linear warm-up from 0.
    decay_steps: steps of the final decay of "wsd".
    final_fraction: the last learning rate as a fraction of the peak.
    b1: decay of the first moment.
    b2: decay of the second moment.
    epsilon: added to the root of the second moment, so that a parameter without
      gradients does not divide by zero.
    weight_decay: decoupled weight decay, of matrices and embeddings only.
    clip_norm: the largest global norm of a gradient; 0 for no clipping.
    no_decay: a regular expression of parameter paths that never decay.
    train_only: a regular expression of parameter paths that train, the others
      being frozen; "" for all, or for adapters alone where there are any.
    rounding: of updates to parameters in bfloat16: "none" trains float32 masters
      (4 bytes more a parameter than the others), "stochastic" or "nearest".
  """

  name: Literal["adamw", "lion", "adafactor", "muon"] = "adamw"
  learning_rate: float = 3e-4
  schedule: Literal["constant", "cosine", "wsd"] = "cosine"
  warmup_steps: int = 100
  decay_steps: int = 0
  final_fraction: float = 0.1
  b1: float = 0.9
  b2: float = 0.99
  epsilon: float = 1e-8
  weight_decay: float = 0.0
  clip_norm: float = 1.0
  no_decay: str = r".*(norm|bias|scale).*|process/.*"
  train_only: str = ""
  rounding: Rounding = "none"

  def __post_init__(self):
    if self.name not in _RULES:
      raise ValueError(
        f"unknown optimizer {self.name!r}; legal: {', '.join(_RULES)}"
      )
    if self.schedule not in ("constant", "cosine", "wsd"):
      raise ValueError(
        f"unknown schedule {self.schedule!r}; legal: constant, cosine, wsd"
      )
    if self.rounding not in get_args(Rounding):
      raise ValueError(
        f"unknown optimizer.rounding {self.rounding!r}; legal:"
        f" {', '.join(get_args(Rounding))}"
      )
    if self.learning_rate <= 0 or self.warmup_steps < 0:
      raise ValueError(
        "learning_rate must be above 0 and warmup_steps at least 0, not "
        f"{self.learning_rate} and {self.warmup_steps}"
      )

  def learning_rates(self, steps: int) -> optax.Schedule:
    """Returns step -> learning rate, for a run of that many steps."""
    peak, final = self.learning_rate, self.learning_rate * self.final_fraction
    warmup = min(self.warmup_steps, steps)
    rest = max(steps - warmup, 1)
    if self.schedule == "constant":
      after = optax.constant_schedule(peak)
    elif self.schedule == "cosine":
      after = optax.cosine_decay_schedule(peak, rest, self.final_fraction)
    else:
      decay = min(self.decay_steps or rest // 5, rest)
      after = optax.linear_schedule(
        peak, final, max(decay, 1), transition_begin=rest - decay
      )
    if warmup == 0:
      return after
    # The first step already moves: step k of the warm-up has rate (k + 1) / n.
    ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([ramp, after], [warmup])

  def build(self, steps: int) -> optax.GradientTransformation:
    """Returns the optax transformation of what trains, for so many steps."""

    def decays(params: PyTree) -> PyTree:
      skip = re.compile(self.no_decay)
      return jax.tree_util.tree_map_with_path(
        lambda path, _: not skip.fullmatch(_name(path)), params
      )

    rule = _RULES[self.name](self, self.learning_rates(steps), decays)
    if self.clip_norm:
      rule = optax.chain(optax.clip_by_global_norm(self.clip_norm), rule)

    return rule

  def trains(self, params: PyTree) -> PyTree:
    """Returns True at the parameters that train.

    Raises:
      ValueError: none does.
    """
    only = re.compile(self.train_only or ".*")
    found = jax.tree_util.tree_map_with_path(
      lambda path, _: only.fullmatch(_name(path)) is not None,
      params,
      is_leaf=is_leaf,
    )
    if not any(jax.tree.leaves(found)):
      raise ValueError(
        f"optimizer.train_only {self.train_only!r} matches no parameter; paths"
        " are like model/layers/attention/q/kernel"
      )
    return found


def _name(path: tuple) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _adamw(o: Optimizer, rate, mask):
  return optax.adamw(
    rate, o.b1, o.b2, o.epsilon, weight_decay=o.weight_decay, mask=mask
  )


def _lion(o: Optimizer, rate, mask):
  return optax.lion(rate, o.b1, o.b2, weight_decay=o.weight_decay, mask=mask)


def _adafactor(o: Optimizer, rate, mask):
  return _decayed(optax.adafactor(), o, rate, mask)


def _muon(o: Optimizer, rate, mask):
  # Updates are as large as Adam's (arXiv:2502.16982, eq. 4), so that one
  # learning rate serves the matrices and what Adam updates.
  rule = optax.contrib.muon(
    1.0,
    adam_b1=o.b1,
    adam_b2=o.b2,
    eps=o.epsilon,
    muon_weight_dimension_numbers=_dimension_numbers,
    consistent_rms=0.2,
  )
  return _decayed(rule, o, rate, mask)


def _decayed(descent, o: Optimizer, rate, mask):
  """Returns a rule of rate 1, with a rate and decay in proportion to it."""
  return optax.chain(
    descent,
    optax.add_decayed_weights(-o.weight_decay, mask),
    optax.scale_by_learning_rate(rate, flip_sign=False),
  )


_Axes = optax.contrib.MuonDimensionNumbers
_MATRICES = (
  (r".*layers/attention/[qkv]/kernel", _Axes(1, (2, 3))),
  (r".*layers/attention/o/kernel", _Axes((1, 2), 3)),
  (r".*layers/(mlp|routed)/experts/(gate|up|down)", _Axes(2, 3)),
  (r".*layers/.*/(kernel|lora_a|lora_b)", _Axes(1, 2)),
)
"""Axes in and out of what Muon orthogonalises: each layer, each expert alone.

Embeddings, unembeddings, norms, biases and the process are Adam's, as in
https://kellerjordan.github.io/posts/muon.
"""


def _dimension_numbers(params: PyTree) -> PyTree:
  def axes(path, _):
    name = _name(path)
    return next((a for p, a in _MATRICES if re.fullmatch(p, name)), None)

  return jax.tree_util.tree_map_with_path(axes, params)


_RULES = {
  "adamw": _adamw,
  "lion": _lion,
  "adafactor": _adafactor,
  "muon": _muon,
}
