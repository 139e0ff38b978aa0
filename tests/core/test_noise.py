"""Exact categorical draws: rare tokens, forbidden tokens, batch invariance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core import noise as noise_lib
from dllm_jax.core.noise import _multiply_high, Keyed, Recorded, Tag

# One program each, where their parts alone would be dozens.
inverse_cdf = jax.jit(noise_lib.inverse_cdf)
_categorical = jax.jit(lambda noise, logits: noise.categorical(0, logits))
_bits = jax.jit(jax.random.bits, static_argnums=1)


def test_multiply_high_is_exact():
  edge = np.array([0, 1, 0xFFFF, 0x10000, 2**31, 2**32 - 1], np.uint32)
  drawn = np.random.default_rng(0).integers(0, 2**32, 2000, np.uint32)
  a, b = np.meshgrid(np.concatenate([edge, drawn[:40]]), drawn)
  a, b = np.append(a.ravel(), edge), np.append(b.ravel(), edge[::-1])
  exact = (a.astype(object) * b.astype(object)) >> 32
  found = _multiply_high(jnp.asarray(a), jnp.asarray(b))
  np.testing.assert_array_equal(np.asarray(found).astype(object), exact)


def _rare(vocab, token, p):
  probabilities = np.full(vocab, (1 - p) / (vocab - 1))
  probabilities[token] = p
  return jnp.log(jnp.asarray(probabilities, jnp.float32))


@pytest.mark.all  # What follows finds the same bugs by their words.
def test_rare_token_appears_at_its_rate():
  # 5e7 draws of a token of probability 1e-6: 50 expected, standard deviation
  # 7.07; a float32 Gumbel of 24 bits gives none of it beyond its tail.
  logits, chunk, chunks = _rare(5, 3, 1e-6), 2**20, 48

  @jax.jit
  def count(key):
    def body(total, key):
      drawn = inverse_cdf(
        jax.random.bits(key, (chunk, 2)), jnp.tile(logits, (chunk, 1))
      )
      return total + jnp.bincount(drawn, length=5), None

    keys = jax.random.split(key, chunks)
    return jax.lax.scan(body, jnp.zeros(5, jnp.int32), keys)[0]

  counts = np.asarray(count(jax.random.key(1)))
  draws = chunk * chunks
  expected = draws * np.exp(np.asarray(logits, np.float64))
  assert abs(counts[3] - expected[3]) < 3 * np.sqrt(expected[3])
  others = np.delete(counts - expected, 3)
  assert np.all(abs(others) < 4 * np.sqrt(expected[0]))


def test_rare_token_owns_its_exact_share_of_words():
  # Token 0 of two owns the words below p 2^32 = 4294.97 of the second draw, to
  # one unit of 2^-30 (4 words).
  words = jnp.arange(8192, dtype=jnp.uint32)
  bits = jnp.stack([jnp.zeros_like(words), words], axis=-1)
  drawn = inverse_cdf(bits, jnp.tile(_rare(2, 0, 1e-6), (8192, 1)))
  assert abs(int(jnp.sum(drawn == 0)) - 4295) <= 4


@pytest.mark.parametrize("vocab", [
    1, 2, 50, *(pytest.param(n, marks=pytest.mark.all) for n in (3, 7, 16))
])  # fmt: skip
def test_draws_follow_the_distribution(vocab):
  key = jax.random.key(vocab)
  logits = 2.0 * jax.random.normal(key, (vocab,))
  n = 40_000
  drawn = inverse_cdf(_bits(key, (n, 2)), jnp.tile(logits, (n, 1)))
  p = np.asarray(jax.nn.softmax(logits), np.float64)
  counts = np.bincount(np.asarray(drawn), minlength=vocab)
  assert counts.size == vocab
  error = np.sqrt(n * p * (1 - p)) + 1e-6
  assert np.all(abs(counts - n * p) < 4.5 * error)


def test_forbidden_tokens_are_never_drawn():
  # Extreme words land in the first and the last token that has any mass.
  logits = jnp.full((4, 37), -jnp.inf).at[:, jnp.array([5, 6, 20])].set(0.0)
  words = jnp.array([0, 2**32 - 1], jnp.uint32)
  bits = jnp.stack(jnp.meshgrid(words, words), -1).reshape(4, 2)
  assert set(np.asarray(inverse_cdf(bits, logits)).tolist()) <= {5, 6, 20}
  many = _bits(jax.random.key(0), (20_000, 2))
  drawn = inverse_cdf(many, jnp.tile(logits[:1], (20_000, 1)))
  assert set(np.unique(np.asarray(drawn)).tolist()) == {5, 6, 20}


@jax.jit
def _keyed(rows, step, positions):
  return Keyed.at(
    jax.random.key(7), request=rows, step=step, position=positions
  )


def _noise(rows, length=6, step=3):
  rows = jnp.asarray(rows)
  positions = jnp.tile(jnp.arange(length), (rows.size, 1))
  return _keyed(rows, jnp.full(rows.shape, step), positions)


def test_noise_of_a_request_is_the_same_alone_and_in_a_batch():
  logits = jax.random.normal(jax.random.key(1), (4, 6, 11))
  batch = _categorical(_noise([4, 9, 2, 7]), logits)
  alone = _categorical(_noise([2]), logits[2:3])
  np.testing.assert_array_equal(batch[2:3], alone)
  assert not np.array_equal(
    _noise([2]).uniform(Tag.TOKEN, 2), _noise([2], step=4).uniform(0, 2)
  )


def test_tags_are_separate_streams_of_uniforms():
  noise = _noise(range(400))
  a, b = noise.uniform(Tag.TOKEN, 4), noise.uniform(Tag.TRANSFER, 4)
  assert a.shape == (400, 6, 4)
  assert float(a.min()) > 0.0 and float(a.max()) < 1.0
  # 9600 pairs: the standard error of a correlation is 0.0102.
  assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.04
  assert abs(float(a.mean()) - 0.5) < 4 * np.sqrt(1 / 12 / a.size)


def test_recorded_noise_replays_the_ratio_rule():
  rng = np.random.default_rng(0)
  u, p = rng.uniform(size=(2, 5, 9)), rng.dirichlet(np.ones(9), (2, 5))
  noise = Recorded(uniforms={0: jnp.asarray(u, jnp.float32)}, epsilon=1e-10)
  expected = np.argmax(p / (1e-10 - np.log(u + 1e-10)), axis=-1)
  found = noise.categorical(0, jnp.log(jnp.asarray(p, jnp.float32)))
  np.testing.assert_array_equal(found, expected)
  np.testing.assert_array_equal(
    noise.uniform(0, 3), u[..., :3].astype(np.float32)
  )
