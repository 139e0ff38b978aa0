"""What is served: a run behind an engine, by name."""

import dataclasses
import time
from typing import Any

from dllm_jax.core.mask import BlockCausal, Causal
from dllm_jax.core.types import Objective
from dllm_jax.data.tokenizer import Tokenizer
from dllm_jax.run.run import Run
from dllm_jax.sampling import requests
from dllm_jax.sampling.presets import SamplerConfig
from dllm_jax.serving.decisions import Decider
from dllm_jax.serving.engine import Engine
from dllm_jax.serving.http.limits import Limits
from dllm_jax.serving.readings import Readings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """What is served.

  Attributes:
    name: what requests call it.
    created: when serving began, seconds since 1970.
    engine: what fills rows.
    tokenizer: text to tokens.
    objective: what the network was trained for.
    sampler: how the engine samples, as it was configured.
    limits: of a request.
    decider: what answers by labels.
    readings: what reads prompts.
  """

  name: str
  created: int
  engine: Engine
  tokenizer: Tokenizer
  objective: Objective
  sampler: SamplerConfig
  limits: Limits
  decider: Decider
  readings: Readings

  @classmethod
  def of(
    cls,
    run: Run,
    engine: Engine,
    *,
    name: str,
    sampler: SamplerConfig,
    limits: Limits,
    state: Any = None,
    use_ema: bool = True,
  ) -> "Model":
    """Returns the model of a run, behind an engine.

    Args:
      run: whose network.
      engine: what fills rows.
      name: what requests call it.
      sampler: how the engine samples.
      limits: of a request.
      state: whose parameters decide and read; by default the newest checkpoint's.
      use_ema: whether to use averaged parameters where there are any.
    """
    return cls(
      name=name,
      created=int(time.time()),
      engine=engine,
      tokenizer=run.tokenizer,
      objective=run.objective,
      sampler=sampler,
      limits=limits,
      decider=Decider(run, state=state, use_ema=use_ema),
      readings=Readings(
        run,
        rows=engine.slots,
        top=engine.sampler.policy.top,
        state=state,
        use_ema=use_ema,
      ),
    )

  @property
  def length(self) -> int:
    """Slots of a row, prompt and answer together."""
    return self.engine.sampler.length - requests.spare(self.objective)

  @property
  def sees_suffix(self) -> bool:
    """Whether a gap is filled with what follows it in view."""
    return not isinstance(self.objective.mask_spec, Causal | BlockCausal)

  @property
  def settings(self) -> dict[str, float]:
    """What pages offer to set, as it is where a request does not."""
    if hasattr(self.objective, "step_law"):
      return {}  # it draws no tokens
    given = self.sampler.options().given
    return {k: given[k] for k in ("temperature", "threshold") if k in given}
