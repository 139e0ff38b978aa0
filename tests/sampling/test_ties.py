"""The margins of choices, worked out by hand."""

import types

import jax
import numpy as np

from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.sampling.policies.unmasking import Unmasking
from dllm_jax.sampling.program import Sampler
from dllm_jax.sampling.requests import build
from tests import toys
from tests.sampling import ties

VOCAB, MASK = 7, 6


def test_a_margin_is_that_of_the_choice():
  p = np.full((4, VOCAB), 0.01)
  p[:, 3], p[:, 4] = [0.5, 0.4, 0.3, 0.2], [0.1, 0.2, 0.2, 0.1]
  canvas = lambda *tokens: np.array(tokens)
  token = ties._margin(p, canvas(3, MASK, 5, 6), canvas(4, MASK, 5, 6), MASK)
  np.testing.assert_allclose(token, 0.4)
  slot = ties._margin(p, canvas(3, MASK, 5, 6), canvas(MASK, 3, 5, 6), MASK)
  np.testing.assert_allclose(slot, 0.1)


def test_margins_are_found_at_the_first_difference():
  objective = MDLM(vocab_size=VOCAB, mask_id=MASK)
  policy = Unmasking(objective=objective, steps=2)
  spec = Sampler(policy=policy, length=4)
  denoiser = toys.mixer(VOCAB, 4)
  net = denoiser, jax.jit(denoiser.init)(jax.random.key(0), None)
  requests = build([[1, None, None, None]] * 2, objective=objective, length=4)
  start = np.array([[1, MASK, MASK, MASK]] * 2)

  def traced(*steps):
    frames = types.SimpleNamespace(tokens=np.array(steps))
    trace = types.SimpleNamespace(frames=frames, initial=start)
    return types.SimpleNamespace(trace=trace)

  same = [1, 2, MASK, MASK]
  one = traced([same, same], [[1, 2, 3, MASK], [1, 2, 3, MASK]])
  other = traced([same, same], [[1, 2, 3, MASK], [1, 2, 5, MASK]])
  (margin,) = ties.margins(spec, net, requests, one, other)
  p = ties._probabilities(spec, net, requests, 1, np.array(same))
  np.testing.assert_allclose(margin, abs(p[2, 3] - p[2, 5]), rtol=1e-6)
  np.testing.assert_allclose(p.sum(axis=1), 1.0, rtol=1e-5)
