"""What a method puts in the place of a run's own objective."""

import dataclasses
from typing import Any

from dllm_jax.core.types import Objective


@dataclasses.dataclass(frozen=True, kw_only=True)
class InPlaceOf:
  """What a `Trainer` minimises instead: `draw` and `loss` are a method's own.

  All else that is asked of it is the objective's.

  Attributes:
    objective: how the network was trained.
  """

  objective: Objective

  def __getattr__(self, name: str) -> Any:
    return getattr(self.objective, name)
