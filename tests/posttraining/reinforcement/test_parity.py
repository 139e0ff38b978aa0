"""Masks, scores, losses and gradients against the arrays of six originals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.posttraining.reinforcement import rollouts
from dllm_jax.posttraining.reinforcement.methods import (
  coupled_grpo,
  CoupledGRPO,
  diffu_grpo,
  DiffuGRPO,
  ESPO,
  espo,
  SPG,
  TraceRL,
  tracerl,
  WD1,
)
from dllm_jax.posttraining.reinforcement.methods.advantages import advantages
from dllm_jax.posttraining.reinforcement.methods.base import masks
from dllm_jax.posttraining.reinforcement.methods.value import (
  credit,
  value_loss,
)
from tests import quick
from tests.posttraining.reinforcement.recorded import (
  halves,
  near,
  recorded,
  same,
  value,
)


def _rewards(case):
  a, config = case.arrays, case.config
  each = np.where(a["rewards_valid"], a["rewards_per_func"], 0.0)
  return (each @ np.asarray(config["reward_weights"], np.float32)).reshape(
    -1, config["num_generations"]
  )


def _one_view(case, uniform, batch):
  """Returns d1's view of recorded uniforms, all of the region asked for."""
  hidden = diffu_grpo.prompt_and_answer(
    uniform, case.config["p_mask_prompt"], batch
  )
  region = batch.region[:, None]
  return masks(case.objective, batch, hidden[:, None], region)


@pytest.mark.all
def test_diffu_grpo():
  case = recorded("diffu_grpo")
  a, config = case.arrays, case.config
  same(advantages(_rewards(case)).ravel(), a["advantages"])
  method = DiffuGRPO(
    beta=config["beta"],
    clip_low=config["epsilon"],
    clip_high=config["epsilon"],
    guidance=config["cfg_scale"],
  )
  batch = case.rows(seen=True)
  given = a["prompt_ids"].shape[1]
  advantage = a["advantages"][:, None]
  for i, uniform in enumerate(a["uniform"]):
    views = _one_view(case, uniform, batch)
    np.testing.assert_array_equal(views.z[:, 0], a["perturbed"][i])
    asked = batch.replace(
      old=case.behind(a["old_per_token_logps"][i]),
      reference=case.behind(a["ref_per_token_logps"][i]),
    )
    if i == 0:
      case.check_gradient("loss_0", [method], views, asked)
    scores, lost = case.said([method], views, asked)
    ((loss, metrics),) = lost
    same(scores[:, given:], a["per_token_logps"][i])
    near(loss, a["loss"][i])
    same(metrics["kl"], a["kl"][i])
    # d1 counts where clipping would make the term larger, and does not bind.
    gain = (scores - asked.old)[:, given:]
    free, held = (
      np.exp(gain) * advantage,
      np.clip(np.exp(gain), 1 - config["epsilon"], 1 + config["epsilon"])
      * advantage,
    )
    where = asked.loss_mask[:, given:]
    same(np.mean((free < held)[where]), a["clip_ratio"][i])
    same(metrics["clip_fraction"], np.mean((free > held)[where]))


@pytest.mark.all
def test_diffu_grpo_on_policy():
  case = recorded("diffu_grpo")
  method = DiffuGRPO(beta=0.0, guidance=case.config["cfg_scale"])
  batch = case.rows(seen=True)
  views = _one_view(case, case.arrays["uniform"][0], batch)
  _, lost = case.check_gradient("on_policy", [method], views, batch)
  same(lost[0][0], case.arrays["on_policy_loss"])


@pytest.mark.all
def test_diffu_grpo_of_dllm():
  case = recorded("diffu_grpo")
  a, config = case.arrays, case.config
  port = config["dllm"]
  rewards = _rewards(case)
  same(advantages(rewards).ravel(), a["dllm_advantages"])
  same(advantages(rewards, scale="std").ravel(), a["dllm_advantages_scaled"])
  method = DiffuGRPO(
    beta=config["beta"],
    clip_low=port["epsilon_low"],
    clip_high=port["epsilon_high"],
    cap=port.get("delta") or 0.0,
    tail="hidden",
  )
  batch = case.rows()
  batch = batch.replace(
    advantage=np.broadcast_to(
      a["dllm_advantages"][:, None], batch.tokens.shape
    ).copy()
  )
  given = a["prompt_ids"].shape[1]
  averages = {"bnpo": "token", "grpo": "sequence", "dr_grpo": "constant"}
  for i, uniform in enumerate(a["dllm_uniform"]):
    views = _one_view(case, uniform, batch)
    views = views.replace(
      weight=jnp.where(batch.loss_mask[:, None], views.weight, 0.0)
    )
    asked = batch.replace(
      old=case.behind(a["dllm_old_per_token_logps"][:, i]),
      reference=case.behind(a["dllm_ref_per_token_logps"][:, i]),
    )
    methods = [
      dataclasses.replace(method, average=x) for x in averages.values()
    ]
    if i == 0:
      case.check_gradient("dllm_loss_bnpo_0", methods, views, asked)
    scores, lost = case.said(methods, views, asked)
    same(scores[:, given:], a["dllm_per_token_logps"][:, i])
    for name, (loss, _) in zip(averages, lost, strict=True):
      near(loss, a[f"dllm_loss_{name}"][i])


@pytest.mark.all
def test_coupled_grpo():
  case = recorded("coupled_grpo")
  a, config = case.arrays, case.config
  kind = {"baseline": "leave_one_out"}
  same(advantages(_rewards(case), **kind).ravel(), a["advantages"])
  same(
    advantages(_rewards(case), scale="std", **kind).ravel(),
    a["advantages_scaled"],
  )
  method = CoupledGRPO(
    beta=config["beta"],
    clip_low=config["epsilon_low"],
    clip_high=config["epsilon_high"],
  )
  whole = case.rows(seen=True)
  given = a["prompt_ids"].shape[1]
  parts = config["gradient_accumulation_steps"]
  for i, ratio in enumerate(a["mask_ratio"]):
    uniform = np.tile(a["uniform"][i], (parts, 1))
    counted = whole.replace(loss_mask=whole.region)
    views = coupled_grpo.coupled_views(case.objective, counted, uniform, ratio)
    np.testing.assert_array_equal(np.moveaxis(views.z, 1, 0), a["perturbed"][i])
    same(
      case.scores(method, views, whole)[:, given:], a["per_token_logps"][:, i]
    )
    asked = whole.replace(
      old=case.behind(a["old_per_token_logps"][:, i]),
      reference=case.behind(a["ref_per_token_logps"][:, i]),
    )
    for part in range(parts):
      own = halves((views, asked), part, parts)
      if part == i == 0:
        case.check_gradient("loss_00", [method], *own)
      _, ((loss, _),) = case.said([method], *own)
      near(loss, a["loss"][i, part])


def _kl(config, other=False):
  return "k3" if config["use_kl_estimator_k3"] != other else "k1"


def _trace_method(config, **fields):
  return TraceRL(
    beta=config["beta"],
    clip_low=config["eps"],
    clip_high=config["eps"],
    kl=_kl(config),
    shrink=config["shrink"],
    ends=config["post_num"],
    rate_low=config["lower_p"],
    rate_high=config["upper_p"],
    **fields,
  )


def _trace_rows(case):
  """Returns rows whose answers end at the first padding."""
  a, start = case.arrays, case.config["start_pos"]
  tokens, pad = a["input_ids"], case.config["pad_token_id"]
  given = np.full(len(tokens), start)
  batch = rollouts.rows(tokens, given, tokens.shape[1] - start, (pad,))
  return spread(batch, a["reward"])


@pytest.mark.parametrize(
  "kind", ["trace", quick.long("random"), quick.long("coupled")]
)
@pytest.mark.all
def test_tracerl_llada(kind):
  case = recorded("tracerl_llada")
  a, config = case.arrays, case.config
  reward = advantages(
    a["correct"][None].astype(np.float32), scale="population_std"
  )[0]
  same(reward, a["reward_of_correct"], 1e-6)
  start = config["start_pos"]
  batch = _trace_rows(case)
  method = _trace_method(config)
  n = len(a["input_ids"])
  if kind == "trace":
    revealed = np.pad(a["step_map"], [(0, 0), (start, 0)])
    number, _ = tracerl.rounds(revealed, batch.region, config["shrink"])
    batch = batch.replace(round=number)
    views = tracerl.trajectory_views(
      case.objective, batch, int(number.max()) + 1, config["post_num"], "answer"
    )
    order = np.arange(n * views.z.shape[1])
  else:
    times = config["mask_times_per_sample"]
    low, high = config["lower_p"], config["upper_p"]
    rate = (high - low) * a["random_u_t" if kind == "random" else "coupled_u_t"]
    masked = a[f"{kind}_u_mask"] < (rate + low)[:, None]
    views = tracerl.random_views(
      case.objective,
      batch,
      masked.reshape(n, times, -1),
      config["post_num"],
      "answer",
      coupled=kind == "coupled",
    )
    order = np.arange(n * times)
    if kind == "coupled":  # a mask, then its complement
      order = np.arange(2 * n * times).reshape(n, 2, times)
      order = order.swapaxes(1, 2).ravel()
  z = np.asarray(views.z).reshape(-1, views.z.shape[-1])[order]
  asked = np.asarray(views.weight != 0).reshape(z.shape)[order]
  used = asked.any(axis=1)
  np.testing.assert_array_equal(asked[used], a[f"{kind}_p_mask"])
  np.testing.assert_array_equal(z[used], a[f"{kind}_noised"])
  old = np.zeros(z.shape, np.float32)
  back = np.empty_like(z, dtype=np.float32)
  old[used] = a[f"{kind}_logp_old"]
  back[order] = old
  old = np.moveaxis(back.reshape(views.z.shape), 1, 2)
  batch = batch.replace(old=old, loss_mask=batch.region)
  _check_trace(case, method, views, batch, kind)


def _check_trace(case, method, views, batch, kind):
  a, config = case.arrays, case.config
  replace = dataclasses.replace
  methods = [
    method,
    replace(method, beta=0.0),
    replace(method, kl=_kl(config, other=True)),
  ]
  _, lost = case.check_gradient(kind, methods, views, batch)
  for name, (loss, _) in zip(("", "_beta0", "_other_kl"), lost, strict=True):
    near(loss, a[f"{kind}_loss{name}"])


# Prompts are padded on the left to whole blocks, counted from their end; the
# recorded rows are prompt, clean answer and noisy answer.


def _sdar():
  # The original leaves the mask in the softmax; our sampler never draws it.
  return recorded("tracerl", parameterisation="softmax")


def _sdar_rows(case):
  """Returns the rows, on whole blocks, and what puts arrays of rows there."""
  a, config = case.arrays, case.config
  start, block = config["start_pos"], config["block_size"]
  tokens, pad = a["input_ids"], config["pad_token_id"]
  lead = -start % block
  behind = -(lead + tokens.shape[1]) % block
  on = lambda x: np.pad(x, [(0, 0)] * (x.ndim - 1) + [(lead, behind)])
  batch = rollouts.rows(
    on(tokens),
    np.full(len(tokens), start + lead),
    tokens.shape[1] - start,
    (pad,),
  )
  seen = np.ones_like(tokens)
  seen[:, :start] = tokens[:, :start] != pad
  first = np.searchsorted(a["value_sequence"], np.arange(len(tokens)))
  positions = a["trace_tok_idx"][first][:, : tokens.shape[1]]
  batch = batch.replace(segment_ids=on(seen), positions=on(positions))
  return spread(batch, a["reward"]), on


def spread(batch, rewards):
  """Returns rows with an advantage at all slots."""
  whole = np.repeat(rewards[:, None], batch.tokens.shape[1], axis=1)
  return batch.replace(advantage=whole.astype(np.float32))


def _sdar_method(config, **fields):
  return _trace_method(
    config, average="length", clamp=10.0, ends_of="view", **fields
  )


def _sdar_views(case, batch, on, kind, method):
  """Returns views in the recorded order of rows, and which rows those are."""
  a, config = case.arrays, case.config
  start = config["start_pos"]
  wide = lambda x: on(np.pad(x, [(0, 0), (start, 0)]))
  if kind == "trace":
    revealed = wide(a["step_map"])
    number, ended = method.rounds(batch, revealed, case.objective)
    region = batch.region
    np.testing.assert_array_equal(
      ended[region], wide(a["step_map_shrunk"])[region]
    )
    batch = batch.replace(round=number)
    views = tracerl.trajectory_views(
      case.objective, batch, int(number.max()) + 1, method.ends, "view"
    )
    order = np.arange(np.prod(views.z.shape[:2]))
  else:
    u, p = a[f"{kind}_u_mask"], a[f"{kind}_p"]
    views = tracerl.random_views(
      case.objective,
      batch,
      wide(u <= p)[:, None],
      method.ends,
      "view",
      coupled=kind == "coupled",
    )
    n = views.z.shape[1]
    order = np.arange(len(u) * n).reshape(-1, n).T.ravel()
  return batch, views, order


@pytest.mark.parametrize(
  "kind", ["trace", quick.long("random"), quick.long("coupled")]
)
def test_tracerl(kind):
  case = _sdar()
  a, config = case.arrays, case.config
  method = _sdar_method(config)
  batch, on = _sdar_rows(case)
  batch, views, order = _sdar_views(case, batch, on, kind, method)
  flat = lambda x: np.asarray(x).reshape(-1, x.shape[-1])[order]
  asked, z = flat(views.weight != 0), flat(views.z)
  used = asked.any(axis=1)
  np.testing.assert_array_equal(asked[used], on(a[f"{kind}_p_mask"]))
  noisy = a[f"{kind}_extended_input_ids"][:, a["input_ids"].shape[1] :]
  region = flat(np.broadcast_to(batch.region[:, None], views.z.shape))
  np.testing.assert_array_equal(z[used][region[used]], noisy.ravel())
  old = np.zeros(z.shape, np.float32)
  old[order[used]] = on(a[f"{kind}_logp_old"])
  old = np.moveaxis(old.reshape(views.z.shape), 1, 2)
  batch = batch.replace(old=old, loss_mask=batch.region)
  _check_trace(case, method, views, batch, kind)


def _by_answer(case, batch, on, name):
  """Returns recorded numbers of views' targets as those of answers' tokens."""
  a = case.arrays
  found = np.zeros(batch.tokens.shape, np.float32)
  values, asked = on(a[name]), on(a["trace_p_mask"])
  for row, sequence in enumerate(a["value_sequence"]):
    found[sequence][asked[row]] = values[row][asked[row]]
  return found


@pytest.mark.all
def test_value_model_of_tracerl():
  case = _sdar()
  a, config = case.arrays, case.config
  method = _sdar_method(config)
  batch, on = _sdar_rows(case)
  batch, views, order = _sdar_views(case, batch, on, "trace", method)
  of = lambda name: _by_answer(case, batch, on, name)
  ended = on(np.pad(a["step_map_shrunk"], [(0, 0), (config["start_pos"], 0)]))
  # Ends that count: the first few of an answer, whatever a view asks for.
  tokens = np.asarray(
    tracerl.kept_ends(
      batch.ending[:, None], batch.region[:, None], config["post_num"]
    )
  )[:, 0]
  process = on(np.pad(a["process_reward"], [(0, 0), (config["start_pos"], 0)]))
  asked = np.asarray(views.weight != 0).any(axis=1)
  for name, rewards in (("value", a["reward"]), ("value_process", process)):
    returns, gains = credit(
      ended,
      tokens,
      of("value_old"),
      rewards,
      discount=config["gam"],
      trace=config["lam"],
    )
    same(returns * asked, of(f"{name}_return"))
    same(gains * asked, of(f"{name}_advantage"))
  head = case.weight("value_head.weight")[0]
  batch = batch.replace(
    values=of("value_old"),
    returns=of("value_return"),
    advantage=of("value_advantage"),
    loss_mask=batch.region,
  )
  count = np.asarray(views.weight != 0).any(axis=2).sum()
  loss, new, gradient = case.value_gradient(head, views, batch, config["eps"])
  same(new, of("value_new"))
  same(loss / count, a["value_loss"])
  same(gradient[1] / count, a["value_grad_head"][0])
  same(gradient[0]["final_norm"]["scale"] / count, a["value_grad_norm"])
  replaced = batch.replace(returns=of("value_process_return"))
  other = value_loss(new, views, replaced, config["eps"])
  same(other / count, a["value_process_loss"])
  old = np.zeros((len(order), batch.tokens.shape[1]), np.float32)
  used = np.asarray(views.weight != 0).any(axis=2).ravel()
  old[used] = on(a["trace_logp_old"])
  old = np.moveaxis(old.reshape(views.z.shape), 1, 2)
  _, lost = case.check_gradient(
    "policy_with_value", [method], views, batch.replace(old=old)
  )
  near(lost[0][0], a["policy_with_value_loss"])


def test_trajectory_of_a_history():
  a = recorded("tracerl_llada").arrays
  mask = recorded("tracerl_llada").config["mask_token_id"]
  revealed = np.argmax(a["history"] != mask, axis=0)
  np.testing.assert_array_equal(revealed, a["history_step_map"])


def _espo_case():
  case = recorded("espo")
  if case.config["logit_shift"]:
    case = recorded("espo", shift=1)
  return case


def _espo_views(case, batch, part, i, both=True):
  """Returns the recorded masks of a micro-batch."""
  a = case.arrays
  masked = np.moveaxis(a["masked"][part, i], 0, 1)  # [rows, mc, L]
  slots = a["completion_ids"].shape[1]
  number = masked.sum(axis=2)
  np.testing.assert_allclose(
    a["p_mask"][part, i].T * (slots + 1), number, atol=1e-4
  )
  first = a["k"][part, i]
  rows = len(masked)
  place = np.arange(rows) / rows
  np.testing.assert_array_equal(
    espo.counts(first, place, np.full((rows, 1), slots)), number
  )
  return espo.pair_views(case.objective, batch, masked, number, both)


def test_espo():
  case = _espo_case()
  a, config = case.arrays, case.config
  kind = {"baseline": "leave_one_out"}
  same(advantages(_rewards(case), **kind).ravel(), a["advantages"])
  method = ESPO(
    beta=config["beta"],
    clip_low=config["epsilon_low"],
    clip_high=config["epsilon_high"],
    samples=config["num_mc"],
    complement=config["reduce_var"],
  )
  whole = case.rows(seen=True)
  parts, passes = (
    config["gradient_accumulation_steps"],
    config["num_iterations"],
  )
  for part in range(parts):
    for i in range(passes):
      cut = lambda x, part=part: halves(x, part, parts)
      batch = cut(
        whole.replace(old=a["old_elbo"][:, i], reference=a["ref_elbo"][:, i])
      )
      views = _espo_views(case, batch, part, i, config["reduce_var"])
      if part == i == 0:
        case.check_gradient("loss_00", [method], views, batch)
      scores, ((loss, metrics),) = case.said([method], views, batch)
      same(scores, cut(a["elbo"])[:, i])
      near(loss, a["loss"][i, part])
      same(metrics["kl"], a["kl"][i, part])
      if part == i == 0:
        single = _espo_views(case, batch, part, i, both=False)
        one = case.scores(method, single, batch)
        same(one, a["elbo_single"][part, i].mean(axis=0))


@pytest.mark.all
def test_espo_on_policy():
  case = _espo_case()
  a, config = case.arrays, case.config
  parts = config["gradient_accumulation_steps"]
  batch = halves(case.rows(seen=True), 0, parts)
  method = ESPO(samples=config["num_mc"], beta=0.0)
  views = _espo_views(case, batch, 0, 0, config["reduce_var"])
  _, lost = case.check_gradient("on_policy", [method], views, batch)
  near(lost[0][0], a["on_policy_loss"])


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_divergences_of_espo(kind):
  a = recorded("espo").arrays
  method = ESPO(kl=kind)
  x, y = a["kl_x"], a["kl_y"]
  same(method.divergence(x, y), a[f"kl_{kind}"])
  gradient = jax.grad(lambda x: jnp.sum(method.divergence(x, y)))(x)
  same(gradient, a[f"kl_{kind}_grad"])


@pytest.mark.all
def test_spg():
  case = recorded("spg")
  a, config = case.arrays, case.config
  rewards = a["rewards"].reshape(-1, config["num_generations"])
  same(advantages(rewards).ravel(), a["advantages"])
  batch = case.rows()
  for run in config["runs"]:
    masking, bound = run["forward_type"], run["logp_estimation"]
    method = SPG(
      bound=bound,
      power=config["eubo_beta"],
      mix=config["mix_weight"],
      samples=run["num_t"],
    )
    z = a[f"{masking}_noised"]
    hidden = z == config["mask_token_id"]
    asked = hidden & batch.loss_mask[:, None]
    views = masks(case.objective, batch, hidden, asked)
    np.testing.assert_array_equal(views.z, z)
    scores = case.scores(SPG(), views, batch)
    name = f"{masking}_{bound}"
    same(method.bounds(scores, views, batch), a[f"{name}_per_seq_logps"])
    near(value(method.loss(scores, views, batch)), a[f"{name}_loss"])
    if f"{name}_grad_ln_f" in a:
      case.check_gradient(name, [method], views, batch)


@pytest.mark.all
def test_wd1():
  case = recorded("wd1")
  a, config = case.arrays, case.config
  rewards = a["rewards"].reshape(-1, config["num_generations"])
  same(advantages(rewards).ravel(), a["advantages"])
  batch = case.rows(seen=True)
  given = a["prompt_ids"].shape[1]
  for i, uniform in enumerate(a["uniform"]):
    views = _one_view(case, uniform, batch)
    each = case.scores(DiffuGRPO(), views, batch)
    same(each[:, given:], a["per_token_logps"][i])
    views = views.replace(
      weight=jnp.where(batch.loss_mask[:, None], views.weight, 0.0)
    )
    for name, only in (("loss", False), ("loss_positive_only", True)):
      method = WD1(positive_only=only)
      weight = method.coefficients(a["advantages"])[:, None]
      asked = batch.replace(
        advantage=np.broadcast_to(weight, batch.tokens.shape).copy()
      )
      sums = jnp.sum(each * batch.loss_mask, axis=1)
      near(value(method.loss(sums, views, asked)), a[name][i])
      if i == 0:
        case.check_gradient(f"{name}_0", [method], views, asked)
