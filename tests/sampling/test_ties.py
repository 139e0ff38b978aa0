"""The margins of choices, worked out by hand."""

import numpy as np

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
