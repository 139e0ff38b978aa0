"""The law of one call's text, by enumeration of all texts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.sampling.constraints import paths
from tests.sampling.constraints import tiny

PATTERN = "(ab)+b?"
ROWS = 4000
LAW, AT = tiny.product_law()
WANTED = tiny.conditional(PATTERN, LAW)


@pytest.fixture(scope="module")
def proposed():
  """Texts of one language by one compiled program: drawn, and the last the best."""
  made = tiny.requests([PATTERN]).languages

  @jax.jit
  def run(law, u):
    rows = lambda x: jnp.repeat(x, ROWS, axis=0)
    free = jnp.ones((1, tiny.LENGTH), bool)
    alive = paths.reach(made, jnp.zeros_like(free, jnp.int32), free)
    sums, best = paths.weights(law, made, made.kinds)
    path, factor = paths.propose(
      jax.tree.map(rows, made),
      rows(sums),
      rows(best),
      given=jnp.full((ROWS, tiny.LENGTH), -1),
      inside=rows(made.inside),
      start=jnp.zeros(ROWS, jnp.int32),
      last=rows(alive[:, -1]),
      warm=jnp.arange(ROWS) < ROWS - 1,
      u=u,
    )
    return path, factor[0], alive[0]

  law = jnp.log(jnp.array(AT, jnp.float32))
  law = jnp.pad(law, ((0, 0), (0, 1)), constant_values=-1e30)[None]
  u = jax.random.uniform(jax.random.key(1), (ROWS, tiny.LENGTH, 2))
  return made, *map(np.asarray, run(law, u))


def test_texts_have_the_law_of_the_language(proposed):
  made, path, _, _ = proposed
  # Each class of this language is one token.
  token = {int(c): t for t, c in enumerate(np.asarray(made.classes[0])) if c}
  tokens = np.array([[token[int(c)] for c in row] for row in path])
  found = tiny.frequency(tokens[:-1])
  assert not found[WANTED == 0].any()
  # A perfect sampler is off by 0.4 sqrt(17 / rows) = 0.026.
  assert np.abs(found - WANTED).sum() / 2 < 0.045
  assert tokens[-1].tolist() == tiny.SEQUENCES[WANTED.argmax()].tolist()


def test_factors_give_the_marginal_law(proposed):
  made, _, factor, _ = proposed
  classes = np.asarray(made.classes[0])
  for slot in range(tiny.LENGTH):
    law = AT[slot] * np.exp(factor[slot][classes[:4]])
    exact = [WANTED[tiny.SEQUENCES[:, slot] == t].sum() for t in range(4)]
    np.testing.assert_allclose(law / law.sum(), exact, atol=1e-5)


def test_reach_is_that_of_all_texts(proposed):
  made, _, _, alive = proposed
  assert alive[:, 0].tolist() == [True, True, True, True, False]
  assert alive[-1].sum() == 3  # two that accept, and that behind the end
