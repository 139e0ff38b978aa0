"""Conversations that are packed count as each alone: loss, gradient and draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.types import Batch, Process
from dllm_jax.models import transformer, TransformerConfig
from dllm_jax.objectives import texts
from dllm_jax.objectives.base import Drawn
from dllm_jax.objectives.bd3lm import BD3LM
from dllm_jax.objectives.dream import Annealed, Dream
from dllm_jax.objectives.llada import Cut, LLaDA
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.parallel import global_batch, make_mesh

LENGTH, VOCAB, MASK = 16, 23, 22
# Two of each pair fill a row together; all are whole blocks of 4.
LENGTHS = [8, 4, 12, 4, 4, 8, 8, 8, 4, 12, 4, 4, 8, 4, 12, 4]


def _alone():
  """Returns a row for each conversation, and how long its prompt is."""
  rng = np.random.default_rng(0)
  rows = len(LENGTHS)
  slots = np.broadcast_to(np.arange(LENGTH), (rows, LENGTH))
  inside = slots < np.array(LENGTHS)[:, None]
  given = rng.integers(0, np.array(LENGTHS) - 1)[:, None]
  return Batch(
    tokens=np.where(inside, rng.integers(0, MASK, (rows, LENGTH)), 0),
    loss_mask=inside & (slots >= given),
    segment_ids=inside.astype(np.int32),
    positions=np.where(inside, slots, 0),
  )


def _packed(*arrays):
  """Returns arrays `[16, L]` of conversations, two in each of eight rows."""
  found = []
  for array in arrays:
    rows = np.zeros((8, LENGTH), array.dtype)
    for i, row in enumerate(array):
      start = LENGTHS[i - 1] if i % 2 else 0
      rows[i // 2, start : start + LENGTHS[i]] = row[: LENGTHS[i]]
    found.append(rows)
  return found


def _together(alone):
  numbered = alone.segment_ids * (1 + np.arange(len(LENGTHS)) % 2)[:, None]
  tokens, mask, segments, positions = _packed(
    alone.tokens, alone.loss_mask, numbered, alone.positions
  )
  return Batch(tokens, mask, segments, positions, texts_apart=True)


_SPACE = {"vocab_size": VOCAB, "mask_id": MASK}
_RULES = {
  "mdlm": MDLM(**_SPACE),
  "llada": LLaDA(**_SPACE, normalisation="sequence", random_length=0.0),
  "d1": LLaDA(**_SPACE, normalisation="token", random_length=0.0),
  "dllm_rl": LLaDA(
    **_SPACE,
    normalisation="masked_sequence",
    weighting="uniform",
    random_length=0.0,
  ),
  "batch": MDLM(**_SPACE, normalisation="batch", kept_weight=0.5),
  "illada": LLaDA(**_SPACE, mask_prompts=True, random_length=0.0),
  "dream": Dream(**_SPACE),
  "sdar": BD3LM(**_SPACE, length=LENGTH, block_size=4),
  "nemotron": BD3LM(
    **_SPACE,
    length=LENGTH,
    block_size=2,
    normalisation="sequence",
    autoregressive_weight=0.3,
  ),
}
_NETWORK = transformer(
  TransformerConfig(
    vocab_size=VOCAB, width=8, layers=1, heads=2, embedding_std=1.0
  )
)


def _drawn(objective, t, z):
  kind = {LLaDA: Cut, Dream: Annealed}.get(type(objective), Drawn)
  return kind(t=t, z=z)


def _run(objective, drawn, batch, mesh=None):
  process = objective.init(jax.random.key(0))

  def value(params, drawn, batch):
    denoise = lambda inputs: _NETWORK.apply(params, inputs, None)[0]
    loss = objective.loss(process, denoise, drawn, batch, step=jnp.int32(0))
    return loss.total / loss.weight

  inputs = objective.inputs(process, batch.tokens, jnp.ones((1, 1)), batch)
  params = _NETWORK.init(jax.random.key(1), inputs)
  if mesh is None:
    return jax.jit(jax.value_and_grad(value))(params, drawn, batch)
  with jax.set_mesh(mesh):
    placed = global_batch((drawn, batch), mesh)
    return jax.jit(jax.value_and_grad(value))(params, *placed)


@pytest.mark.all
@pytest.mark.parametrize("rule", _RULES)
def test_packed_is_each_alone(rule):
  objective, alone = _RULES[rule], _alone()
  together = _together(alone)
  rng = np.random.default_rng(1)
  t = rng.uniform(0.2, 0.9, (len(LENGTHS), 1)).astype(np.float32)
  if isinstance(objective, BD3LM):  # A time for each block.
    size = objective.block_size
    t = np.repeat(rng.uniform(0.2, 0.9, (16, LENGTH // size)), size, axis=1)
  t = np.broadcast_to(t, alone.tokens.shape).astype(np.float32)
  counts = objective.supervised(jax.tree.map(jnp.asarray, alone)).loss_mask
  hidden = np.asarray(counts) & (rng.uniform(size=t.shape) < t)
  z = np.where(hidden, MASK, alone.tokens)
  times, noised = _packed(t, z)
  if not isinstance(objective, BD3LM):
    t = t[:, :1]
  want = _run(objective, _drawn(objective, t, z), alone)
  for mesh in (None, make_mesh({"data": 4, "fsdp": 2})):
    drawn = _drawn(objective, np.maximum(times, 1e-3), noised)
    found = _run(objective, drawn, together, mesh)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(
        a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()
      ),
      found,
      want,
    )


def test_each_packed_text_has_its_own_time():
  objective, batch = _RULES["d1"], _together(_alone())
  draw = jax.jit(
    lambda key: objective.draw(
      objective.init(key), key, batch, step=jnp.int32(0)
    )
  )
  first = []
  for seed in range(64):
    drawn = draw(jax.random.key(seed))
    for row in range(8):
      times = {
        int(s): set(np.asarray(drawn.t)[row][batch.segment_ids[row] == s])
        for s in (1, 2)
      }
      assert all(len(found) == 1 for found in times.values())
      assert times[1] != times[2]
      first.append(next(iter(times[2])))
  # Uniform: 512 draws, whose mean has a deviation of 0.0128.
  assert abs(np.mean(first) - 0.5) < 0.05
  assert abs(np.var(first) - 1 / 12) < 0.02


@pytest.mark.all
def test_a_text_without_a_mask_gets_one():
  objective = MDLM(**_SPACE, mask_at_least_one=True, time_limit=0.01)
  plain = MDLM(**_SPACE, time_limit=0.01)
  for batch in (_alone(), _together(_alone())):
    args = Process(), jax.random.key(3), batch
    z = objective.draw(*args, step=jnp.int32(0)).z
    masked = np.asarray(z == MASK)
    assert not (masked & ~batch.loss_mask).any()
    sums = texts.text_sums(jnp.float32(masked), batch)
    least = np.asarray(jnp.broadcast_to(sums, z.shape))
    assert (least[batch.loss_mask] == 1).mean() > 0.9
    assert least[batch.loss_mask].min() == 1
    before = np.asarray(plain.draw(*args, step=jnp.int32(0)).z == MASK)
    assert (masked & before == before).all()


@pytest.mark.all
def test_next_token_loss_is_that_of_a_causal_network():
  """Against a sum over tokens of the network cut behind each."""
  objective = MDLM(**_SPACE, autoregressive_weight=1.0)
  batch = jax.tree.map(lambda x: x[:2], _together(_alone()))
  t = np.ones((2, 1), np.float32)
  nothing = batch.tokens  # No mask: the diffusion's own term is zero.
  inputs = objective.inputs(Process(), batch.tokens, t, batch)
  params = _NETWORK.init(jax.random.key(1), inputs)
  denoise = jax.jit(lambda inputs: _NETWORK.apply(params, inputs, None)[0])
  loss = objective.loss(
    Process(), denoise, Drawn(t=t, z=nothing), batch, step=jnp.int32(0)
  )
  want, count = 0.0, batch.loss_mask.sum()
  for row, at in zip(*np.nonzero(batch.loss_mask), strict=True):
    if batch.positions[row, at] == 0:
      continue
    before = inputs.replace(
      segment_ids=np.where(np.arange(LENGTH) < at, batch.segment_ids, 0)
    )
    out = denoise(before)
    hidden = np.asarray(out.hidden)[row, at - 1]
    logits = (hidden @ np.asarray(out.unembed))[:MASK]
    want -= logits[batch.tokens[row, at]] - np.logaddexp.reduce(logits)
  np.testing.assert_allclose(loss.total, want, rtol=1e-5)
  assert loss.weight == count
