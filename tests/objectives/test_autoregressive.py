"""What the autoregressive network sees first, and what counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.types import Batch, ModelOutputs, Process
from dllm_jax.objectives.autoregressive import Autoregressive
from dllm_jax.objectives.base import TokenSpace

VOCAB, MASK, BOS, EOS = 8, 7, 6, 5


def look(objective, tokens, given=0):
  """Returns what the network was shown, None where nothing, and what counted."""
  tokens = jnp.asarray([tokens])
  slots = jnp.arange(tokens.shape[1])[None]
  batch = Batch(
    tokens=tokens,
    loss_mask=slots >= given,
    segment_ids=jnp.ones_like(tokens),
    positions=slots,
  )
  seen = []

  def denoise(inputs):
    seen.append(jnp.where(inputs.segment_ids > 0, inputs.latent, -1))
    return ModelOutputs(hidden=jnp.zeros((*tokens.shape, VOCAB)))

  step, process = jnp.int32(0), Process()
  drawn = objective.draw(process, jax.random.key(0), batch, step=step)
  loss = objective.loss(process, denoise, drawn, batch, step=step)
  counted = np.asarray(loss.bound)[0] > 0
  assert float(loss.weight) == counted.sum()
  shown = np.asarray(seen[0])[0].tolist()
  return [None if i < 0 else i for i in shown], counted.tolist()


def space(**ids):
  return TokenSpace(vocab_size=VOCAB, mask_id=MASK, length=4, **ids)


@pytest.mark.parametrize(
  ("ids", "begins", "begin"),
  [
    ({}, True, MASK),
    ({"eos_id": EOS}, True, MASK),  # as its rows were trained
    ({"eos_id": EOS}, False, EOS),
    ({"bos_id": BOS, "eos_id": EOS}, True, BOS),
    ({"bos_id": BOS, "eos_id": EOS}, False, BOS),
    ({}, False, MASK),
  ],
)
def test_a_first_token_is_predicted_from_what_stands_before(ids, begins, begin):
  objective = Autoregressive.over(space(**ids), begins=begins)
  assert look(objective, [1, 2, 3]) == ([begin, 1, 2], [True] * 3)
  # A row that begins with the end of another text: it counts as any token.
  expected = ([begin, EOS, 1], [True] * 3)
  assert look(objective, [EOS, 1, 2]) == expected
  shown, counted = look(objective, [1, 2, 3], given=1)
  assert shown == [begin if begins else None, 1, 2]
  assert counted == [False, True, True]


@pytest.mark.parametrize("begins", [True, False])
def test_a_bos_that_a_text_has_stands_there_once(begins):
  objective = Autoregressive.over(space(bos_id=BOS), begins=begins)
  shown, counted = look(objective, [BOS, 1, 2])
  assert shown == [None, BOS, 1] and counted == [False, True, True]
