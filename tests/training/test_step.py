"""The train step: what must not depend on how the batch is split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax import data
from dllm_jax.parallel import global_batch
from tests import jaxprs, runs


def _losses(workdir, steps=4, **fields):
  """Returns the losses of some steps and the last state."""
  run = runs.run(workdir, **fields)
  batches = data.train_iterator(run.corpus, batch_size=8, seed=0)
  losses = []
  with jax.set_mesh(run.mesh), jax.transfer_guard("disallow"):
    with jax.transfer_guard("allow"):  # constants of initialisation
      state = run.program.init()
      batch = global_batch(next(batches), run.mesh)
      state, metrics = run.program.step(state, batch)
    losses.append(metrics)
    # Equal steps of other tests share one cache: what counts is what is added.
    programs = run.program.step._cache_size()
    for _ in range(steps - 1):
      state, metrics = run.program.step(
        state, global_batch(next(batches), run.mesh)
      )
      losses.append(metrics)
    losses = jax.device_get(losses)
  assert run.program.step._cache_size() == programs
  return [m["loss_nats_per_token"] for m in losses], state


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  losses, state = _losses(tmp_path_factory.mktemp("plain") / "run")
  return losses, runs.parameters(state)


@pytest.mark.parametrize(
  "mesh",
  [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}],
  ids=["data", "data_fsdp_tensor"],
)
@pytest.mark.all
def test_losses_do_not_depend_on_the_mesh(plain, tmp_path, mesh):
  fields = {f"mesh__{k}": v for k, v in mesh.items()}
  losses, state = _losses(tmp_path / "run", **fields)
  assert len(jax.tree.leaves(state.params)[0].sharding.device_set) == 8
  np.testing.assert_allclose(losses, plain[0], rtol=1e-5)


@pytest.mark.parametrize("parts", [2, pytest.param(4, marks=pytest.mark.all)])
@pytest.mark.all
def test_losses_do_not_depend_on_microbatches(plain, tmp_path, parts):
  losses, state = _losses(tmp_path / "run", training__microbatches=parts)
  np.testing.assert_allclose(losses, plain[0], rtol=1e-5)
  # Adam divides by the root of a tiny second moment at first, so parameters
  # may differ by a little more than rounding of the gradient.
  for a, b in zip(runs.parameters(state), plain[1], strict=True):
    np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.all
def test_a_network_with_dropout_is_trained_with_it(plain, tmp_path):
  losses, _ = _losses(tmp_path / "run", steps=2, model__dropout=0.5)
  assert abs(losses[0] - plain[0][0]) > 1e-3


def test_average_follows_parameters(tmp_path):
  _, state = _losses(tmp_path / "run", steps=1)
  run = runs.run(tmp_path / "other")
  with jax.set_mesh(run.mesh):
    first = run.program.init()
  # Step 1 forgets all but (1 + 0) / (10 + 0) of the start.
  for p0, p1, ema in zip(
    jax.tree.leaves(first.params),
    jax.tree.leaves(state.params),
    jax.tree.leaves(state.ema_params),
    strict=True,
  ):
    np.testing.assert_allclose(ema, 0.1 * p0 + 0.9 * p1, rtol=1e-5, atol=1e-7)


def test_no_vocabulary_by_positions(tmp_path):
  """At T = 1024, V = 50k no value of the step has T x V elements a row."""
  run = runs.run(
    tmp_path / "run",
    data__length=1024,
    training__batch_size=1,
    evaluation__batch_size=1,
  )
  trainer = _with_vocabulary(run, 50_000)
  batch = data.blank(1, 1024)
  batch = jax.tree.map(jnp.asarray, batch)
  state = jax.eval_shape(trainer.init, batch)
  jaxpr = jax.make_jaxpr(trainer.step)(state, batch)
  assert not jaxprs.larger_than(jaxpr, 1024 * 50_000)


@pytest.mark.all
def test_bfloat16_computes_and_float32_remembers(tmp_path):
  """Masters, averages and moments are float32; products are bfloat16's."""
  run = runs.run(
    tmp_path / "run", model__dtype="bfloat16", training__ema_decay=0.9
  )
  state = run.program.abstract
  batch = jax.tree.map(jnp.asarray, data.blank(8, run.config.data.length))
  after, _ = jax.eval_shape(run.trainer.step, state, batch)
  for tree in (state, after):
    leaves = jax.tree.leaves((tree.params, tree.ema_params, tree.opt_state))
    kinds = {leaf.dtype.name for leaf in leaves}
    assert kinds <= {"float32", "int32"}, kinds
  jaxpr = jax.make_jaxpr(run.trainer.step)(state, batch)
  products = [
    tuple(v.aval.dtype.name for v in equation.invars)
    for equation in jaxprs.equations(jaxpr)
    if equation.primitive.name == "dot_general"
  ]
  assert len(products) > 20
  assert set(products) == {("bfloat16", "bfloat16")}


def _with_vocabulary(run, vocab):
  import dataclasses

  from dllm_jax import models
  from dllm_jax.objectives.mdlm import MDLM

  return dataclasses.replace(
    run.trainer,
    objective=MDLM(vocab_size=vocab, mask_id=vocab - 1),
    denoiser=models.transformer(
      models.TransformerConfig(vocab_size=vocab, width=16, layers=2, heads=2)
    ),
  )
