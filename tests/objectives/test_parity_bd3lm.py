"""BD3-LM against arrays that the published code computed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core import schedule as schedules
from dllm_jax.core.mask import TwoStream
from dllm_jax.core.types import ModelOutputs, Process
from dllm_jax.objectives.base import Drawn
from dllm_jax.objectives.bd3lm import BD3LM, BlockCosine, Square, SquareRoot
from tests import golden_cases
from tests.objectives import recorded, recorded_dit, toy


@pytest.fixture(scope="module")
def bd3lm():
  return golden_cases.load("bd3lm")


_BD3_SCHEDULES = {
  "loglinear": schedules.Linear(),
  "square": Square(),
  "square_root": SquareRoot(),
  "log": schedules.Logarithmic(),
  "cosine": BlockCosine(),
}


def _bd3(case, **fields):
  return BD3LM(
    vocab_size=case.config["vocab_size"],
    mask_id=case.config["mask_index"],
    length=case.config["config"]["model"]["length"],
    block_size=case.config["config"]["block_size"],
    time_epsilon=case.config["config"]["training"]["sampling_eps"],
    **fields,
  )


def test_bd3lm_masks(bd3lm):
  names = [re.match(r"mask_n(\d+)_b(\d+)$", k) for k in bd3lm.arrays]
  names = [m for m in names if m]
  assert names
  for m in names:
    slots = np.arange(2 * int(m[1]))
    mask = TwoStream(int(m[1]), int(m[2])).allowed(slots[:, None], slots[None])
    np.testing.assert_array_equal(mask, bd3lm.arrays[m[0]])


@pytest.mark.parametrize("name", _BD3_SCHEDULES)
def test_bd3lm_schedules(bd3lm, name):
  a, schedule = bd3lm.arrays, _BD3_SCHEDULES[name]
  t = jnp.asarray(a["grid_t"])
  masked, weight = recorded.told(
    lambda t: (schedule.masked(t), schedule.weight(t)), t
  )
  np.testing.assert_allclose(
    masked, a[f"noise_{name}_move_chance"], rtol=1e-4, atol=1e-6
  )
  np.testing.assert_allclose(
    -weight,
    a[f"noise_{name}_loss_scale"],
    rtol=1e-3,  # theirs subtracts from 1 in float32
  )


def _clip_bounds(a):
  """Returns the interval of `t_sampled_clip`, which the options do not name.

  Times are linear in stratified uniforms: two of them give both ends, to three
  decimals; all the others are a check.
  """
  u, blocks = a["t_uniform_clip"].astype(np.float64), a["t_uniform_clip"].size
  u = ((u.ravel() + np.arange(blocks)) / blocks) % 1.0
  t = a["t_sampled_clip"]
  t = t[:, :: t.shape[1] // a["t_uniform_clip"].shape[1]].ravel()
  slope = (t[-1] - t[0]) / (u[-1] - u[0])
  low = t[0] - slope * u[0]
  return round(low, 3), round(low + slope, 3)


@pytest.mark.parametrize("clip", ["", "_clip"])
def test_bd3lm_times(bd3lm, monkeypatch, clip):
  a, objective = bd3lm.arrays, _bd3(bd3lm)
  process = objective.init(jax.random.key(0))
  if clip:
    process = objective.clipped(process, _clip_bounds(a))
  recorded.replay(monkeypatch, a[f"t_uniform{clip}"])
  t = objective.block_times(process, jax.random.key(0), a["x0"].shape)
  np.testing.assert_allclose(t, a[f"t_sampled{clip}"], rtol=1e-5)


def test_bd3lm_log_probabilities(bd3lm):
  a = bd3lm.arrays
  found = recorded.told(
    lambda logits, z: _bd3(bd3lm).log_x0(Process(), logits, z, None),
    a["logits"],
    a["xt"],
  )
  possible = a["logprobs"] > -1e5  # the original writes -1e6 for -inf
  np.testing.assert_allclose(
    found[possible], a["logprobs"][possible], atol=2e-4
  )
  assert np.all(np.isneginf(found[~possible]))


def _told_of_the_first_block(case, inputs):
  """Returns logits of the recorded weights, told the time as the original.

  Deviates: there a row is told sigma of its first block, here every block its
  own; no published network was told any.
  """
  sigma = schedules.LogLinear(floor=0.0).sigma(case.arrays["t"][:, :1])
  inputs = inputs.replace(conditioning=jnp.asarray(sigma))
  return recorded_dit.logits(recorded_dit.network("bd3lm"), inputs)


@pytest.mark.parametrize("name", [*_BD3_SCHEDULES, "tc"])
@pytest.mark.few(1)
def test_bd3lm_loss(bd3lm, name):
  a = bd3lm.arrays
  schedule = _BD3_SCHEDULES.get(name, _BD3_SCHEDULES["loglinear"])
  objective = _bd3(bd3lm, schedule=schedule, ignore_bos=True)
  # The original resets the first token of xt before it calls the network, the
  # recorded logits did not: where that changes the input, its block is out.
  mask_id, block = objective.mask_id, objective.block_size
  free = np.ones(a["x0"].shape, bool)
  free[a["xt"][:, 0] == mask_id, :block] = False
  z = a["xt"].copy()
  z[:, 0] = a["x0"][:, 0]
  seen = []

  def network(inputs):
    seen.append(inputs)
    if name == "tc":
      return ModelOutputs(hidden=_told_of_the_first_block(bd3lm, inputs))
    logits = a["logits"]
    return ModelOutputs(hidden=jnp.concatenate([logits, 0.0 * logits], axis=1))

  process = objective.init(jax.random.key(0))
  drawn = Drawn(t=jnp.asarray(a["t"]), z=jnp.asarray(z))
  batch = recorded.batch(a["x0"])

  def run(process, drawn):
    loss = objective.loss(process, network, drawn, batch, step=recorded.STEP)
    return loss, seen

  loss, seen = recorded.told(run, process, drawn)
  if name == "tc":  # the network has seen the first token
    free = np.ones_like(free)
  np.testing.assert_allclose(
    np.asarray(loss.bound)[free], a[f"loss_{name}"][free], rtol=1e-3, atol=1e-4
  )
  (inputs,) = seen
  np.testing.assert_array_equal(
    inputs.latent, np.concatenate([z, a["x0"]], axis=1)
  )
  assert inputs.mask == TwoStream(objective.length, block)
  np.testing.assert_array_equal(
    inputs.positions, np.tile(np.arange(objective.length), (len(z), 2))
  )


def test_bd3lm_mean_leaves_the_first_token_out(bd3lm):
  a, objective = bd3lm.arrays, _bd3(bd3lm, ignore_bos=True)
  batch = recorded.batch(a["x0"], a["loss_attention_mask"])
  process = objective.init(jax.random.key(0))
  drawn = Drawn(t=jnp.asarray(a["t"]), z=jnp.asarray(a["x0"]))
  network = recorded.network(np.tile(a["logits"], (1, 2, 1)))
  loss = toy.loss(objective, process, network, drawn, batch)
  assert float(loss.weight) == a["loss_token_mask"].sum()
  mean = (a["loss_loglinear"] * a["loss_token_mask"]).sum() / loss.weight
  np.testing.assert_allclose(mean, a["loss_mean"], rtol=1e-4)


@pytest.mark.parametrize("kind", ["step", "step_nucleus"])
def test_bd3lm_reverse_step(bd3lm, kind):
  a, objective = bd3lm.arrays, _bd3(bd3lm)
  block = objective.block_size
  canvas = a["sample_x"]
  z = canvas[:, -block:]
  masked = z == objective.mask_id
  theirs = a[f"{kind}_probs"].astype(np.float64)
  logits = a["sample_logprobs_uncached"][:, -block:]
  if kind == "step_nucleus":  # what the nucleus left of the predictions
    logits = np.log(theirs + 1e-30).astype(np.float32)
    logits[..., objective.mask_id] = 0.0
    logits = np.where(masked[..., None], logits, 0.0)
  t = a["step_t"]
  p, drawn = recorded.reverse_step(
    objective, Process(), logits, z, t, t - a["step_dt"], a["step_uniform"]
  )
  theirs = theirs / theirs.sum(-1, keepdims=True)
  np.testing.assert_allclose(p[masked], theirs[masked], rtol=1e-3, atol=1e-6)
  golden_cases.same_draws(
    drawn,
    a[f"{kind}_next"][:, -block:],
    recorded.ratios(p, a["step_uniform"]),
  )
