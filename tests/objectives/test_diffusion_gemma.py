"""DiffusionGemma's loss: which canvas, what it is told, what counts."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.mask import Causal, Full
from dllm_jax.core.types import Batch, ModelOutputs, Process
from dllm_jax.objectives.base import TokenSpace
from dllm_jax.objectives.diffusion_gemma import DiffusionGemma, OneCanvas
from tests.objectives import toy

VOCAB, EOS = 7, 6
OBJECTIVE = DiffusionGemma(vocab_size=VOCAB, eos_id=EOS, canvas=4)


def answers():
  """Returns a row with two turns, and one that its text fills to the end."""
  tokens = np.arange(28).reshape(2, 14) % 6
  counts = np.zeros((2, 14), bool)
  counts[0, 3:9] = True  # canvases from 3 and 7; behind it a second prompt
  counts[0, 11:13] = True  # one from 11; padding behind it
  counts[1, 4:] = True  # canvases from 4, 8 and 12, cut by the row's end
  segments = np.ones((2, 14), np.int32)
  segments[0, 13:] = 0
  positions = np.broadcast_to(np.arange(14, dtype=np.int32), (2, 14))
  arrays = (tokens.astype(np.int32), counts, segments, positions)
  return Batch(*map(jnp.asarray, arrays))


def drawn(batch, *, canvas, told=True, t=0.3, noise=None):
  """Returns what a loss draws, by hand; `canvas` is a share for each row."""
  rows, x0 = batch.tokens.shape[0], batch.tokens
  noise = jnp.full_like(x0, -1) if noise is None else noise
  return OneCanvas(
    t=jnp.full((rows, 1), t),
    z=jnp.where((noise >= 0) & batch.loss_mask, noise, x0),
    noise=noise,
    canvas=jnp.asarray(canvas, jnp.float32),
    conditioned=jnp.broadcast_to(jnp.asarray(told), (rows,)),
  )


def chosen(fill="counted", share=0.0):
  batch = answers()
  objective = dataclasses.replace(OBJECTIVE, fill=fill)
  return objective.chosen(drawn(batch, canvas=[share, share]), batch)


@pytest.mark.all
def test_canvases_begin_with_each_answer():
  firsts = [chosen(share=s).slots[:, 0].tolist() for s in (0.0, 0.34, 0.99)]
  assert firsts == [[3, 4], [7, 8], [11, 12]]
  assert chosen().number.tolist() == [3, 3]
  first = chosen()
  assert first.text.all() and first.counted.all()
  np.testing.assert_array_equal(first.x0[0], [3, 4, 5, 0])


@pytest.mark.parametrize("fill", ["counted", "seen", "none"])
def test_what_lies_behind_an_answer_is_its_end(fill):
  # Two of the first row's own tokens, then its next turn; two of the second's,
  # then nothing.
  middle, last = chosen(fill, 0.34), chosen(fill, 0.99)
  filled = fill != "none"
  np.testing.assert_array_equal(middle.text[0], [1, 1, 0, 0])
  np.testing.assert_array_equal(middle.seen[0], [1, 1, filled, filled])
  counted = fill == "counted"
  np.testing.assert_array_equal(middle.counted[0], [1, 1, counted, counted])
  behind = [EOS, EOS] if filled else [3, 4]  # hidden, and not counted
  np.testing.assert_array_equal(middle.x0[0], [1, 2, *behind])
  for mask in (last.text, last.seen, last.counted):
    np.testing.assert_array_equal(mask[1], [1, 1, 0, 0])


@pytest.mark.all
def test_draws_are_uniform_over_canvases_tokens_and_rows_told():
  batch = toy.batch(np.zeros((4096, 8)))
  objective = dataclasses.replace(OBJECTIVE, self_conditioning=0.25)
  taken = toy.draw(objective, Process(), jax.random.key(0), batch)
  first = np.asarray(objective.chosen(taken, batch).slots[:, 0])
  assert set(first) == {0, 4} and abs(np.mean(first == 4) - 0.5) < 0.03
  assert abs(np.mean(taken.conditioned) - 0.25) < 0.03
  t = np.broadcast_to(taken.t, taken.noise.shape)
  assert t.min() >= 1e-4 and abs(t.mean() - 0.5) < 0.02
  replaced = np.asarray(taken.noise) >= 0
  assert abs(np.mean(replaced) - 0.5) < 0.02
  counts = np.bincount(np.asarray(taken.noise)[replaced], minlength=VOCAB)
  share = counts / counts.sum()
  assert np.abs(share - 1 / VOCAB).max() < 4 * np.sqrt(1 / VOCAB / counts.sum())


class Told:
  """A network that adds what it is told to an embedding; notes its inputs."""

  def __init__(self, table, ours=1.0):
    self.table, self.ours, self.calls = table, ours, []

  def __call__(self, inputs):
    self.calls.append(inputs)
    hidden = self.table[inputs.latent] * self.ours
    past = None
    if inputs.mask == Causal():
      past = jnp.mean(hidden, axis=1, keepdims=True)
    else:
      hidden = hidden + jnp.tanh(inputs.self_conditioning) + inputs.past
    return ModelOutputs(hidden=hidden, unembed=self.table.T, past=past)


def score(objective, taken, batch, network=None):
  """Returns the loss, and what the network was called with."""

  @jax.jit
  def run(taken, batch):
    told = network or Told(table())
    step = jnp.int32(0)
    loss = objective.loss(Process(), told, taken, batch, step=step)
    return loss, getattr(told, "calls", None)

  return run(taken, batch)


def table():
  return jax.random.normal(jax.random.key(5), (VOCAB, 3))


def nats(hidden, targets):
  log_p = jax.nn.log_softmax(hidden @ table().T)
  return -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]


@pytest.mark.parametrize("without", ["zero", "mean"])
@pytest.mark.all
def test_both_passes_and_what_the_second_is_told(without):
  batch = answers()
  objective = dataclasses.replace(OBJECTIVE, without=without)
  noise = jnp.full_like(batch.tokens, -1).at[:, 4:6].set(2)
  taken = drawn(batch, canvas=[0.34, 0.0], told=[True, False], noise=noise)
  loss, (text, first, second) = score(objective, taken, batch)
  assert (text.mask, first.mask, second.mask) == (Causal(), Full(), Full())
  np.testing.assert_array_equal(text.latent, batch.tokens)
  np.testing.assert_array_equal(second.latent, [[1, 2, 6, 6], [2, 2, 2, 3]])
  np.testing.assert_array_equal(second.slot, [7, 4])
  np.testing.assert_array_equal(second.positions[0], [7, 8, 9, 10])

  rows = table()
  past = jnp.mean(rows[batch.tokens], axis=1, keepdims=True)
  nothing = jnp.zeros(3) if without == "zero" else jnp.mean(rows, axis=0)
  nothing = jnp.broadcast_to(nothing, (2, 4, 3))
  np.testing.assert_allclose(first.self_conditioning, nothing, atol=1e-6)
  base = rows[second.latent] + past
  said = jax.nn.softmax((base + jnp.tanh(nothing)) @ rows.T) @ rows
  told = nothing.at[0].set(said[0])
  np.testing.assert_allclose(second.self_conditioning, told, atol=1e-5)

  x0 = jnp.array([[1, 2, 6, 6], [0, 1, 2, 3]]) + jnp.array([[0], [0]])
  x0 = x0.at[1].set(batch.tokens[1, 4:8])
  canvas = jnp.mean(nats(base + jnp.tanh(told), x0), axis=1)
  following = nats(rows[batch.tokens[:, :-1]], batch.tokens[:, 1:])
  following = [jnp.mean(following[0, :12]), jnp.mean(following[1])]
  want = jnp.sum(canvas) + sum(following)
  np.testing.assert_allclose(loss.total, want, rtol=1e-5)
  assert loss.weight == 2.0
  np.testing.assert_allclose(loss.metrics["canvas_nats"], jnp.mean(canvas),
                             rtol=1e-5)  # fmt: skip


def gradient(batch=None, **fields):
  """Returns the gradient of the canvas's loss by the network's two factors."""
  batch = answers() if batch is None else batch
  objective = dataclasses.replace(
    OBJECTIVE, autoregressive_weight=0.0, **fields
  )
  taken = drawn(batch, canvas=[0.0, 0.0])

  class Split(Told):
    def __call__(self, inputs):
      text = inputs.mask == Causal()
      scaled = Told(self.table, self.ours[0 if text else 1])
      return scaled(inputs)

  @jax.jit
  @jax.grad
  def slope(factors):
    network = Split(table(), factors)
    step = jnp.int32(0)
    return objective.loss(Process(), network, taken, batch, step=step).total

  return np.asarray(slope(jnp.ones(2)))


def test_the_canvas_teaches_the_text_unless_it_may_not():
  text, canvas = gradient()
  assert abs(text) > 1e-4 and abs(canvas) > 1e-4
  text, canvas = gradient(text_gradient=False)
  assert text == 0.0 and abs(canvas) > 1e-4


@pytest.mark.all
def test_a_row_without_an_answer_counts_as_zero():
  batch = answers()
  empty = batch.replace(loss_mask=batch.loss_mask.at[1].set(False))
  taken = drawn(batch, canvas=[0.0, 0.0])
  objective = dataclasses.replace(OBJECTIVE, autoregressive_weight=0.0)
  one, both = (score(objective, taken, b)[0] for b in (empty, batch))
  assert one.weight == both.weight == 2.0 and 0 < one.total < both.total
  assert np.any(one.bound[0]) and not np.any(one.bound[1])


def joint():
  """Returns all rows of three slots, and a law of them."""
  sequences = np.array(list(itertools.product(range(VOCAB), repeat=3)))
  p = np.random.default_rng(2).dirichlet(np.full(len(sequences), 0.3))
  return sequences, p


@pytest.mark.all
def test_leave_one_out_is_bayes_rule():
  """log p(x_i | z), less what z_i says, is log p(x_i | z without z_i)."""
  sequences, p = joint()
  z, t = np.array([2, 5, 1]), 0.6
  keep = np.where(sequences == z, 1 - t, 0.0) + t / VOCAB
  by_slot = np.eye(VOCAB)[sequences]
  posterior, alone = np.zeros((2, 3, VOCAB))
  for i in range(3):
    others = np.prod(np.delete(keep, i, axis=1), axis=1)
    posterior[i] = (p * others * keep[:, i]) @ by_slot[:, i]
    alone[i] = (p * others) @ by_slot[:, i]
  norm = lambda x: np.log(x / x.sum(-1, keepdims=True))[None]
  log_p, want = norm(posterior), norm(alone)
  z, t = jnp.asarray(z)[None], jnp.full((1, 1), t)
  found = jax.nn.log_softmax(OBJECTIVE.alone(jnp.asarray(log_p), z, t))
  np.testing.assert_allclose(found, want, atol=1e-4)
  taught = dataclasses.replace(OBJECTIVE, leave_one_out=True)
  assert taught.alone(want, z, t) is want

  # Under the option the loss of those logits is that of all of z.
  ones = jnp.ones((1, 3), bool)
  batch = Batch(
    tokens=jnp.array([[2, 4, 1]]),
    loss_mask=ones,
    segment_ids=ones.astype(jnp.int32),
    positions=jnp.arange(3)[None],
  )
  taken = drawn(batch, canvas=[0.0], t=0.6, noise=jnp.where(z == 5, 5, -1))
  taught = dataclasses.replace(
    taught, canvas=3, autoregressive_weight=0.0, self_conditioning=0.0
  )
  network = lambda inputs: ModelOutputs(hidden=jnp.asarray(want))
  loss = score(taught, taken, batch, network)[0]
  terms = -log_p[0, np.arange(3), [2, 4, 1]]
  np.testing.assert_allclose(loss.total, terms.mean(), rtol=1e-4)
  # Late, the bound is that of uniform diffusion, at the logits without z_i.
  bound = taught.uniform.token_loss(
    Process(), jnp.asarray(want), batch.tokens, z, taken.t
  )
  np.testing.assert_allclose(loss.bound, bound, rtol=1e-3)


def bounds(table, *, epsilon, leave_one_out=False, points=24):
  """Returns the bound of each row of two slots, all that is drawn summed over.

  Times by a rule of Gauss and Legendre on either side of where the reverse process
  has ended, noisy rows by their probabilities.
  """
  rows = np.array(list(itertools.product(range(3), repeat=2)))
  objective = DiffusionGemma(
    vocab_size=3,
    canvas=2,
    time_epsilon=epsilon,
    self_conditioning=0.0,
    autoregressive_weight=0.0,
    leave_one_out=leave_one_out,
  )
  nodes, weights = np.polynomial.legendre.leggauss(points)
  first, last, middle = epsilon, 1 - epsilon, max(0.1, 2 * epsilon)
  ends = [(first, middle), (middle, last)]
  times = np.concatenate([a + (b - a) * (nodes + 1) / 2 for a, b in ends])
  weights = np.concatenate([(b - a) * weights / 2 for a, b in ends])
  weights /= last - first
  t, x0, z = (
    x.reshape(-1)
    for x in np.meshgrid(range(len(times)), range(9), range(9), indexing="ij")
  )
  keep = np.where(rows[x0] == rows[z], 1 - times[t, None], 0.0)
  chance = weights[t] * np.prod(keep + times[t, None] / 3, axis=1)
  ones = jnp.ones((len(t), 2), jnp.int32)
  batch = Batch(
    tokens=jnp.asarray(rows[x0], jnp.int32),
    loss_mask=ones > 0,
    segment_ids=ones,
    positions=ones,
  )
  taken = OneCanvas(
    t=jnp.asarray(times[t, None], jnp.float32),
    z=jnp.asarray(rows[z], jnp.int32),
    noise=jnp.asarray(rows[z], jnp.int32),
    canvas=jnp.zeros(len(t)),
    conditioned=ones[:, 0] < 0,
  )

  def network(inputs):
    index = inputs.latent[:, 0] * 3 + inputs.latent[:, 1]
    return ModelOutputs(hidden=jnp.asarray(table, jnp.float32)[index])

  found = np.asarray(score(objective, taken, batch, network)[0].bound)
  return np.bincount(x0, chance * found.sum(axis=1), minlength=9)


@pytest.mark.parametrize(
  ("seed", "scale", "epsilon", "leave_one_out"),
  [
    (0, 2.0, 1e-4, False),
    (1, 2.0, 0.2, False),
    (2, 0.0, 0.2, True),
    (3, 5.0, 1e-4, True),
  ],
)
@pytest.mark.few(2)
def test_no_network_says_more_than_all_rows_can_have(
  seed, scale, epsilon, leave_one_out
):
  """Each bound is at least -log of a probability: those of all rows sum to 1."""
  table = scale * np.random.default_rng(seed).normal(size=(9, 2, 3))
  made = bounds(table, epsilon=epsilon, leave_one_out=leave_one_out)
  assert np.isfinite(made).all() and np.exp(-made).sum() <= 1 + 1e-4


def test_the_bound_of_what_is_known_is_its_likelihood():
  """Uniform rows, and a network that knows it: nothing is lost."""
  made = bounds(np.zeros((9, 2, 3)), epsilon=0.2, leave_one_out=True)
  np.testing.assert_allclose(made, 2 * np.log(3), rtol=1e-5)


def test_a_canvas_stands_for_its_row_in_the_bound():
  batch = answers()
  taken = drawn(batch, canvas=[0.0, 0.34], t=0.4)
  bound = score(OBJECTIVE, taken, batch)[0].bound
  assert np.flatnonzero(bound[0]).tolist() == [3, 4, 5, 6]
  assert np.flatnonzero(bound[1]).tolist() == [8, 9, 10, 11]
  alone = batch.replace(
    loss_mask=batch.loss_mask & (jnp.arange(14) // 4 == jnp.array([[9], [2]]))
  )
  once = score(OBJECTIVE, taken, alone)[0].bound
  np.testing.assert_allclose(bound[1], 3 * once[1], rtol=1e-5)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"mask_id": 3}, "leave mask_id out"),
    ({"canvas": 0}, "canvas must be at least 1"),
    ({"time_epsilon": 0.0}, "time_epsilon must lie in"),
    ({"self_conditioning": 1.5}, "self_conditioning must lie in"),
    ({"without": "nothing"}, "unknown without 'nothing'; legal: zero, mean"),
    ({"fill": "eos"}, "unknown fill 'eos'"),
  ],
)
def test_what_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    DiffusionGemma(**({"vocab_size": VOCAB} | fields))


def test_a_mask_inside_the_vocabulary_is_refused():
  space = TokenSpace(vocab_size=VOCAB, mask_id=2)
  with pytest.raises(ValueError, match="DiffusionGemma has no mask token"):
    DiffusionGemma.over(space)
