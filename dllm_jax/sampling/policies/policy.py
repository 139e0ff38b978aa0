"""What a policy is to the sampling program."""

from collections.abc import Mapping
from typing import Any, Protocol

from jaxtyping import Array, Bool, Float, Int, PyTree

from dllm_jax.core.types import (
  Guide,
  ModelOutputs,
  Noise,
  Objective,
  Process,
)


class Policy(Protocol):
  """How a window of the canvas is revealed; ancestral is one among others.

  Attributes:
    objective: the diffusion that the network was trained for.
    steps: network calls for each window, at most.
    extra: calls beyond `steps` that may follow on a full window.
    counts: whether `step` wants to know how often tokens stand in a row.
    forces: whether `step` can be told slots to reveal (`must`).
    idles: whether a step may leave a window as it was.
    stands: whether a token that a step reveals stays: else a window is final
      only when it is done.
    top: how many of the likeliest tokens `info` has of each draw.
    conditions: whether the network's next call is told what `step` says it said,
      `info["said"]`.
    resizes: whether some slots of a window may be out of use (`live`): whole
      canvases only, of which positions count what is in use.
    paces: whether rows may take fewer steps than it has.
    proposes: whether it reveals what is drawn at all slots together, so that a
      text can be kept in a language; there is then `weigh` and `takes_best`.
  """

  objective: Objective
  steps: int
  extra: int
  counts: bool
  forces: bool
  idles: bool
  stands: bool
  top: int
  conditions: bool
  resizes: bool
  paces: bool
  proposes: bool

  def least_steps(self, width: int) -> int:
    """Returns the fewest steps that finish a window of so many slots."""

  def init(
    self, process: Process, z: PyTree, window: Bool[Array, "B W"]
  ) -> Any:
    """Returns the state at a window's start, leaves `[B, ...]`.

    `window` is True at the slots that may change.
    """

  def time(self, state: Any) -> Float[Array, "B 1"]:
    """Returns the time that the network is told."""

  def live(self, state: Any) -> Bool[Array, "B W"]:
    """Returns which slots that may change are in use, if it resizes."""

  def done(
    self, process: Process, z: PyTree, state: Any, window: Bool[Array, "B W"]
  ) -> Bool[Array, "B"]:
    """Returns which rows need no further network call for this window."""

  def step(
    self,
    process: Process,
    noise: Noise,
    out: ModelOutputs | tuple[ModelOutputs, ...],
    z: PyTree,
    state: Any,
    active: Bool[Array, "B W"],
    *,
    window: Int[Array, "B W"] | None = None,
    guide: Guide | None = None,
    rows: Any = None,
    must: Bool[Array, "B W"] | None = None,
  ) -> tuple[PyTree, Any, Mapping[str, Array]]:
    """Returns (z, state, info) after one network evaluation.

    `active` is True at slots that may change now, `window` names the slots of
    `out` that predict z; `guide` joins the logits of several outputs; `rows` is
    what the rows chose (`sampling.policies.rows`); `must` is True where a token
    has to be revealed. info feeds the trace and says how likely draws were.
    """


def check_mask(policy: Policy) -> None:
  """Raises ValueError unless the objective has a mask."""
  if policy.objective.mask_id is None:
    raise ValueError(
      f"{type(policy).__name__} needs an objective with a mask token, which "
      f"{type(policy.objective).__name__} has not: use ancestral sampling"
    )


def check_literal(name: str, value: str, legal: tuple[str, ...]) -> None:
  """Raises ValueError unless the value is among the legal ones."""
  if value not in legal:
    raise ValueError(f"{name} must be one of {', '.join(legal)}, not {value!r}")
