"""LLaDA, Dream and block diffusion against arrays of dLLM's trainers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core import schedule as schedules
from dllm_jax.core.types import Process
from dllm_jax.objectives.base import Drawn
from dllm_jax.objectives.bd3lm import BD3LM
from dllm_jax.objectives.dream import Annealed, Dream
from dllm_jax.objectives.llada import LLaDA
from tests import golden_cases, quick
from tests.objectives import recorded, toy


@pytest.fixture(scope="module")
def dllm():
  return golden_cases.load("dllm")


_DLLM_SCHEDULES = {"linear": schedules.Linear(), "cosine": schedules.Sine()}


def _dllm(case, cls, **fields):
  fields = {
    "vocab_size": case.config["vocab_size"],
    "mask_id": case.config["mask_token_id"],
    "time_epsilon": case.config["time_epsilon"],
    "parameterisation": "softmax",
  } | fields
  if cls is BD3LM:
    fields["length"] = case.arrays["input_ids"].shape[1]
    fields["block_size"] = case.config["block_size"]
  return cls(**fields)


@pytest.mark.parametrize("name", _DLLM_SCHEDULES)
def test_dllm_schedules(dllm, name):
  a, schedule = dllm.arrays, _DLLM_SCHEDULES[name]
  objective = _dllm(dllm, LLaDA, schedule=schedule)
  alpha, dalpha, weight, masked, stay = recorded.told(
    lambda t: (
      schedule.alpha(t),
      schedule.dalpha(t),
      schedule.weight(t),
      schedule.masked(t),
      objective.stay(t[1:], t[:-1]),
    ),
    a["grid_t"],
  )
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  close(alpha, a[f"{name}_alpha"])
  close(dalpha, a[f"{name}_dalpha"])
  # The original adds 1e-6 to 1 - alpha.
  tolerance = 5e-4 + 1e-6 / masked.min()
  np.testing.assert_allclose(weight, a[f"{name}_weight"], rtol=tolerance)
  np.testing.assert_allclose(
    stay, a[f"{name}_reverse_mask_prob"], rtol=1e-3, atol=1e-6
  )


@pytest.mark.parametrize("name", _DLLM_SCHEDULES)
def test_dllm_corruption(dllm, monkeypatch, name):
  a = dllm.arrays
  objective = _dllm(dllm, LLaDA, schedule=_DLLM_SCHEDULES[name])
  t = (1.0 - objective.time_epsilon) * recorded.column(a["uniform_t"])
  t = t + objective.time_epsilon
  recorded.replay(monkeypatch, a["uniform_mask"])
  z = recorded.told(
    objective.corrupt, Process(), jax.random.key(0), a["input_ids"], t
  )
  z = np.where(a["labels"] != -100, z, a["input_ids"])
  np.testing.assert_array_equal(z, a[f"noised_{name}"])


def _dllm_loss(case, objective, name, labels, logits):
  a = case.arrays
  t = (1.0 - objective.time_epsilon) * a["uniform_t"].reshape(-1, 1)
  t = np.float32(t + objective.time_epsilon)
  drawn = Drawn(t=jnp.asarray(t), z=jnp.asarray(a[f"noised_{name}"]))
  if isinstance(objective, LLaDA):
    length = jnp.asarray(np.full(len(t), a["input_ids"].shape[1]))
    drawn = Annealed(t=drawn.t, z=drawn.z, length=length)
  # The original's 1e-6 in the weight's denominator, beside rounding.
  masked = recorded.told(objective.schedule.masked, drawn.t)
  tolerance = 1e-5 + 2e-6 / float(masked.min())
  loss = toy.loss(
    objective,
    objective.init(jax.random.key(0)),
    recorded.network(logits),
    drawn,
    recorded.batch(a["input_ids"], labels != -100),
  )
  return loss, tolerance


@pytest.mark.parametrize(
  "case",
  quick.few(
    list(
      itertools.product(
        ("token", "sequence", "batch"),
        ("scheduler", "uniform"),
        _DLLM_SCHEDULES,
        (LLaDA, BD3LM),
      )
    ),
    set,
  ),
)
def test_dllm_loss(dllm, case):
  a, (rule, weighting, name, cls) = dllm.arrays, case
  objective = _dllm(
    dllm,
    cls,
    schedule=_DLLM_SCHEDULES[name],
    normalisation=rule,
    weighting={"scheduler": "bound"}.get(weighting, weighting),
  )
  kind = "mdlm" if cls is LLaDA else "bd3lm"
  length = a["input_ids"].shape[1]
  logits = a["logits"][:, :length] if cls is LLaDA else a["logits"]
  loss, tolerance = _dllm_loss(dllm, objective, name, a["labels"], logits)
  np.testing.assert_allclose(
    loss.total / loss.weight,
    a[f"loss_{kind}_{name}_{weighting}_{rule}"],
    rtol=tolerance,
  )
  if rule == "token" and weighting == "scheduler":
    np.testing.assert_allclose(
      loss.bound,
      a[f"token_nll_{kind}_{name}_{weighting}"],
      rtol=tolerance,
      atol=1e-6,
    )


def test_dllm_shifted_loss(dllm):
  a = dllm.arrays
  objective = _dllm(dllm, Dream, token_weights="time", normalisation="token")
  logits = a["logits"][:, : a["input_ids"].shape[1]]
  loss, tolerance = _dllm_loss(
    dllm, objective, "linear", a["labels_shift"], logits
  )
  np.testing.assert_allclose(
    loss.total / loss.weight, a["loss_mdlm_right_shift"], rtol=tolerance
  )
