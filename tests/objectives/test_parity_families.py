"""Training losses of families against arrays of their own code."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.mask import materialise
from dllm_jax.core.types import Batch
from dllm_jax.objectives.autoregressive import Autoregressive
from dllm_jax.objectives.base import Drawn
from dllm_jax.objectives.bd3lm import BD3LM
from dllm_jax.objectives.dream import Annealed, Dream
from dllm_jax.objectives.llada import Cut, LLaDA
from tests import golden_cases, quick
from tests.sampling import published

MASKED = {"parameterisation": "softmax", "normalisation": "masked"}


def batch_of(tokens, counts, segments=None):
  """Returns rows of tokens of which some count."""
  slots = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
  segments = np.ones_like(tokens) if segments is None else segments
  return Batch(
    tokens=jnp.asarray(tokens),
    loss_mask=jnp.asarray(counts),
    segment_ids=jnp.asarray(segments, jnp.int32),
    positions=jnp.asarray(slots, jnp.int32),
  )


def losses(name, objective, drawn, batch):
  """Returns the loss, gradients of its quotient, and the network's inputs."""
  model = published.model(name)
  process = objective.init(jax.random.key(0))
  seen = []

  def value(params):
    def denoise(inputs):
      seen.append(inputs)
      return model.denoiser.apply(params, inputs, None)[0]

    loss = objective.loss(process, denoise, drawn, batch, step=jnp.int32(0))
    return loss.total / loss.weight, (loss.total, loss.weight)

  gradient, (total, weight) = jax.jit(jax.grad(value, has_aux=True))(
    model.params
  )
  return float(total), float(weight), gradient, seen


def same_gradient(arrays, prefix, gradient, scale=1.0, rtol=1e-4):
  """Checks two gradients; tolerance is of the largest entry."""
  ours = {
    "grad_norm": gradient["final_norm"]["scale"],
    "grad_q_proj_0": gradient["layers"]["attention"]["q"]["kernel"][0],
  }
  for key, value in ours.items():
    want = arrays.get(f"{prefix}_{key}")
    if want is None:  # of variants the first is kept alone
      assert key != "grad_norm"
      continue
    if want.ndim == 2:
      value = np.asarray(value).reshape(want.shape[1], -1).T
    np.testing.assert_allclose(
      value * scale, want, rtol=0, atol=rtol * np.abs(want).max()
    )


@pytest.mark.all
def test_fast_dllm_v2_masks_each_token_once():
  case = golden_cases.load("fast_dllm_v2")
  a, mask = case.arrays, case.config["mask_id"]
  tokens = a["train_input_ids"]
  rows, length = tokens.shape
  objective = BD3LM(
    vocab_size=case.config["hf_config"]["vocab_size"],
    mask_id=mask,
    length=length,
    block_size=case.config["hf_config"]["bd_size"],
    shift=1,
    opens=True,
    weighting="uniform",
    complement=True,
    **MASKED,
  )
  z = a["train_inputs"][:rows, :length]
  drawn = Drawn(t=jnp.ones(z.shape), z=jnp.asarray(z))
  batch = batch_of(tokens, a["train_labels"] != -100)
  total, weight, gradient, seen = losses(
    "fast_dllm_v2", objective, drawn, batch
  )
  np.testing.assert_allclose(total / weight, a["train_loss"], rtol=1e-5)
  assert weight == (a["train_targets"] != -100).sum()
  same_gradient(a, "train", gradient)
  bias = gradient["layers"]["attention"]["q"]["bias"][0].reshape(-1)
  want = a["train_grad_q_bias_0"]
  atol = 1e-4 * np.abs(want).max()
  np.testing.assert_allclose(bias, want, rtol=0, atol=atol)


def nemotron(**fields):
  case = golden_cases.load("nemotron")
  kind = fields.pop("kind")
  space = {
    "vocab_size": case.config["hf_config"]["vocab_size"],
    "mask_id": case.config["mask_id"],
  }
  return case, kind(**space, **MASKED, **fields)


def corrupted(case, prefix):
  """Returns times, as rates of masks, and recorded rows."""
  a, train = case.arrays, case.config["train"]
  t = (1 - train["eps"]) * a[f"{prefix}_t"][:, None] + train["eps"]
  masked = a[f"{prefix}_masked"] > 0
  z = np.where(masked, case.config["mask_id"], a["train_input_ids"])
  return jnp.asarray(t, jnp.float32), jnp.asarray(z)


@pytest.mark.all
def test_nemotron_trains_both_ways():
  case, objective = nemotron(kind=LLaDA, random_length=0.0)
  a = case.arrays
  t, z = corrupted(case, "bidirectional")
  batch = batch_of(a["train_input_ids"], a["train_loss_mask"] > 0)
  total, weight, gradient, _ = losses(
    "nemotron", objective, Cut(t=t, z=z), batch
  )
  np.testing.assert_allclose(total, a["bidirectional_loss"], rtol=1e-5)
  assert weight == a["bidirectional_count"]
  same_gradient(a, "bidirectional", gradient, weight)


@pytest.mark.all
def test_nemotron_trains_blocks_on_a_causal_context():
  train = golden_cases.load("nemotron").config["train"]
  length = golden_cases.load("nemotron").arrays["train_input_ids"].shape[1]
  case, objective = nemotron(
    kind=BD3LM,
    length=length,
    block_size=train["block_size"],
    attention="causal_context",
    opens=True,
    times_of="row",
    autoregressive_weight=train["ar_loss_weight"],
  )
  a = case.arrays
  t, z = corrupted(case, "block_diff_all")
  drawn = Drawn(t=jnp.broadcast_to(t, z.shape), z=z)
  batch = batch_of(a["train_input_ids"], np.ones_like(z, bool))
  total, weight, *_ = losses("nemotron", objective, drawn, batch)
  # Theirs scales queries of clean tokens as if those stood a row later.
  want = a["block_diff_all_loss_repeated_scale"]
  np.testing.assert_allclose(total, want, rtol=1e-5)
  assert weight == a["block_diff_all_masked"].sum()
  # Under a mask of what counts theirs counts fewer drafts, and the same text:
  # ours then leaves that out of the text as well.
  drafts = dataclasses.replace(objective, autoregressive_weight=0.0)
  every, *_ = losses("nemotron", drafts, drawn, batch)
  t, z = corrupted(case, "block_diff")
  drawn = Drawn(t=jnp.broadcast_to(t, z.shape), z=z)
  batch = batch_of(a["train_input_ids"], a["train_loss_mask"] > 0)
  some, *_ = losses("nemotron", drafts, drawn, batch)
  np.testing.assert_allclose(
    total - every + some, a["block_diff_loss_repeated_scale"], rtol=1e-5
  )


@pytest.mark.parametrize("j", [quick.long(0), quick.long(1)])
def test_idlm_trains_drafts_beside_the_next_token(j):
  case = golden_cases.load("idlm")
  a, train = case.arrays, case.config["train"]
  tokens, labels = a["train_input_ids"], a["train_labels"]
  values = {}
  for weight in (train["ce_alpha"], None):
    objective = Autoregressive(
      vocab_size=case.config["hf_config"]["vocab_size"],
      mask_id=case.config["mask_id"],
      begins=False,
      masks_ahead=train["blocks"][j],
      clean_weight=weight,
    )
    drawn = Drawn(t=jnp.ones((1, 1)), z=jnp.asarray(tokens))
    batch = batch_of(tokens, labels != -100)
    total, count, gradient, seen = losses("idlm", objective, drawn, batch)
    values[weight] = total / count
    kind = "train{}" if weight is not None else "train{}_auto_balance"
    same_gradient(a, kind.format(j), gradient)
  (inputs,) = seen
  slots = jnp.arange(2 * tokens.shape[1])
  mask = materialise(
    inputs.mask,
    slots,
    slots,
    q_segments=jnp.ones((1, len(slots))),
    k_segments=jnp.ones((1, len(slots))),
    extra=jnp.arange(len(slots))[:, None] >= slots
    if inputs.extra_mask is None
    else (slots[:, None] >= slots) | (slots >= tokens.shape[1]),
  )
  np.testing.assert_array_equal(mask[0], a[f"train{j}_mask"])
  want = {train["ce_alpha"]: a[f"train{j}_loss"]}
  want[None] = a[f"train{j}_loss_auto_balance"]
  for weight, value in want.items():
    np.testing.assert_allclose(values[weight], value, rtol=1e-5)


@pytest.mark.parametrize("j", [quick.long(0), quick.long(1)])
def test_idlm_trains_all_drafts_of_an_answer_as_nemo_does(j):
  case = golden_cases.load("idlm")
  a, train = case.arrays, case.config["train"]
  tokens, valid = a[f"nemo{j}_input_ids"], a[f"nemo{j}_valid_mask"]
  batch = batch_of(tokens, a[f"nemo{j}_answer_mask"], valid)
  want = {
    train["ce_alpha"]: "loss",
    0.0: "noisy_loss",
    None: "loss_auto_balance",
  }
  for weight, name in want.items():
    objective = Autoregressive(
      vocab_size=case.config["hf_config"]["vocab_size"],
      mask_id=case.config["mask_id"],
      begins=False,
      masks_ahead=train["blocks"][j],
      clean_weight=weight,
      drafted="answer",
    )
    drawn = Drawn(t=jnp.ones((1, 1)), z=jnp.asarray(tokens))
    total, count, gradient, _ = losses("idlm", objective, drawn, batch)
    np.testing.assert_allclose(total / count, a[f"nemo{j}_{name}"], rtol=1e-5)
    if name == "loss":
      same_gradient(a, f"nemo{j}", gradient)


@pytest.mark.all
def test_dreamon_trains_on_merged_masks():
  case = golden_cases.load("dreamon")
  a, mask = case.arrays, case.config["mask_id"]
  # Merged masks are one: what the others of a pair are is taken out, as where
  # gaps are filled. (Theirs may ask what was taken out for the token behind it.)
  live = a["train_attention"] > 0
  order = np.argsort(~live, axis=1, kind="stable")
  take = lambda x: np.take_along_axis(x, order, axis=1)
  used = take(live)
  z = np.where(used, take(a["train_input_ids"]), 0)
  objective = Dream(
    vocab_size=case.config["hf_config"]["vocab_size"],
    mask_id=mask,
    parameterisation="softmax",
    token_weights="time",
    weighting="linear",
    normalisation="masked",
  )
  tokens = np.where(used, take(a["train_labels"]), 0)
  batch = batch_of(tokens, take(a["train_loss_mask"]) & used, used)
  drawn = Annealed(t=jnp.asarray(a["train_t"]), z=jnp.asarray(z))
  total, weight, *_ = losses("dreamon", objective, drawn, batch)
  np.testing.assert_allclose(
    total / weight, a["train_loss_removed_plain"], rtol=1e-5
  )


@pytest.mark.all
def test_wedlm_trains_masks_behind_decided_tokens():
  case = golden_cases.load("wedlm")
  a, train = case.arrays, case.config["train"]
  starts, block = a["train_cum_seqlens"], train["block_size"]
  most = -(-int(np.diff(starts).max()) // block) * block
  rows = len(starts) - 1
  tokens, counts = (
    np.zeros((rows, most), np.int32),
    np.zeros((rows, most), bool),
  )
  z, t, segments = tokens.copy(), np.ones((rows, most)), tokens.copy()
  for b, (first, last) in enumerate(zip(starts, starts[1:], strict=False)):
    here, n = slice(first, last), last - first
    tokens[b, :n] = a["train_input_ids"][here]
    counts[b, :n] = a["train_labels"][here] != -100
    segments[b, :n] = 1
    # Theirs lie in another order, each at its position.
    noisy = slice(first + last, 2 * last)
    at = a["train_positions"][noisy]
    z[b, at] = a["train_packed"][noisy]
    masked = a["train_masked"][noisy]
    t[b, at[masked]] = a["train_p_mask"][noisy][masked]
  objective = BD3LM(
    vocab_size=case.config["hf_config"]["vocab_size"],
    mask_id=case.config["mask_id"],
    length=most,
    block_size=block,
    attention="decided_first",
    parameterisation="softmax",
    normalisation="weight",
    autoregressive_weight=train["ar_loss_weight"],
  )
  drawn = Drawn(t=jnp.asarray(t, jnp.float32), z=jnp.asarray(z))
  batch = batch_of(tokens, counts, segments)
  total, weight, gradient, _ = losses("wedlm", objective, drawn, batch)
  # Theirs is divided by 1 + w besides, ours by nothing.
  share = 1 + train["ar_loss_weight"]
  np.testing.assert_allclose(total / weight / share, a["train_loss"], rtol=1e-5)
  same_gradient(a, "train", gradient, 1 / share)
  alone = dataclasses.replace(objective, autoregressive_weight=0.0)
  uniform = dataclasses.replace(alone, weighting="uniform")
  for one, name in (alone, "mlm_loss"), (uniform, "mlm_loss_uniform"):
    total, weight, *_ = losses("wedlm", one, drawn, batch)
    np.testing.assert_allclose(total / weight, a[f"train_{name}"], rtol=1e-5)
