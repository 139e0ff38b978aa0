"""Rows that choose for themselves: as alone, as a sampler of their own; how sure.

The network is a table: what it says depends on a slot and its token alone, so
that how likely each token was has a closed form.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.types import Denoiser, KVCache, ModelOutputs, Process
from dllm_jax.data.numbers import Numbers
from dllm_jax.objectives.autoregressive import Autoregressive
from dllm_jax.objectives.bd3lm import BD3LM
from dllm_jax.objectives.dream import Dream
from dllm_jax.objectives.llada import LLaDA
from dllm_jax.objectives.md4 import MD4
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.objectives.udlm import UDLM
from dllm_jax.parallel import make_mesh
from dllm_jax.sampling.catalogue import PRESETS
from dllm_jax.sampling.generator import Generator
from dllm_jax.sampling.options import RowOptions, stack
from dllm_jax.sampling.presets import SamplerConfig
from dllm_jax.sampling.program import generate
from dllm_jax.sampling.requests import build, continuation
from tests import jaxprs, toys
from tests.quick import long
from tests.sampling import published, small

VOCAB, MASK, LENGTH, ENDS, ROWS = 9, 8, 8, (6, 3), 4
TOKENS = {"vocab_size": VOCAB, "mask_id": MASK}
OBJECTIVES = {
  "llada": LLaDA(**TOKENS),
  "dream": Dream(**TOKENS),
  "mdlm": MDLM(**TOKENS),
  "md4": MD4(**TOKENS, reverse_draw="mean"),
  "bd3lm": BD3LM(**TOKENS, length=LENGTH, block_size=4),
  "autoregressive": Autoregressive(**TOKENS, bos_id=0),
}
TABLE = np.float32(np.random.default_rng(3).normal(scale=2, size=(64, VOCAB)))


def _apply(params, inputs, cache):
  at = inputs.positions * 7 + inputs.latent
  return ModelOutputs(hidden=jnp.asarray(TABLE)[at % 64]), cache


def _cache(rows, slots):
  kept = jnp.zeros((1, rows, 1, slots, 1))
  return KVCache(
    key=kept, value=kept, segment_ids=jnp.zeros((rows, slots), jnp.int32)
  )


NETWORK = Denoiser(init=None, apply=_apply, cache=_cache)


def asked(objective, rows=ROWS):
  """Returns requests for texts after a prompt of two tokens."""
  made = [continuation([0, 1], length=LENGTH, new_tokens=6)] * rows
  return build(made, objective=objective, length=LENGTH)


def sample(config, objective, rows, *, top=3, key=5):
  """Returns a generation of rows' options, or of none, of the table."""
  spec = config.build(objective, length=LENGTH, end_ids=ENDS, top=top)
  requests = asked(objective)
  if rows is not None:
    rows = stack(rows, defaults=config.options(ENDS), objective=objective)
    requests = requests.replace(options=rows)
  args = {}, Process(), jax.random.key(key), requests
  return published.quick(spec, NETWORK, *args)


def predicted(tokens, objective):
  """Returns the logits of each new token of a text, at its own slot."""
  slots = np.arange(2, LENGTH)
  seen = np.where(objective.block_length == 1, tokens[:, 1:-1], MASK)
  return TABLE[((slots - objective.shift) * 7 + seen) % 64]


def law(logits, *, temperature=1.0, top_k=VOCAB, sharpens=False):
  """Returns log-probabilities of all but the mask, in float64.

  Samplers that sharpen cut what the network says, where the mask takes a place
  among the best, and rule it out afterwards, as Dream and SDAR do.
  """
  x = np.array(logits, np.float64) / (temperature or 1.0)
  if not sharpens:
    x[..., MASK] = -np.inf
  least = np.sort(x, axis=-1)[..., VOCAB - top_k, None]
  x = np.where(x >= least, x, -np.inf)
  x[..., MASK] = -np.inf
  x = x - x.max(axis=-1, keepdims=True)
  return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


MIXED = (
  RowOptions(temperature=0.0),
  RowOptions(),
  RowOptions(temperature=0.6, top_k=3),
  RowOptions(temperature=1.5),
)
LAWS = (
  {},
  {},
  {"temperature": 0.6, "top_k": 3},
  {"temperature": 1.5},
)


@pytest.mark.parametrize(
  ("preset", "name", "fields"),
  [
    ("mdlm", "mdlm", {}),
    ("autoregressive", "autoregressive", {"stop": False}),
    long("fast_dllm", "llada", {"block_length": 2, "temperature": 1.0}),
    long("remdm", "mdlm", {"top_p": 1.0, "eta": 0.0}),
    long("md4", "md4", {}),
    long("bd3lm", "bd3lm", {"top_p": 1.0, "stop": False}),
    long("sdar", "bd3lm", {"stop": False}),
    long("dream", "llada", {"temperature": 1.0, "top_p": 1.0}),
  ],
)
@pytest.mark.all
def test_log_prob_is_of_the_distribution_that_each_row_drew_from(
  preset, name, fields
):
  config, objective = SamplerConfig(preset=preset, **fields), OBJECTIVES[name]
  found = sample(config, objective, MIXED)
  new = np.asarray(found.tokens)[:, 2:]
  log_p = predicted(np.asarray(found.tokens), objective)
  for row, shape in enumerate(LAWS):
    want = law(log_p[row], **shape, sharpens=PRESETS[preset].sharpens)
    picked = np.take_along_axis(want, new[row][:, None], -1)[:, 0]
    got = found.log_prob[row]
    np.testing.assert_allclose(got[2:], picked, atol=2e-6)
    assert (got[:2] == 0.0).all()  # given
    best = np.argsort(-want, kind="stable")[:, :3]
    np.testing.assert_array_equal(found.top_ids[row, 2:], best)
    np.testing.assert_allclose(
      found.top_log_probs[row, 2:],
      np.take_along_axis(want, best, -1),
      atol=2e-6,
    )
  np.testing.assert_array_equal(new[0], law(log_p[0]).argmax(-1))  # greedy


@pytest.mark.all
def test_samplers_numbers_say_the_same_without_options():
  config = SamplerConfig(preset="llada", temperature=0.6, top_k=3)
  plain = sample(config, OBJECTIVES["llada"], None)
  chosen = sample(config, OBJECTIVES["llada"], [RowOptions()] * ROWS)
  np.testing.assert_array_equal(plain.tokens, chosen.tokens)
  np.testing.assert_allclose(plain.log_prob, chosen.log_prob, atol=1e-6)
  new = np.asarray(plain.tokens)[:, 2:, None]
  log_p = predicted(np.asarray(plain.tokens), OBJECTIVES["llada"])
  want = np.take_along_axis(law(log_p, temperature=0.6, top_k=3), new, -1)
  np.testing.assert_allclose(plain.log_prob[:, 2:], want[..., 0], atol=2e-6)


def test_a_greedy_sampler_says_how_likely_its_best_tokens_were():
  greedy = sample(SamplerConfig(preset="llada"), OBJECTIVES["llada"], None)
  log_p = law(predicted(np.asarray(greedy.tokens), OBJECTIVES["llada"]))
  np.testing.assert_allclose(greedy.log_prob[:, 2:], log_p.max(-1), atol=2e-6)


def test_frequencies_are_what_log_prob_says():
  """Of an autoregressive law over all texts of two tokens, enumerated."""
  objective = OBJECTIVES["autoregressive"]
  rows, config = 4000, SamplerConfig(preset="autoregressive", stop=False)
  made = [continuation([0, 1], length=4)] * rows
  requests = build(made, objective=objective, length=4)
  spec = config.build(objective, length=4)
  args = {}, Process(), jax.random.key(1), requests
  found = published.quick(spec, NETWORK, *args)
  first = law(TABLE[(1 * 7 + 1) % 64])
  second = law(TABLE[(2 * 7 + np.arange(VOCAB)) % 64])
  joint = np.exp(first[:, None] + second)
  joint[MASK] = 0.0  # is never drawn, whatever would follow it
  np.testing.assert_allclose(joint.sum(), 1.0)
  text = tuple(np.asarray(found.tokens)[:, 2:].T)
  said = np.asarray(found.log_prob).sum(axis=1)
  np.testing.assert_allclose(np.exp(said), joint[text], rtol=1e-4)
  counts = np.zeros((VOCAB, VOCAB))
  np.add.at(counts, text, 1)
  deviation = np.sqrt(joint * (1 - joint) / rows)
  assert (np.abs(counts / rows - joint) <= 5 * deviation + 1e-9).all()


@pytest.mark.all
def test_log_prob_of_what_is_replaced_is_the_posteriors():
  """UDLM: at each step q(z_s | z_t), by hand, where a token came to stand."""
  objective = UDLM(vocab_size=VOCAB)
  config = SamplerConfig(preset="udlm", steps=3)
  spec = config.build(objective, length=LENGTH)
  args = {}, Process(), jax.random.key(2), asked(objective)
  found = published.quick(spec, NETWORK, *args, trace=True)
  frames = [found.trace.initial, *found.trace.frames.tokens]
  grid, want = objective.grid(3), np.zeros((ROWS, LENGTH))
  for step, (before, after) in enumerate(zip(frames, frames[1:], strict=False)):
    z = np.asarray(before)
    logits = TABLE[(np.arange(LENGTH) * 7 + z) % 64]
    t, s = (np.full((ROWS, 1), grid[step + i], np.float32) for i in (0, 1))
    q = objective.posterior(Process(), jnp.asarray(logits), z, t, s)
    said = np.take_along_axis(np.asarray(q), np.asarray(after)[..., None], -1)
    want = np.where(np.asarray(after) != z, said[..., 0], want)
  assert (found.revealed_at >= 0).any()
  np.testing.assert_allclose(found.log_prob, want, atol=1e-5)


ALONE = (
  RowOptions(temperature=0.0, seed=3),
  RowOptions(temperature=0.7, top_k=3, threshold=0.3, seed=2**33 + 3),
  RowOptions(temperature=1.3, top_p=0.5, min_p=0.1, seed=9),
  RowOptions(
    presence_penalty=1.0,
    frequency_penalty=0.5,
    repetition_penalty=1.3,
    logit_bias={2: 5.0},
    min_tokens=4,
    seed=0,
  ),
)


@pytest.mark.parametrize(
  ("preset", "objective", "fields"),
  [
    ("fast_dllm", small.MDLM_, {"block_length": 4}),
    long("sdar", small.BLOCKS, {}),
    long("fast_dllm", small.DREAM, {"block_length": 4, "cache": "prefix"}),
    long("fast_dllm", small.MDLM_, {"cfg_scale": 0.5, "block_length": 4}),
  ],
)
@pytest.mark.all
def test_a_row_in_any_mix_is_as_alone_of_one_program(preset, objective, fields):
  config = SamplerConfig(preset=preset, **fields)
  ends = (3, 7)
  spec = config.build(objective, length=small.LENGTH, end_ids=ends)
  requests = small.ragged(objective)
  denoiser, params = small.network()

  def run(rows, index, key=5):
    made = stack(rows, defaults=config.options(ends), objective=objective)
    some = small.rows(requests, index).replace(options=made)
    args = params, Process(), jax.random.key(key), some
    return published.quick(spec, denoiser, *args)

  mixed = run(ALONE, [0, 1, 2, 3])
  order = [2, 0, 3, 1]
  # Noise is the row's own: another key of the call changes nothing.
  other = run([ALONE[i] for i in order], order, key=6)
  np.testing.assert_array_equal(other.tokens, mixed.tokens[order])
  # Where two branches are joined, places in a batch may round another way.
  last = 2e-6 if spec.guidance else 0.0  # two units of logits up to 16
  np.testing.assert_allclose(
    other.log_prob, mixed.log_prob[order], rtol=0.0, atol=last
  )
  same = run([ALONE[1]] * 4, [0, 1, 2, 3])
  np.testing.assert_array_equal(same.tokens[1], mixed.tokens[1])
  extremes = [RowOptions(threshold=v, seed=0) for v in (1.0, 1e-6) * 2]
  calls = run(extremes, [0, 1, 2, 3]).function_evaluations
  other = run(extremes[1:] + extremes[:1], [0, 1, 2, 3]).function_evaluations
  free = np.sum(requests.valid & ~requests.fixed, axis=1)
  each, at_once = np.where([True, False] * 2, (calls, other), (other, calls))
  assert (each >= free).all() and (at_once < each).all()
  program = published.program(spec, denoiser)
  assert program._cache_size() == 1
  for row in (1, 3):
    alone = run([ALONE[row]], [row])
    np.testing.assert_array_equal(alone.tokens[0], mixed.tokens[row])
    np.testing.assert_allclose(
      alone.log_prob[0], mixed.log_prob[row], atol=1e-4
    )
  assert np.isfinite(mixed.log_prob).all() and (mixed.log_prob <= 0.0).all()


@pytest.mark.all
def test_seeds_ends_and_least_lengths_are_each_rows_own():
  config, objective = SamplerConfig(preset="mdlm"), OBJECTIVES["mdlm"]
  plain = sample(config, objective, [RowOptions()] * ROWS, key=7)
  seeded = sample(config, objective, [RowOptions(seed=7)] * ROWS, key=1)
  np.testing.assert_array_equal(seeded.tokens, plain.tokens)
  ends = np.asarray(plain.tokens)[:, 4]  # of each row, what it drew there
  rows = [
    RowOptions(seed=7, end_ids=(int(ends[0]),)),
    RowOptions(seed=7, end_ids=()),
    RowOptions(seed=7, end_ids=(int(ends[2]),), min_tokens=6),
    RowOptions(seed=7, end_ids=(int(ends[3]), 0, 1)),
  ]
  found = np.asarray(sample(config, objective, rows).tokens)
  np.testing.assert_array_equal(found[1], plain.tokens[1])
  assert (found[2, 2:] != ends[2]).all()
  for row in (0, 3):
    ended = np.isin(plain.tokens[row, 2:], rows[row].end_ids)
    first = 2 + int(np.argmax(ended))
    np.testing.assert_array_equal(found[row, :first], plain.tokens[row, :first])
    assert (found[row, first:] == plain.tokens[row, first]).all()


@pytest.mark.all
def test_frequent_tokens_become_rarer_as_they_are_written():
  """One slot a call: logits less what the row wrote before, prompt left out."""
  objective = OBJECTIVES["autoregressive"]
  config = SamplerConfig(preset="autoregressive", stop=False)
  rows = [
    RowOptions(temperature=0.0),
    RowOptions(temperature=0.0, frequency_penalty=1.5),
    RowOptions(temperature=0.0, presence_penalty=9.0),
    RowOptions(temperature=0.0, repetition_penalty=4.0),
  ]
  found = np.asarray(sample(config, objective, rows).tokens)
  for row, option in enumerate(rows):
    text, new = [0, 1], []
    for slot in range(2, LENGTH):
      x = np.array(TABLE[((slot - 1) * 7 + text[-1]) % 64], np.float64)
      for token in set(text) if option.repetition_penalty else ():
        x[token] *= 4.0 if x[token] < 0 else 0.25
      for token in set(new):
        x[token] -= option.presence_penalty or 0.0
        x[token] -= (option.frequency_penalty or 0.0) * new.count(token)
      x[MASK] = -np.inf
      text.append(int(x.argmax()))
      new.append(text[-1])
    assert found[row].tolist() == text


@pytest.mark.all
def test_texts_end_where_their_own_rows_do():
  generator = Generator(
    OBJECTIVES["llada"],
    NETWORK,
    Numbers(vocab_size=VOCAB, mask_id=MASK, end_ids=ENDS),
    mesh=make_mesh(devices=jax.devices()[:1]),
  )
  rows = [continuation([0, 1], new_tokens=6)] * 3
  config = SamplerConfig(preset="llada", temperature=0.6, top_k=3)
  numbers = [0, 0, 0]
  plan = lambda chosen: generator.plan(
    rows, length=LENGTH, sampler=config, numbers=numbers, options=chosen
  )
  whole = generator({}, Process(), plan([RowOptions(end_ids=())] * 3), seed=4)
  text = whole.rows[0]
  assert whole.rows == [text] * 3 and len(text) == LENGTH
  ends = [(text[3],), (), (text[5], text[7])]
  chosen = [RowOptions(end_ids=end) for end in ends]
  found = generator({}, Process(), plan(chosen), seed=4).rows
  cut = lambda end: next((i for i in range(2, 8) if text[i] in end), LENGTH)
  assert found == [text[: cut(end)] for end in ends]
  with pytest.raises(ValueError, match="3 rows want as many options, not 1"):
    plan([RowOptions()])
  with pytest.raises(ValueError, match="give each row a seed, or none"):
    plan([RowOptions(seed=1), RowOptions(), RowOptions()])


def test_no_value_has_canvas_times_vocabulary():
  """Options, penalties and biases among them."""
  rows, length, vocab = 2, 512, 50_000
  objective = MDLM(vocab_size=vocab, mask_id=vocab - 1)
  config = SamplerConfig(preset="llada")
  spec = config.build(objective, length=length, end_ids=(0,), top=5)
  chosen = [RowOptions(logit_bias={3: 1.0}, presence_penalty=1.0)] * rows
  made = stack(chosen, defaults=config.options((0,)), objective=objective)
  requests = build(
    [[1] + [None] * 511] * rows, objective=objective, length=length
  )
  denoiser = toys.mixer(vocab, 8)
  params = jax.eval_shape(denoiser.init, jax.random.key(0), None)
  jaxpr = jax.make_jaxpr(
    lambda params, key, requests: generate(
      spec, denoiser, params, Process(), key, requests
    )
  )(params, jax.random.key(0), requests.replace(options=made))
  assert not jaxprs.larger_than(jaxpr, length * vocab)
  assert jaxprs.larger_than(jaxpr, 8 * vocab)
