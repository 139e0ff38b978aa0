"""Policies: which slots of a window are revealed after each network call.

Each is a frozen dataclass, static under jit, that meets `core.types.Policy` and
knows its objective and the number of steps in a window. State leaves are
`[B, ...]`: rows never see each other. Logits exist on chunks of positions only,
inside `reduce`; nothing here loops or clamps, which is the program's work.
"""

import dataclasses
from typing import Literal

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from dllm_jax.core.noise import Tag
from dllm_jax.core.types import ModelOutputs, Noise, Objective, Process
from dllm_jax.core.vocabulary import reduce
from dllm_jax.sampling.processors import compose, Logits, Processor


@struct.dataclass
class Progress:
  """How far each row is in its window.

  Attributes:
    step: network calls so far.
    maskable: slots that were masked when the window was entered.
  """

  step: Int[Array, "B"]
  maskable: Int[Array, "B"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stepwise:
  """What policies of a fixed number of steps share.

  Attributes:
    objective: the diffusion that the network was trained for.
    steps: network calls for each window.
    processors: applied to the network's logits in this order, the mask token
      forbidden first.
  """

  objective: Objective
  steps: int
  processors: tuple[Processor, ...] = ()

  def __post_init__(self):
    if self.steps < 1:
      raise ValueError(f"sampling needs at least 1 step, not {self.steps}")

  def init(
    self, process: Process, z: PyTree, window: Bool[Array, "B W"]
  ) -> Progress:
    """Returns the state at a window's start."""
    del process
    masked = window
    if self.objective.mask_id is not None:
      masked = window & (z == self.objective.mask_id)
    return Progress(
      step=jnp.zeros(window.shape[:1], jnp.int32),
      maskable=jnp.sum(masked, axis=1, dtype=jnp.int32),
    )

  def time(self, state: Progress) -> Float[Array, "B 1"]:
    """Returns the time that the network is told, from the objective's grid."""
    return self._times(state.step)

  def _times(self, step: Int[Array, "B"]) -> Float[Array, "B 1"]:
    return jnp.take(self.objective.grid(self.steps), step, mode="clip")[:, None]

  def _processed(self, logits: Logits, z: PyTree) -> Logits:
    if self.objective.mask_id is not None:
      is_mask = jnp.arange(logits.shape[-1]) == self.objective.mask_id
      logits = jnp.where(is_mask, -jnp.inf, logits)
    return compose(self.processors, logits, z)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ancestral(_Stepwise):
  """Draws z_s from p(z_s | z_t) on the objective's own grid of times.

  The law of the reverse process itself, for any objective: where tokens are
  revealed is left to chance. Processors act on the logits before the posterior.
  """

  def step(
    self,
    process: Process,
    noise: Noise,
    out: ModelOutputs | tuple[ModelOutputs, ...],
    z: PyTree,
    state: Progress,
    active: Bool[Array, "B W"],
    *,
    window: Int[Array, "B W"] | None = None,
  ) -> tuple[PyTree, Progress, dict[str, Array]]:
    """Returns (z, state, info) after one network evaluation."""
    del active  # The program keeps the other slots.
    z = self.objective.reverse(
      process,
      noise,
      out,
      z,
      self._times(state.step),
      self._times(state.step + 1),
      guide=self._guide if self.processors else None,
      window=window,
    )
    return z, state.replace(step=state.step + 1), {}

  def _guide(self, logits: Logits, z: PyTree, t: Array) -> Logits:
    del t
    return self._processed(logits, z)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Confidence(_Stepwise):
  """Reveals the slots of which the network is surest (LLaDA, arXiv:2502.09992).

  Each step draws a token at every masked slot and keeps a quota of them: of n
  masked slots at the window's start, step i reveals n // steps, and one more if
  i < n % steps. Equally sure slots are revealed from the left.

  Attributes:
    score: "confidence", the probability of the drawn token, or "random".
    read: whether that probability is the network's own ("network", LLaDA), or
      what the processors leave of it ("processed", Dream).
  """

  score: Literal["confidence", "random"] = "confidence"
  read: Literal["network", "processed"] = "network"

  def __post_init__(self):
    super().__post_init__()
    if self.objective.mask_id is None:
      raise ValueError(
        "confidence-ordered unmasking needs an objective with a mask token; "
        "use ancestral sampling"
      )
    _check_literal("score", self.score, ("confidence", "random"))
    _check_literal("read", self.read, ("network", "processed"))

  def step(
    self,
    process: Process,
    noise: Noise,
    out: ModelOutputs,
    z: Int[Array, "B W"],
    state: Progress,
    active: Bool[Array, "B W"],
    *,
    window: Int[Array, "B W"] | None = None,
  ) -> tuple[PyTree, Progress, dict[str, Array]]:
    """Returns (z, state, info) after one network evaluation."""
    del process

    def draw(logits, z, noise):
      processed = self._processed(logits, z)
      token = noise.categorical(Tag.TOKEN, processed)
      read = logits if self.read == "network" else processed
      picked = jnp.take_along_axis(read, token[..., None], axis=-1)[..., 0]
      sure = jnp.exp(picked - jax.nn.logsumexp(read, axis=-1))
      return token, sure

    token, sure = reduce(draw, out, z, noise, window=window)
    score = sure
    if self.score == "random":
      score = noise.uniform(Tag.CONFIDENCE, 1)[..., 0]
    masked = active & (z == self.objective.mask_id)
    rank = _rank(jnp.where(masked, score, -jnp.inf))
    base, extra = state.maskable // self.steps, state.maskable % self.steps
    quota = base + (state.step < extra)
    z = jnp.where(masked & (rank < quota[:, None]), token, z)
    return z, state.replace(step=state.step + 1), {"confidence": sure}


def _rank(score: Float[Array, "B W"]) -> Int[Array, "B W"]:
  """Returns how many slots come before each, best first, ties by slot."""
  order = jnp.argsort(-score, axis=-1, stable=True)
  return jnp.argsort(order, axis=-1)


def _check_literal(name: str, value: str, legal: tuple[str, ...]) -> None:
  if value not in legal:
    raise ValueError(f"{name} must be one of {', '.join(legal)}, not {value!r}")
