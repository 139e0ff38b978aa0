"""VRPO's loss against arrays of DARE's and le9endary's code, and its masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.types import Batch, Process
from dllm_jax.objectives.llada import LLaDA
from dllm_jax.posttraining import likelihood
from dllm_jax.posttraining.likelihood import Masks
from dllm_jax.posttraining.preferences import Pairs
from dllm_jax.posttraining.vrpo import Preference, VRPO
from tests import golden_cases, jaxprs, toys
from tests.sampling import published

RUNS = ("run0", "run1", "run2", "run3")


@pytest.fixture(scope="module")
def vrpo():
  return golden_cases.load("vrpo")


def _objective(case):
  return LLaDA(
    vocab_size=case.config["hf_config"]["vocab_size"],
    mask_id=case.config["mask_token_id"],
    random_length=0.0,
  )


def _batch(tokens, seen, given):
  """Returns a batch of rows whose first `given` tokens are the prompt."""
  slots = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
  return Batch(
    tokens=jnp.asarray(tokens),
    loss_mask=jnp.asarray((seen > 0) & (slots >= given)),
    segment_ids=jnp.asarray(seen),
    positions=jnp.asarray(slots, jnp.int32),
  )


def _pairs(batch, reference):
  """Returns rows 2i, 2i + 1 as pairs, and what the reference said `[B, n]`."""
  chosen, rejected = (jax.tree.map(lambda x: x[i::2], batch) for i in range(2))
  samples = np.stack([reference[::2], reference[1::2]], axis=1)
  columns = samples.reshape(len(samples), -1).T
  fields = ("tokens", "loss_mask", "segment_ids", "positions")
  ids = np.arange(len(samples), dtype=np.int32)
  return Pairs(
    **{name: getattr(chosen, name) for name in fields},
    rejected=rejected,
    number=jnp.asarray(ids),
    noise=jnp.zeros_like(ids),
    samples=tuple(map(jnp.asarray, columns)),
  )


def _masks(objective, batch, masked, rate):
  """Returns given masks `[B, n, L]` of given rates `[B, n]`."""
  z = jnp.where(masked, objective.mask_id, batch.tokens[:, None])
  weight = jnp.where(masked, 1 / jnp.asarray(rate)[..., None], 0.0)
  return Masks(z=z, weight=weight, t=jnp.asarray(rate)[..., None])


@functools.cache
def _program(objective):
  """Returns (params, masks, batch) -> samples, one program for all."""
  model = published.model("vrpo")

  def samples(params, masks, batch):
    denoise = lambda inputs: model.denoiser.apply(params, inputs, None)[0]
    terms = likelihood.log_terms(objective, Process(), denoise, masks, batch)
    return terms.sum(axis=-1)

  return jax.jit(samples), model.params


def _loss(method, samples, reference, tokens):
  """Returns the mean loss of pairs of rows 2i, 2i + 1."""
  gain = np.asarray(samples - reference)
  gain = np.stack([gain[::2], gain[1::2]], axis=1)
  score = method.scores(gain, tokens).mean(axis=-1)
  return float(np.mean(method.pair_losses(score)))


def _recorded(case, name):
  """Returns the batch and the masks of a run of DARE's code."""
  a, objective = case.arrays, _objective(case)
  batch = _batch(
    a["input_ids"], a["attention_mask"], case.config["prompt_length"]
  )
  masks = _masks(objective, batch, a[f"{name}_masked"], a[f"{name}_p_mask"])
  return batch, masks


@pytest.mark.parametrize("name", RUNS)
def test_dare(vrpo, name):
  a, beta = vrpo.arrays, vrpo.config["beta"]
  batch, masks = _recorded(vrpo, name)
  program, params = _program(_objective(vrpo))
  samples = program(params, masks, batch)
  np.testing.assert_allclose(samples, a[f"{name}_elbo_samples"], rtol=1e-5)
  # It divides estimates by the padded length, the same for all.
  length = vrpo.config["response_length"]
  for key, scale in (("loss", beta / length), ("loss_of_sums", beta)):
    found = _loss(VRPO(beta=scale), samples, a[f"{name}_ref_elbo_samples"], 1)
    np.testing.assert_allclose(found, a[f"{name}_{key}"], rtol=1e-5)


def test_gradient_of_dare(vrpo):
  a = vrpo.arrays
  batch, masks = _recorded(vrpo, "run0")
  model = published.model("vrpo")
  beta = vrpo.config["beta"] / vrpo.config["response_length"]
  loss = Preference(objective=_objective(vrpo), method=VRPO(beta=beta), seed=0)
  pairs = _pairs(batch, a["run0_ref_elbo_samples"])
  drawn = jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]), masks)

  @functools.partial(jax.jit)
  def value(params):
    denoise = lambda inputs: model.denoiser.apply(params, inputs, None)[0]
    found = loss.loss(Process(), denoise, drawn, pairs, step=jnp.int32(0))
    return found.total / found.weight, found

  (total, found), gradient = jax.value_and_grad(value, has_aux=True)(
    model.params
  )
  np.testing.assert_allclose(total, a["run0_loss"], rtol=1e-5)
  np.testing.assert_allclose(
    -found.bound.sum(axis=1),
    a["run0_elbo_samples"][::2].mean(axis=1),
    rtol=1e-5,
  )
  q = np.asarray(gradient["layers"]["attention"]["q"]["kernel"][0])
  want = a["run0_grad_q_proj_0"]
  for value, want in (
    (gradient["final_norm"]["scale"], a["run0_grad_ln_f"]),
    (q.reshape(want.shape[1], -1).T, want),
  ):
    np.testing.assert_allclose(
      value, want, rtol=0, atol=1e-5 * np.abs(want).max()
    )


@pytest.mark.parametrize("name", ["second", "second_shared"])
def test_le9endary(vrpo, name):
  a, fields = vrpo.arrays, vrpo.config["second"]
  objective = _objective(vrpo)
  prompt = a["second_prompt_ids"]
  answers = a["second_chosen_ids"], a["second_rejected_ids"]
  rows = [np.concatenate([prompt, answer], axis=1) for answer in answers]
  tokens = np.stack(rows, axis=1).reshape(-1, rows[0].shape[1])
  batch = _batch(tokens, np.ones_like(tokens), prompt.shape[1])
  t, order = a[f"{name}_t"], a[f"{name}_permutation"]
  size = answers[0].shape[1]
  share = np.clip(t, fields["min_prob"], fields["max_prob"])
  counts = (size * share).astype(int)
  program, params = _program(objective)

  def masks(permutations):
    """Returns masks whose first positions, in an order of each answer, are."""
    hidden = np.zeros((len(permutations), len(t), tokens.shape[1]), bool)
    for answer, of_answer in enumerate(permutations):
      for k, (count, places) in enumerate(zip(counts, of_answer, strict=True)):
        hidden[answer, k, prompt.shape[1] + places[:count]] = True
    hidden = np.tile(hidden, (len(prompt), 1, 1))
    rate = np.broadcast_to(t, hidden.shape[:2])
    return _masks(objective, batch, hidden, rate)

  samples = np.asarray(program(params, masks(order[:2]), batch))
  found = samples.mean(axis=1).reshape(-1, 2).T
  np.testing.assert_allclose(found, a[f"{name}_elbo"], rtol=1e-5)
  reference = a[f"{name}_ref_elbo"].T.reshape(-1, 1)
  method = VRPO(beta=fields["beta"], label_smoothing=fields["label_smoothing"])
  loss = _loss(method, samples, reference, 1)
  np.testing.assert_allclose(loss, a[f"{name}_loss"], rtol=1e-5)


def _answers(rows=3, length=12, vocab=9, seed=0):
  """Returns random pairs with prompts, answers of several lengths and padding."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(vocab - 1, size=(2 * rows, length)).astype(np.int32)
  ends = rng.integers(length - 4, length + 1, size=(2 * rows, 1))
  seen = (np.arange(length) < ends).astype(np.int32)
  return _pairs(_batch(tokens, seen, 3), np.zeros((2 * rows, 4)))


_OBJECTIVE = LLaDA(vocab_size=9, mask_id=8, random_length=0.0)


@functools.cache
def _drawn(method, reference=False):
  draw = functools.partial(
    method.masks, _OBJECTIVE, _OBJECTIVE.init(jax.random.key(0)), 7
  )
  return jax.jit(functools.partial(draw, reference=reference))


@pytest.mark.all
def test_masks_depend_on_the_pair_alone():
  draw, pairs = _drawn(VRPO(n_t=4)), _answers()
  whole = draw(pairs)
  turned = draw(jax.tree.map(lambda x: x[::-1], pairs))
  for a, b in zip(*map(jax.tree.leaves, (whole, turned)), strict=True):
    np.testing.assert_array_equal(a, b[::-1])
  other = draw(pairs.replace(noise=pairs.noise + 1))
  assert (np.asarray(whole.z) != other.z).any()


@pytest.mark.all
def test_reference_is_asked_of_the_same_or_of_its_own():
  pairs = _answers()
  for shared in (True, False):
    method = VRPO(n_t=4, shared_noise=shared)
    a, b = (_drawn(method, reference)(pairs) for reference in (False, True))
    assert np.array_equal(a.z, b.z) == shared


@pytest.mark.parametrize("n_yt", [1, 2])
def test_counts_are_spread_over_the_samples(n_yt):
  pairs = _answers()
  masks = _drawn(VRPO(n_t=4, n_yt=n_yt))(pairs)
  hidden = np.asarray(masks.z) == 8
  counts, tokens = hidden.sum(axis=-1), 0
  for side, rows in enumerate((pairs, pairs.rejected)):
    tokens = np.asarray(rows.loss_mask).sum(axis=1)
    assert not (hidden[:, side] & ~np.asarray(rows.loss_mask)[:, None]).any()
    for n, found in zip(tokens, counts[:, side], strict=True):
      times = found.reshape(4, n_yt)
      assert (times == times[:, :1]).all() and times.min() >= 1
      quarters = np.sort((times[:, 0] - 1) * 4 // n)
      assert np.ptp(quarters) >= 2 and times.max() <= n
      weight = np.asarray(masks.weight)[:, side].max(axis=-1)
    np.testing.assert_allclose(
      weight, tokens[:, None] / counts[:, side], rtol=1e-6
    )


@pytest.mark.all
def test_never_all_positions_times_the_vocabulary(monkeypatch):
  from dllm_jax.core import vocabulary

  monkeypatch.setattr(vocabulary, "_chunk_rows", lambda vocab: 8)
  network = toys.mixer(9, 5)
  params = network.init(jax.random.key(0), None)
  pairs, method = _answers(), VRPO(n_t=2, n_yt=2)
  loss = Preference(objective=_OBJECTIVE, method=method, seed=0)
  process = _OBJECTIVE.init(jax.random.key(0))

  def value(params):
    denoise = lambda inputs: network.apply(params, inputs, None)[0]
    step = jnp.int32(0)
    drawn = loss.draw(process, jax.random.key(0), pairs, step=step)
    return loss.loss(process, denoise, drawn, pairs, step=step).total

  traced = jax.make_jaxpr(jax.grad(value))(params)
  rows = pairs.tokens.shape[0] * 2 * method.samples
  shapes = {shape for _, shape in jaxprs.values(traced)}
  assert (rows, 12, 9) not in shapes and (rows * 12, 9) not in shapes


@pytest.mark.parametrize(
  ("fields", "says"),
  [
    ({"beta": 0.0}, "beta must be above 0"),
    ({"label_smoothing": 0.5}, "label_smoothing must lie"),
    ({"n_t": 0}, "vrpo.n_t must be at least 1"),
    ({"estimator": "left"}, "unknown vrpo.estimator 'left'; legal: counts"),
    ({"normalisation": "length"}, "legal: sum, tokens"),
  ],
)
def test_illegal_fields(fields, says):
  with pytest.raises(ValueError, match=says):
    VRPO(**fields)
