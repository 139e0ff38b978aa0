"""MMaDA's losses against the original: `golden/mmada`, `golden/mmada_prompting`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.images import ImageVocabulary
from dllm_jax.core.types import Batch, ModelInputs
from dllm_jax.objectives.mmada import MMaDA
from dllm_jax.pretrained import load_pretrained
from tests import golden_cases
from tests.pretrained.golden import publish

CASE = golden_cases.load("mmada")
A = CASE.arrays
SIZES = CASE.config["batch"]
MASK = CASE.config["hf_config"]["mask_token_id"]
VOCAB = CASE.config["hf_config"]["vocab_size"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return load_pretrained(
    publish("mmada", tmp_path_factory.mktemp("m") / "mmada")
  )


def raised():
  """The float 0/1 bias of the first rows; constant for all others."""
  found = np.ones(A["input_ids"].shape, np.float32)
  found[: SIZES["t2i"]] = A["t2i_masks"]
  return found


def inputs(raised):
  ids = jnp.asarray(A["input_ids"])
  return ModelInputs(
    latent=ids,
    positions=jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape),
    segment_ids=jnp.ones_like(ids),
    raised=raised,
  )


@pytest.fixture(scope="module")
def outputs(model):
  apply = jax.jit(lambda p, i: model.denoiser.apply(p, i, None)[0])
  return apply(model.params, inputs(raised()))


def test_logits_with_the_float_bias(outputs):
  found = outputs.hidden @ outputs.unembed
  np.testing.assert_allclose(found[..., :VOCAB], A["logits"], atol=2e-4)


def batch_and_objective(**fields):
  """Rows of the three kinds, told by marks that the recorded ones lack.

  The recorded ids are random: what counts comes from the labels, and a row's
  kind from a first token that only `batch` has.
  """
  rows = A["input_ids"].shape[0]
  t2i, lm = SIZES["t2i"], SIZES["lm"]
  images = ImageVocabulary(
    offset=VOCAB, codes=2**10, tokens=1, pad=VOCAB, to_image=VOCAB,
    understand=VOCAB + 1,
  )  # fmt: skip
  objective = MMaDA(
    vocab_size=VOCAB, mask_id=MASK, images=images, t2i=1.0, lm=1.0, mmu=1.0,
    time_epsilon=0.0, **fields,
  )  # fmt: skip
  labels = A["labels"]
  x0 = np.where(labels == -100, A["input_ids"], labels)
  masked = A["input_ids"] == MASK
  masked[:t2i] = (labels[:t2i] != -100) & (
    np.arange(labels.shape[1]) > SIZES["max_seq_length"]
  )
  t = np.zeros((rows, 1), np.float32)
  t[t2i : t2i + lm] = A["p_mask_lm"][:, :1]
  t[t2i + lm :] = A["p_mask_mmu"][:, :1]
  kind = np.zeros(rows, int)
  kind[:t2i], kind[t2i + lm :] = VOCAB, VOCAB + 1
  x0 = x0.copy()
  x0[:, 0] = np.where(kind > 0, kind, x0[:, 0])
  one = np.ones(x0.shape, bool)
  batch = Batch(
    tokens=x0, loss_mask=one, segment_ids=one.astype(np.int32),
    positions=np.arange(x0.shape[1]) + 0 * x0,
  )  # fmt: skip
  return batch, objective, t, masked


def losses(outputs, lengths_lm=None, **fields):
  batch, objective, t, masked = batch_and_objective(**fields)
  t2i, lm = SIZES["t2i"], SIZES["lm"]
  # Only the labels say what counts of a picture here: no marks besides.
  batch = batch.replace(
    loss_mask=np.where(objective.drawing(batch.tokens), masked, True)
  )
  lengths = np.full((batch.tokens.shape[0], 1), batch.tokens.shape[1], float)
  lengths[t2i + lm :] = A["answer_lengths"][:, :1]
  if lengths_lm is not None:
    lengths[t2i : t2i + lm] = lengths_lm
  drawn = objective.weighted(batch, t, A["input_ids"], masked, lengths)
  # The kinds were told apart; targets are the recorded ones.
  targets = np.where(A["labels"] == -100, 0, A["labels"])
  return drawn, targets, objective


def parts(outputs, drawn, targets):
  log_p = jax.nn.log_softmax((outputs.hidden @ outputs.unembed)[..., :VOCAB])
  nats = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
  weighted = nats * drawn.factor
  t2i, lm = SIZES["t2i"], SIZES["lm"]
  return (
    weighted[:t2i].sum(),
    weighted[t2i : t2i + lm].sum(),
    weighted[t2i + lm :].sum(),
  )


def test_three_losses(outputs):
  drawn, targets, _ = losses(outputs)
  found = parts(outputs, drawn, targets)
  for value, name in zip(found, ("t2i", "lm", "mmu"), strict=True):
    np.testing.assert_allclose(value, A[f"loss_{name}"], rtol=1e-4)
  np.testing.assert_allclose(drawn.share.sum(), 1.0, rtol=1e-6)


def test_text_over_its_answer(outputs):
  own = A["answer_lengths_lm"][:, :1]
  drawn, targets, _ = losses(outputs, own, text_over="answer")
  found = parts(outputs, drawn, targets)[1]
  np.testing.assert_allclose(found, A["loss_lm_with_answer_lengths"], rtol=1e-4)


# ------------------------------------------------------------- what is drawn

ROWS = golden_cases.load("mmada_prompting")


def over_rows(**fields):
  said = ROWS.config
  images = ImageVocabulary(tokens=said["num_vq_tokens"])
  return MMaDA(
    vocab_size=said["vocab_size"], mask_id=said["tokenizer"]["mask_token_id"],
    images=images, length=said["max_seq_len"],
    condition_dropout=said["cond_dropout_prob"], **fields,
  )  # fmt: skip


def test_masked_pictures():
  a, objective = ROWS.arrays, over_rows()
  mask = objective.mask_id
  clean = a["t2i_input_ids"].copy()
  first = objective.prompt_tokens + 1
  clean[:, first:-1] = a["t2i_codes"] + objective.images.offset
  z = objective.masked_picture(
    jnp.asarray(clean),
    a["t2i_uniform_time"][:, None],
    a["t2i_uniform_rank"],
    a["t2i_uniform_drop"][:, None],
  )
  np.testing.assert_array_equal(z, a["t2i_input_ids"])
  share = np.cos(np.pi / 2 * a["t2i_uniform_time"])
  np.testing.assert_allclose(share, a["t2i_mask_prob"], atol=1e-6)
  counts = np.maximum(np.round(objective.images.tokens * share), 1)
  np.testing.assert_array_equal((np.asarray(z) == mask).sum(1), counts)


@pytest.mark.parametrize("name", ["lm", "lm_chat", "mmu"])
@pytest.mark.few(1)
def test_factors_of_text(name):
  """Of every position, by the recorded noise, the original's 1 / (p length)."""
  a, objective = ROWS.arrays, over_rows(text_over="answer", lm=1.0, mmu=1.0)
  tokens, noised = a[f"{name}_input_ids"], a[f"{name}_noised"]
  prompt = a.get(f"{name}_prompt_mask", np.zeros_like(tokens)) > 0
  batch = Batch(
    tokens=tokens, loss_mask=~prompt, segment_ids=np.ones_like(tokens),
    positions=np.arange(tokens.shape[1]) + 0 * tokens,
  )  # fmt: skip
  p = (
    objective.time_epsilon
    + (1 - objective.time_epsilon) * (a[f"{name}_uniform_t"][:, None])
  )
  np.testing.assert_allclose(
    np.broadcast_to(p, tokens.shape), a[f"{name}_p_mask"], atol=1e-6
  )
  masked = (a[f"{name}_uniform_mask"] < p) & ~prompt
  np.testing.assert_array_equal(
    np.where(masked, objective.mask_id, tokens), noised
  )
  drawn = objective.weighted(batch, p, noised, masked)
  lengths = a[f"{name}_answer_lengths"]
  expected = masked / (a[f"{name}_p_mask"] * lengths * len(tokens))
  np.testing.assert_allclose(drawn.factor, expected, rtol=2e-5)


# ------------------------------------------------------------------ gradients


@pytest.mark.all
def test_gradients_and_parts_of_a_batch(model):
  """The loss is the plain formula's, gradients too, however rows are split."""
  a, objective = ROWS.arrays, over_rows(pads="float")
  objective = dataclasses.replace(objective, vocab_size=134_656)
  t2i, mmu = a["t2i_input_ids"][:2].copy(), a["mmu_input_ids"][:2]
  first = objective.prompt_tokens + 1
  t2i[:, first:-1] = a["t2i_codes"][:2] + objective.images.offset
  counts = np.arange(t2i.shape[1]) >= first - 1
  tokens = np.concatenate([t2i, mmu, a["lm_input_ids"][:2]]).astype(np.int32)
  loss_mask = np.concatenate([
    np.broadcast_to(counts, t2i.shape), a["mmu_prompt_mask"][:2] == 0,
    np.ones_like(t2i, bool),
  ])  # fmt: skip
  batch = Batch(
    tokens=jnp.asarray(tokens), loss_mask=jnp.asarray(loss_mask),
    segment_ids=jnp.ones_like(tokens),
    positions=jnp.arange(tokens.shape[1]) + 0 * tokens,
  )  # fmt: skip
  step = jnp.zeros((), jnp.int32)
  process = objective.init(jax.random.key(0))
  drawn = objective.draw(process, jax.random.key(1), batch, step=step)
  width = 8
  table = jax.random.normal(jax.random.key(2), (width, 134_656)) * 0.3
  state = jax.random.normal(jax.random.key(3), (*tokens.shape, width))

  from dllm_jax.core.types import ModelOutputs

  def loss(state, rows=slice(None)):
    part = jax.tree.map(lambda x: x[rows], (batch, drawn))
    out = lambda _: ModelOutputs(hidden=state[rows], unembed=table)
    found = objective.loss(process, out, part[1], part[0], step=step)
    return found.total, found

  def plain(state):
    log_p = jax.nn.log_softmax(state @ table)
    nats = -jnp.take_along_axis(log_p, batch.tokens[..., None], -1)[..., 0]
    masked = (drawn.z == objective.mask_id) & batch.loss_mask
    marks = jnp.isin(batch.tokens[:2], jnp.asarray([126084, 126085]))
    seen = jnp.concatenate([masked[:2] | marks, masked[2:]])
    mean = jnp.sum(nats[:2] * seen[:2]) / jnp.sum(seen[:2])
    answer = batch.loss_mask[2:4].sum(1, keepdims=True)
    said = jnp.sum(nats[2:4] * seen[2:4] / (drawn.t[2:4] * answer)) / 2
    text = jnp.sum(nats[4:] * seen[4:] / drawn.t[4:]) / tokens[4:].size
    return objective.t2i * mean + objective.mmu * said + objective.lm * text

  value, grad = jax.jit(jax.value_and_grad(lambda s: loss(s)[0]))(state)
  expected, wanted = jax.jit(jax.value_and_grad(plain))(state)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(grad, wanted, atol=1e-6)
  halves = [loss(state, slice(i, None, 2))[1] for i in range(2)]
  total = sum(float(one.total) for one in halves)
  weight = sum(float(one.weight) for one in halves)
  np.testing.assert_allclose(total / weight, value, rtol=1e-5)


@pytest.mark.parametrize("pads", ["float", "hard", "none"])
def test_what_fill_is(pads):
  """The three choices are three networks' inputs, of rows to be drawn."""
  objective = over_rows(pads=pads)
  tokens = jnp.asarray(ROWS.arrays["t2i_input_ids"][:1])
  fill = tokens[0] == objective.images.pad
  batch = Batch(
    tokens=tokens, loss_mask=tokens > 0, segment_ids=jnp.ones_like(tokens),
    positions=jnp.arange(tokens.shape[1])[None],
  )  # fmt: skip
  seen = objective.inputs(None, tokens, jnp.ones((1, 1)), batch)
  hidden = seen.segment_ids[0] == 0
  assert (hidden == (fill & (pads == "hard"))).all()
  assert (seen.raised is None) == (pads != "float")
  if pads == "float":
    np.testing.assert_array_equal(seen.raised[0], ~fill)


def test_bad_fields():
  with pytest.raises(ValueError, match="pads.*legal: float, hard, none"):
    MMaDA(vocab_size=5, mask_id=4, pads="soft")
  with pytest.raises(ValueError, match="condition_dropout"):
    MMaDA(vocab_size=5, mask_id=4, condition_dropout=2.0)


@pytest.mark.parametrize(
  "fields",
  [
    {"autoregressive_weight": 1.0},
    {"kept_weight": 0.1},
    {"mask_at_least_one": True},
    {"normalisation": "sequence"},
    {"sampling_epsilon": 1e-3},
    {"shift": 1},
    {"weighting": "uniform"},
  ],
  ids=lambda fields: next(iter(fields)),
)
def test_what_has_no_part_is_refused(fields):
  (name,) = fields
  with pytest.raises(ValueError, match=f"{name} has no part in") as error:
    MMaDA(vocab_size=5, mask_id=4, **fields)
  assert "\n" not in str(error.value)
