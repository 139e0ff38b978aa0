"""D3PM's matrices, schedules and refusals; 50k tokens in a thousand steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.schedule import LogLinear
from dllm_jax.core.types import ModelOutputs
from dllm_jax.objectives.d3pm import D3PM
from dllm_jax.objectives.d3pm_matrix import check_rows
from dllm_jax.objectives.d3pm_schedule import (
  CosineBeta,
  LinearBeta,
  MutualInformation,
)
from dllm_jax.objectives.d3pm_transition import (
  Absorbing,
  Band,
  Gaussian,
  MaskUniform,
  NearestNeighbour,
  Table,
  Uniform,
)
from tests.objectives import toy


def test_mutual_information_falls_linearly_with_absorbing_matrices():
  steps = 20
  betas = MutualInformation().betas(steps)
  keep = Absorbing().cumulative(betas).keep
  np.testing.assert_allclose(keep, 1 - np.arange(steps + 1) / steps, atol=1e-12)


@pytest.mark.parametrize(
  "schedule", [LinearBeta(), CosineBeta(), MutualInformation()], ids=repr
)
def test_betas_are_probabilities(schedule):
  betas = schedule.betas(50)
  assert betas.shape == (50,) and np.all((betas > 0) & (betas <= 1))
  assert np.all(np.diff(betas) > 0)


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory):
  """Returns the file of six points: two groups of three, far apart."""
  points = np.array([[0, 0], [0, 1], [1, 0], [9, 9], [9, 8], [8, 9]], float)
  path = tmp_path_factory.mktemp("embeddings") / "points.npy"
  np.save(path, points)
  return str(path)


def test_nearest_neighbours_are_doubly_stochastic(embeddings):
  kind = NearestNeighbour(embeddings=embeddings, neighbours=2)
  kernel = kind.kernel(6)
  np.testing.assert_allclose(kernel.sum(0), 1, atol=1e-9)
  np.testing.assert_allclose(kernel.sum(1), 1, atol=1e-9)
  np.testing.assert_allclose(kernel, kernel.T, atol=1e-9)
  assert not np.any(kernel[:3, 3:])  # far tokens are never reached
  np.testing.assert_allclose(
    kind.matrix(0.3, 6), 0.7 * np.eye(6) + 0.3 * kernel
  )
  objective = D3PM(vocab_size=6, transition=kind, steps=8)
  x0 = np.tile(np.arange(6), (64, 1))
  z = np.asarray(
    jax.jit(objective.corrupt)(
      objective.init(jax.random.key(0)),
      jax.random.key(1),
      x0,
      np.full((64, 1), 0.9, np.float32),
    )
  )
  assert np.array_equal(z // 3, x0 // 3) and np.any(z != x0)


def test_a_table_of_the_uniform_kernel_is_uniform(tmp_path):
  rows = tuple((0.25,) * 4 for _ in range(4))
  np.save(tmp_path / "kernel.npy", np.array(rows))
  logits = np.random.default_rng(0).normal(size=(1, 16, 4))
  x0, z = np.arange(16)[None] // 4, np.arange(16)[None] % 4
  t, s = (np.full((1, 1), x, np.float32) for x in (0.5, 0.2))
  found = []
  kinds = Uniform(), Table(rows=rows), Table(rows=str(tmp_path / "kernel.npy"))
  for kind in kinds:
    objective = D3PM(vocab_size=4, transition=kind, steps=10)
    assert hash(objective) == hash(objective)
    process = objective.init(jax.random.key(0))
    both = jax.jit(
      lambda process, objective=objective: (
        objective.token_terms(process, jnp.float32(logits), x0, z, t)[0],
        objective.posterior(process, jnp.float32(logits), z, t, s),
      )
    )
    found.append(both(process))
  for terms, log_p in found[1:]:
    np.testing.assert_allclose(terms, found[0][0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(log_p, found[0][1], rtol=1e-4, atol=1e-5)


def test_matrices_are_constants_of_the_process():
  objective = D3PM(vocab_size=4, transition=Gaussian(), steps=6)
  process = objective.init(jax.random.key(0))
  assert not jax.tree.leaves((process.params, process.state))
  assert process.constants["cumulative"].shape == (7, 4, 4)
  data = toy.batch(np.zeros((3, 5)))
  table = lambda inputs: ModelOutputs(hidden=jnp.ones((3, 5, 4)))

  @jax.jit
  def loss(process, key):
    step = jnp.int32(0)
    drawn = objective.draw(process, key, data, step=step)
    return objective.loss(process, table, drawn, data, step=step).total

  other = D3PM(vocab_size=4, transition=Band(bands=1), steps=6)
  first, second = (
    loss(x.init(jax.random.key(0)), jax.random.key(1))
    for x in (objective, other)
  )
  assert float(first) != float(second) and loss._cache_size() == 1


@pytest.mark.all
def test_fifty_thousand_tokens_in_a_thousand_steps():
  vocab, width = 50_257, 4
  objective = D3PM(vocab_size=vocab, transition=Uniform(), steps=1000)
  process = objective.init(jax.random.key(0))
  assert sum(x.size for x in jax.tree.leaves(process)) < 10_000
  unembed = jax.random.normal(jax.random.key(1), (width, vocab))
  data = toy.batch(np.full((2, 16), 7))

  def network(inputs):
    hidden = jax.nn.one_hot(inputs.latent % width, width)
    return ModelOutputs(hidden=hidden, unembed=unembed)

  @jax.jit
  def run(process, key):
    step = jnp.int32(0)
    drawn = objective.draw(process, key, data, step=step)
    loss = objective.loss(process, network, drawn, data, step=step)
    prior = objective.prior(toy.keyed(0, 2, 16), (2, 16))
    t, s = jnp.full((2, 1), 1.0), jnp.full((2, 1), 0.999)
    out = network(objective.inputs(process, prior, t, data))
    z = objective.reverse(process, toy.keyed(1, 2, 16), out, prior, t, s)
    return loss, prior, z

  loss, prior, z = run(process, jax.random.key(2))
  assert np.isfinite(loss.total) and np.all(loss.bound >= -1e-3)
  assert np.unique(prior).size == 32  # two of 32 meet once in a hundred times
  assert z.shape == (2, 16) and int(z.max()) < vocab


def test_grid_is_of_whole_steps():
  objective = D3PM(vocab_size=4, steps=10)
  few, steps, told = jax.jit(
    lambda: (
      objective.grid(4),
      objective.step(objective.grid(10)),
      objective.conditioning(jnp.array([0.1])),
    )
  )()
  np.testing.assert_allclose(few, np.array([10, 8, 5, 2, 0]) / 10, atol=1e-6)
  assert np.array_equal(steps, np.arange(11)[::-1])
  np.testing.assert_allclose(told, [0.0])


def _with(**fields):
  return lambda: D3PM(**({"vocab_size": 4} | fields))


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (_with(steps=0), "at least T = 1"),
    (
      _with(schedule=LogLinear()),
      "does not support the schedule.*legal: linear",
    ),
    (_with(transition="uniform"), "does not support the transition"),
    (_with(mask_id=3), "mask_id 3 may not lie inside"),
    (
      _with(transition=Gaussian(), mask_id=3),
      "Gaussian transitions have no mask",
    ),
    (_with(transition=Absorbing()), "need a mask_id"),
    (
      _with(transition=MaskUniform(), mask_id=3, support="vocabulary"),
      "real tokens",
    ),
    (_with(epsilon=-1.0), "at least 0"),
    (_with(final="x"), "unknown final"),
    (_with(transition=Gaussian(), vocab_size=50_000), "closed form"),
    (
      _with(transition=Table(rows=((0.5, 0.4), (0, 1))), vocab_size=2),
      "row 0 of the transition matrix sums to 0.9, not 1",
    ),
    (
      _with(transition=Table(rows=((1.5, -0.5), (0, 1))), vocab_size=2),
      "negative probability",
    ),
    (
      _with(transition=Table(rows=((0.5, 0.5), (0, 1)))),
      "must be 4 x 4, not 2 x 2",
    ),
    (lambda: D3PM(vocab_size=4, steps=5).grid(6), "1 to T = 5 steps"),
    (lambda: LinearBeta(start=0.5, stop=0.1), "start <= stop"),
    (lambda: MaskUniform(mask_fraction=2.0), "mask_fraction"),
    (lambda: Band(bands=0), "bands must be"),
    (lambda: Band(normalise="x"), "unknown normalise"),
  ],
)
def test_impossible_settings_are_refused(make, message):
  with pytest.raises(ValueError, match=message) as caught:
    make()
  assert "\n" not in str(caught.value)


def test_missing_files_are_named(embeddings):
  with pytest.raises(FileNotFoundError, match="no file nowhere.npy"):
    NearestNeighbour(embeddings="nowhere.npy")
  with pytest.raises(ValueError, match="one row for each token"):
    D3PM(vocab_size=4, transition=NearestNeighbour(embeddings=embeddings))
  check_rows(np.eye(3), 3)
