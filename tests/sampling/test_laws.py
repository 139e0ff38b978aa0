"""The law of samples: policies that should follow the process do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.types import Process
from dllm_jax.objectives.llada import LLaDA
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.sampling.policies.ancestral import Ancestral
from dllm_jax.sampling.policies.remasking import (
  Cap,
  FlowCorrector,
  ForwardBackward,
  ReMDM,
)
from dllm_jax.sampling.policies.renoising import Psi
from dllm_jax.sampling.policies.selection import Chance, Even
from dllm_jax.sampling.policies.unmasking import FirstHitting, Unmasking
from dllm_jax.sampling.program import Sampler
from dllm_jax.sampling.requests import Requests
from tests import toys
from tests.quick import long
from tests.sampling import published

LENGTH, ROWS = 3, 20_000
M = MDLM(vocab_size=4, mask_id=3)
L = LLaDA(vocab_size=4, mask_id=3)
POLICIES = {
  "first_hitting": FirstHitting(objective=M, steps=3),
  "cosine_grid": Ancestral(objective=M, steps=60, spacing="cosine"),
  "one_random_slot": Unmasking(
    objective=M, steps=3, score="random", selection=Even()
  ),
  "origin": Unmasking(objective=L, steps=60, selection=Chance()),
  "remdm": ReMDM(objective=L, steps=60, rule=Cap(eta=0.05)),
  "forward_backward": ReMDM(objective=L, steps=60, rule=ForwardBackward()),
  "flow_corrector": ReMDM(objective=L, steps=60, rule=FlowCorrector()),
  "psi": Psi(objective=L, steps=60, kappa=0.9),
}


# Those of three steps.
QUICK = ("first_hitting", "one_random_slot")


@pytest.mark.parametrize(
  "name", [name if name in QUICK else long(name) for name in POLICIES]
)
@pytest.mark.few(1)
def test_samples_follow_the_joint_law(name):
  sequences, p = toys.joint(3, tokens=3, length=LENGTH)
  requests = Requests(
    tokens=jnp.zeros((ROWS, LENGTH), jnp.int32),
    fixed=jnp.zeros((ROWS, LENGTH), bool),
    valid=jnp.ones((ROWS, LENGTH), bool),
    request=jnp.arange(ROWS),
  )
  out = published.quick(
    Sampler(policy=POLICIES[name], length=LENGTH),
    toys.tabular(3, LENGTH, mask_id=3),
    jnp.array(p, jnp.float32),
    Process(),
    jax.random.key(11),
    requests,
  )
  index = np.asarray(out.tokens) @ np.array([9, 3, 1])
  frequency = np.bincount(index, minlength=len(p)) / ROWS
  # A perfect sampler is off by 0.4 sqrt(27 / rows) = 0.015; steps are finite.
  assert np.abs(frequency - p).sum() / 2 < 0.03
