"""Named samplers with the defaults they were published with."""

import dataclasses

from dllm_jax.core.types import Objective
from dllm_jax.sampling.policies import Ancestral
from dllm_jax.sampling.processors import Temperature, TopK, TopP
from dllm_jax.sampling.program import Sampler
from dllm_jax.sampling.unmasking import Unmasking

PRESETS = {
    "mdlm": (Ancestral, {"temperature": 1.0}),
    "llada": (Unmasking, {"temperature": 0.0}),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig:
  """How to sample, as a config or the command line says it.

  Attributes:
    preset: "mdlm" (ancestral: reveals at random, one draw each) or "llada"
      (reveals where the network is most confident).
    steps: network calls for each block; 0 for as many as the block has slots.
    block_length: slots sampled together, left to right; 0 for what the objective
      asks for, or the whole canvas.
    temperature: divides the logits; 0 takes the best token; -1 for the preset's.
    top_k: draw among the k best tokens; 0 for all.
    top_p: draw among the fewest tokens that hold this probability; 1 for all.
  """

  preset: str = "mdlm"
  steps: int = 0
  block_length: int = 0
  temperature: float = -1.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if self.preset not in PRESETS:
      raise ValueError(
          f"unknown sampler.preset {self.preset!r}; legal: {', '.join(PRESETS)}"
      )
    for name in ("steps", "block_length", "top_k"):
      if getattr(self, name) < 0:
        raise ValueError(
            f"sampler.{name} must be at least 0, not {getattr(self, name)}"
        )
    if not 0.0 < self.top_p <= 1.0:
      raise ValueError(
          f"sampler.top_p must lie in (0, 1], not {self.top_p}"
      )
    if self.temperature < 0 and self.temperature != -1.0:
      raise ValueError(
          "sampler.temperature must be at least 0, or -1 for the preset's, not "
          f"{self.temperature}"
      )

  def build(self, objective: Objective, *, length: int) -> Sampler:
    """Returns the sampler for a canvas.

    Args:
      objective: what the network was trained for.
      length: slots of the canvas.

    Raises:
      ValueError: a field does not fit the canvas.
    """
    policy, defaults = PRESETS[self.preset]
    temperature = self.temperature
    if temperature < 0:
      temperature = defaults["temperature"]
    processors = [Temperature(temperature)]
    if self.top_k:
      processors.append(TopK(self.top_k))
    if self.top_p < 1.0:
      processors.append(TopP(self.top_p))
    block = self.block_length or objective.block_length
    steps = self.steps or block or length
    if steps > (block or length):
      raise ValueError(
          f"sampler.steps {steps} is more than the {block or length} slots of a "
          "block; use at most one step a slot"
      )
    return Sampler(
        policy=policy(
            objective=objective, steps=steps, processors=tuple(processors)
        ),
        length=length,
        block_length=block,
    )
