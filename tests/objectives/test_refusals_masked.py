"""Settings that a masked objective cannot have, refused when it is made."""

import pytest

from dllm_jax.core.schedule import LogLinear, Sine
from dllm_jax.objectives.autoregressive import Autoregressive
from dllm_jax.objectives.bd3lm import BD3LM
from dllm_jax.objectives.dream import Dream
from dllm_jax.objectives.genmd4 import GenMD4
from dllm_jax.objectives.llada import LLaDA
from dllm_jax.objectives.md4 import MD4
from dllm_jax.objectives.mdlm import MDLM

_SPACE = {"vocab_size": 4, "mask_id": 3}


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: MDLM(**_SPACE, steps=0), "at least 1"),
    (lambda: MDLM(**_SPACE, time_change="other"), "unknown time_change"),
    (lambda: MDLM(**_SPACE, weighting="none"), "legal: bound, uniform"),
    (lambda: MDLM(**_SPACE, time_rule="antithetic"), "stratified"),
    (
      lambda: MDLM(
        **_SPACE, schedule=Sine(), time_change="importance_sampling"
      ),
      "supports the schedules",
    ),
    (
      lambda: MDLM(**_SPACE, steps=3, time_change="change_of_variables"),
      "set steps to None",
    ),
    (
      lambda: MDLM(
        **_SPACE,
        schedule=LogLinear(floor=0.0),
        time_change="importance_sampling",
      ),
      "floor above 0",
    ),
    (lambda: MD4(**_SPACE, schedule=Sine()), "ceiling below 1"),
    (lambda: MD4(**_SPACE, spacing="even"), "legal: cosine, uniform"),
    (lambda: GenMD4(**_SPACE, power=0.0), "power"),
    (lambda: GenMD4(vocab_size=4), "mask_id"),
    (
      lambda: BD3LM(**_SPACE, length=6, block_size=4),
      "divide the length 6",
    ),
    (
      lambda: BD3LM(
        **_SPACE, length=4, block_size=2, clip_low=0.9, clip_high=0.2
      ),
      "low < high",
    ),
    (
      lambda: BD3LM(**_SPACE, length=4, block_size=2, steps=4),
      "continuous",
    ),
    (lambda: LLaDA(**_SPACE, random_length=1.5), "probability"),
    (lambda: Dream(**_SPACE, cart_decay=0.0), "cart_decay"),
    (lambda: Dream(**_SPACE, anneal_steps=-1), "anneal_steps"),
    (lambda: Autoregressive(vocab_size=4), "mask_id"),
    (lambda: Autoregressive(**_SPACE, bos_id=9), "bos_id 9"),
  ],
)
def test_impossible_settings_are_refused(make, message):
  with pytest.raises(ValueError, match=message) as error:
    make()
  assert "\n" not in str(error.value)
