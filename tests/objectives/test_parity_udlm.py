"""UDLM and Duo against their originals: losses, posteriors and draws.

Relative tolerance 1e-4, as the golden sets state; where a network is run, 2e-4
on its logits.
"""

import re

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.noise import Recorded, Tag
from dllm_jax.core.schedule import Linear, LogLinear, Sine
from dllm_jax.core.types import ModelOutputs
from dllm_jax.objectives.base import Drawn
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.objectives.mixture import Parts
from dllm_jax.objectives.udlm import UDLM
from dllm_jax.sampling.policies.ancestral import Ancestral
from dllm_jax.sampling.policies.selection import Progress
from tests import golden_cases
from tests.objectives import recorded, recorded_dit, toy

_FORMS = ("direct", "rao_blackwell")
_FLOOR = 1e-3  # eps of the originals' schedules


def _close(found, expected):
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def _column(t):
  return jnp.asarray(t)[:, None]


def _parts(alpha):
  lost = 1.0 - _column(alpha)
  return Parts(1.0 - lost, lost, jnp.zeros_like(lost))


@pytest.fixture(scope="module")
def udlm():
  case = golden_cases.load("udlm")
  return case.config, case.arrays


@pytest.fixture(scope="module")
def duo():
  case = golden_cases.load("duo")
  return case.config, case.arrays


@pytest.mark.parametrize("form", _FORMS)
def test_continuous_loss_of_udlm(udlm, form):
  config, g = udlm
  # Its loss has alpha = 1 - t, its corruption and sampler the floor as well.
  objective = UDLM(
    vocab_size=config["vocab_size"], form=form, schedule=Linear()
  )
  loss = jax.jit(objective.token_loss)(
    None, g["log_x_theta"], g["x0"], g["xt"], _column(g["t"])
  )
  _close(loss, g["ct_diffusion_loss"])


class _TimesOfLogLinear(UDLM):
  """Alpha falls to 0, but the network is told log-linear sigma, as there."""

  def conditioning(self, t):
    return LogLinear(floor=_FLOOR).sigma(t)


@pytest.mark.parametrize("steps", [None, "T"])
@pytest.mark.few(1)
def test_loss_with_reconstruction(udlm, steps):
  config, g = udlm
  steps = config["T_variant"] if steps else None
  objective = _TimesOfLogLinear(
    vocab_size=config["vocab_size"],
    schedule=Linear(),
    steps=steps,
    reconstruction="network",
  )
  t = g["t"]
  if steps:
    t = np.float32(np.floor(t * steps) / steps + 1 / steps)
  drawn = Drawn(t=_column(t), z=g["xt"])
  network = recorded_dit.network("udlm")
  loss = toy.loss(objective, None, network, drawn, toy.batch(g["x0"]))
  name = "T_loss" if steps else "ct_loss"
  # 1e-5 a logit, times T, on terms of KL that are differences near zero.
  np.testing.assert_allclose(loss.bound, g[name], rtol=2e-4, atol=2e-4)
  np.testing.assert_allclose(loss.total, np.sum(g[name]), rtol=1e-4)


def _step(objective):
  """Returns `(log x, z, alpha_t, alpha_s) -> law` of a step, compiled."""

  @jax.jit
  def run(log_x, z, alpha_t, alpha_s):
    log_q = objective.reversed(log_x, z, _parts(alpha_t), _parts(alpha_s))
    return jnp.exp(log_q)

  return run


def _truth(g, objective):
  """Returns the logarithms of a network that knows the clean text."""
  clean = np.eye(objective.vocab_size, dtype=np.float32)[g["x0"]]
  return np.where(clean > 0, np.float32(0.0), np.float32(-np.inf))


def test_posteriors_of_udlm(udlm):
  config, g = udlm
  objective = UDLM(vocab_size=config["vocab_size"])
  step = _step(objective)
  for log_x, name in (
    (_truth(g, objective), "true"),
    (g["log_x_theta"], "pred"),
  ):
    q = step(log_x, g["xt"], g["alpha_t"], g["alpha_s"])
    _close(q, g[f"posterior_{name}"])


def test_reverse_step_of_udlm(udlm):
  config, g = udlm
  objective = UDLM(
    vocab_size=config["vocab_size"], schedule=LogLinear(floor=_FLOOR)
  )
  t, s = (
    np.float32(g[f"move_chance_{x}"][:, None] / (1 - _FLOOR)) for x in "ts"
  )
  q, drawn = recorded.reverse_step(
    objective, None, g["log_x_theta"], g["xt"], t, s, g["uniform"]
  )
  _close(q, g["ddpm_q_xs"])
  golden_cases.same_draws(
    drawn, g["ddpm_xs"], g["ddpm_q_xs"] / -np.log(g["uniform"] + 1e-10)
  )


@pytest.mark.parametrize("form", _FORMS)
def test_bound_of_duo(duo, form):
  config, g = duo
  t = _column(g["t"])
  # Its cosine is the sine curve read at (1 - eps) t, its slope unscaled.
  for schedule, time, name in (
    (LogLinear(floor=_FLOOR), t, "duo_nll"),
    (Sine(), (1 - _FLOOR) * t, "duo_nll_cosine"),
  ):
    objective = UDLM(
      vocab_size=config["vocab_size"], form=form, schedule=schedule
    )
    loss = jax.jit(objective.token_loss)(
      None, g["log_x_theta"], g["x0"], g["xt"], time
    )
    _close(loss, g[name])


def test_schedules_of_duo(duo):
  _, g = duo
  t = g["grid_t"]
  linear, sine = LogLinear(floor=_FLOOR), Sine()
  for schedule, time, name in (
    (linear, t, "loglinear"),
    (sine, np.float32((1 - _FLOOR) * t), "cosine"),
  ):
    alpha, dalpha = recorded.told(
      lambda t, s=schedule: (s.alpha(t), s.dalpha(t)), time
    )
    _close(alpha, g[f"noise_{name}_alpha"])
    _close(dalpha, g[f"noise_{name}_dalpha"])


def test_posteriors_of_duo(duo):
  config, g = duo
  objective = UDLM(vocab_size=config["vocab_size"])
  step, clean = _step(objective), np.ones_like(g["alpha_s"])
  for log_x, alpha_s, name in (
    (_truth(g, objective), g["alpha_s"], "true"),
    (g["log_x_theta"], g["alpha_s"], "pred"),
    (g["log_x_theta"], clean, "noise_removal"),
  ):
    q = step(log_x, g["xt"], g["alpha_t"], alpha_s)
    _close(q, g[f"posterior_{name}"])


def test_masked_diffusion_of_duo(duo):
  config, g = duo
  objective = MDLM(
    vocab_size=config["vocab_size"],
    mask_id=config["absorb_mask_index"],
    schedule=LogLinear(floor=_FLOOR),
  )
  z, logits = g["absorb_xt"], g["absorb_log_x_theta"]
  loss = toy.loss(
    objective,
    None,
    recorded.network(logits),
    Drawn(t=_column(g["t"]), z=z),
    toy.batch(g["absorb_x0"]),
  )
  _close(loss.bound, g["mdlm_nll"])
  t, s = (
    np.float32((1.0 - g[f"alpha_{x}"][:, None]) / (1 - _FLOOR)) for x in "ts"
  )
  masked = z == objective.mask_id
  q = np.exp(recorded.told(objective.posterior, None, logits, z, t, s))
  _close(q[masked], g["absorb_posterior"][masked])


@struct.dataclass
class _Law:
  """Noise that gives the whole law in place of a draw from it."""

  like: jax.Array

  def categorical(self, tag, logits):
    del tag
    return jax.nn.softmax(logits)


def _guided(objective, ends):
  """Returns `(gamma, logits, z, uniform) -> (law, draw)` of a guided step."""

  class OneStep(Ancestral):
    """A step between times of each row."""

    def times(self, step):
      return ends[step]

    def noted(self, law, token):
      """Returns nothing: what `_Law` draws is a law, and no token."""
      return {}

  policy, start = (
    OneStep(objective=objective, steps=1),
    Progress(step=0, maskable=0),
  )

  @jax.jit
  def run(gamma, logits, z, uniform):
    out = tuple(ModelOutputs(hidden=x) for x in logits)
    guide = lambda x, z, t: x[1] + gamma * (x[0] - x[1])
    tokens = Recorded(uniforms={Tag.TOKEN: uniform}, epsilon=1e-10)
    return [
      policy.step(
        None, noise, out, z, start, jnp.ones(z.shape, bool), guide=guide
      )[0]
      for noise in (_Law(like=z), tokens)
    ]

  return run


@pytest.mark.parametrize("state", ["uniform", "absorbing"])
def test_guidance_by_class(udlm, state):
  """Posteriors are mixed on uniform noise, and as well logits under masks."""
  config, g = udlm
  size, prefix = config["vocab_size"], "absorb_" * (state == "absorbing")
  chances = [g[f"move_chance_{x}"][:, None] for x in "ts"]
  ends = [jnp.asarray(np.float32(x / (1 - _FLOOR))) for x in chances]
  fields = {"vocab_size": size, "schedule": LogLinear(floor=_FLOOR)}
  if state == "uniform":
    objective, z = UDLM(**fields), g["xt"]
    logits = g["log_x_theta_cond"], g["log_x_theta_nullcond"]
  else:
    mask_id = config["mask_index"]
    objective, z = MDLM(**fields, mask_id=mask_id), g["absorb_xt"]
    run, none = recorded_dit.network("udlm"), config["config"]["data"]
    inputs = objective.inputs(None, z, ends[0], toy.batch(z))
    inputs = inputs.replace(conditioning=-np.log1p(-chances[0]))
    logits = [
      recorded_dit.logits(run, inputs.replace(cond=cond))
      for cond in (g["cond"], np.full_like(g["cond"], none["num_classes"]))
    ]
  names = [re.fullmatch(rf"{prefix}cfg_(.+)_q_xs", key) for key in g]
  names = [match for match in names if match]
  assert names
  step = _guided(objective, ends)
  for match in names:
    q, drawn = jax.device_get(step(float(match[1]), logits, z, g["uniform"]))
    expected = np.asarray(g[match[0]])
    noisy = np.ones(z.shape, bool)
    if state == "absorbing":
      noisy = np.asarray(z) == objective.mask_id
    np.testing.assert_allclose(q[noisy], expected[noisy], rtol=2e-4, atol=2e-6)
    golden_cases.same_draws(
      drawn,
      g[f"{prefix}cfg_{match[1]}_xs"],
      np.where(noisy[..., None], expected, np.eye(size)[z])
      / -np.log(np.asarray(g["uniform"]) + 1e-10),
    )
