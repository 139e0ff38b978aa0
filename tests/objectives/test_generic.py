"""What every registered objective must pass, with no test that names one."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax import data
from dllm_jax.config import config
from dllm_jax.core.axes import AXES, BATCH_AXES
from dllm_jax.core.types import Denoiser, ModelOutputs
from dllm_jax.objectives import registry
from dllm_jax.objectives.base import TokenSpace
from dllm_jax.parallel import global_batch, make_mesh, RULES, shardings
from dllm_jax.sampling.presets import SamplerConfig
from dllm_jax.training.step import Trainer
from tests import quick, runs
from tests.objectives import toy, variants

NAMES = sorted(registry.objectives())
SPACE = TokenSpace(vocab_size=7, mask_id=6, length=32)
STEPS = 2

each = pytest.mark.parametrize("name", NAMES)


def _shows(name):
  """Returns what of an objective a trained run shows, its process above all."""
  objective = registry.objective_class(name).over(SPACE)
  process = jax.eval_shape(objective.init, jax.random.key(0))
  traits = {
    "params": process.params,
    "constants": process.constants,
    "state": process.state,
    "shift": objective.shift,
    "blocks": objective.block_length,
  }
  return {trait for trait, value in traits.items() if value}


some = pytest.mark.parametrize("name", quick.few(NAMES, _shows))
# BD3-LM's process has a state that steps read, and others change.
stateful = pytest.mark.parametrize("name", [quick.long(name) for name in NAMES])
OBJECTIVES = variants.objectives(SPACE)
each_variant = pytest.mark.parametrize(
  "objective",
  [
    (pytest.param if name in NAMES else quick.long)(objective, id=name)
    for name, objective in OBJECTIVES.items()
  ],
)


def _tiny(name, **fields):
  """Returns the fields of a run that compiles quickly."""
  return {
    "objective__name": name,
    "data__length": 16,
    "data__held_out": 0.0,
    "model__layers": 1,
    "optimizer__warmup_steps": 1,  # of fewer steps, the beginning of more
    "training__steps": STEPS,
    "checkpoint__every_steps": STEPS // 2,
  } | fields


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """Returns a function that trains an objective once."""

  @functools.cache
  def train(name):
    run = runs.run(tmp_path_factory.mktemp(name) / "run", **_tiny(name))
    run.train()
    return run

  return train


@each_variant
@pytest.mark.few(7)
def test_corruption_frequencies(objective):
  """Tokens differ from x0 as often as the objective says, early and late.

  Within 4 standard errors of a sum of independent coins, whose times are the
  ones drawn.
  """
  process = objective.init(jax.random.key(0))
  rows = jax.random.randint(jax.random.key(1), (512, SPACE.length), 0, 6)
  batch = toy.batch(rows)

  @jax.jit
  def draw():
    step = jnp.zeros((), jnp.int32)
    drawn = objective.draw(process, jax.random.key(2), batch, step=step)
    return drawn, objective.corruption(process, batch.tokens, drawn.t)

  drawn, chance = draw()
  if chance is None:
    pytest.skip("tokens are not corrupted one by one")
  t = jnp.broadcast_to(drawn.t, rows.shape)
  for some in (t < 0.5, t >= 0.5):
    p = np.asarray(chance, np.float64)[some]
    found = np.asarray(drawn.z != batch.tokens)[some]
    assert p.size > 1000
    error = np.sqrt(np.sum(p * (1 - p)))
    assert abs(found.sum() - p.sum()) < 4 * error


@each_variant
@pytest.mark.few(2)
def test_prompts_count_nothing(objective):
  process = objective.init(jax.random.key(0))
  rows = jax.random.randint(jax.random.key(1), (8, SPACE.length), 0, 6)
  prompt = jnp.arange(SPACE.length) < SPACE.length // 2
  batch = toy.batch(rows, loss_mask=jnp.broadcast_to(~prompt, rows.shape))
  width = objective.network_fields().get("output_dim", objective.vocab_size)

  def denoise(inputs):
    shape = (*inputs.latent.shape[:2], width)
    return ModelOutputs(hidden=jax.random.normal(jax.random.key(3), shape))

  @jax.jit
  def score():
    step = jnp.zeros((), jnp.int32)
    drawn = objective.draw(process, jax.random.key(2), batch, step=step)
    return objective.loss(process, denoise, drawn, batch, step=step)

  loss = score()
  assert np.isfinite(loss.total) and loss.weight > 0
  assert not np.any(np.asarray(loss.bound)[:, : SPACE.length // 2])
  assert np.any(np.asarray(loss.bound)[:, SPACE.length // 2 :])


@pytest.mark.all
@pytest.mark.parametrize("network", ["transformer", quick.long("dit")])
@some
def test_lowers_without_devices(name, network):
  """The train step of 8 devices that are not here lowers for a TPU."""
  own = registry.objective_class(name).two_passes  # a network of its own
  fields = _tiny(name) if own else _tiny(name, model__name=network)
  settings = config.parse(runs.tiny(**fields))
  objective, denoiser = settings.build(_tokenizer())
  trainer = Trainer(
    objective=objective,
    denoiser=denoiser,
    optimizer=settings.optimizer.build(STEPS),
    training=settings.training,
  )
  types = (jax.sharding.AxisType.Auto,) * len(AXES)
  mesh = jax.sharding.AbstractMesh((2, 2, 2, 1, 1), AXES, axis_types=types)
  batch = toy.batch(np.zeros((8, settings.data.length)))
  placed = jax.sharding.NamedSharding(mesh, jax.P(BATCH_AXES))
  as_shape = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  with jax.sharding.use_abstract_mesh(mesh):
    state = jax.eval_shape(trainer.init, batch)
    state = jax.tree.map(as_shape, state, shardings(state, mesh, RULES))
    batch = jax.tree.map(lambda x: as_shape(x, placed), batch)
    traced = jax.jit(trainer.step).trace(state, batch)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
  assert "sharding" in text


@functools.cache
def _tokenizer():
  return data.load(config.parse(runs.tiny()).data).tokenizer


def _small(width: int) -> Denoiser:
  """Returns a network that compiles at once and reads tokens or vectors."""

  def apply(params, inputs, cache):
    x = inputs.latent
    x = params["in"][x] if x.ndim == 2 else x @ params["in"][: x.shape[-1]]
    hidden = jnp.tanh(x + jnp.mean(x, axis=1, keepdims=True))
    return ModelOutputs(hidden=hidden @ params["out"]), cache

  def init(key, inputs):
    del inputs
    shapes = {"in": (64, 8), "out": (8, width)}
    return {k: jax.random.normal(key, v) for k, v in shapes.items()}

  return Denoiser(init=init, apply=apply)


@some
@pytest.mark.few(1)
def test_losses_do_not_depend_on_the_mesh(name):
  objective = registry.objective_class(name).over(SPACE)
  width = objective.network_fields().get("output_dim", objective.vocab_size)
  settings = config.parse(runs.tiny())
  trainer = Trainer(
    objective=objective,
    denoiser=_small(width),
    optimizer=settings.optimizer.build(STEPS),
    training=settings.training,
  )
  rows = jax.random.randint(jax.random.key(1), (8, SPACE.length), 0, 6)
  batch, found = jax.tree.map(np.asarray, toy.batch(rows)), []
  for count in (1, 8):
    mesh = make_mesh({"data": count}, jax.devices()[:count])
    with jax.set_mesh(mesh):
      state = jax.jit(lambda: trainer.init(batch))()
      metrics = jax.jit(trainer.step)(state, global_batch(batch, mesh))[1]
    found.append(jax.device_get(metrics))
  for key, value in found[0].items():
    # Sums over devices are in another order.
    np.testing.assert_allclose(found[1][key], value, rtol=1e-5, err_msg=key)


@stateful
def test_resumes_bit_for_bit(trained, tmp_path, name):
  """2 k steps are k steps, a new process's worth of objects, and k more."""
  shutil.copytree(trained(name).workdir, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
  run = runs.run(tmp_path / "run", **_tiny(name))
  run.train()
  assert len(_steps_logged(run)) == STEPS
  expected = runs.parameters(trained(name).state)
  for a, b in zip(runs.parameters(run.state), expected, strict=True):
    np.testing.assert_array_equal(a, b)
  saved = jax.tree.leaves(jax.device_get(run.state.process))
  kept = jax.tree.leaves(jax.device_get(trained(name).state.process))
  for a, b in zip(saved, kept, strict=True):
    np.testing.assert_array_equal(a, b)


def _steps_logged(run):
  lines = (run.workdir / "metrics.jsonl").read_text().splitlines()
  return {json.loads(line)["step"] for line in lines}


@pytest.mark.all
@some
def test_one_program_each(trained, name):
  """The train step and the sampler compile once, whatever their data."""
  run = trained(name)
  assert run.program.step._cache_size() == 1
  sampler = SamplerConfig(steps=min(2, run.objective.block_length or 2))
  prompts = ("First", "My lord")
  first = run.sample(prompts, sampler=sampler, seed=0)
  again = run.sample(prompts, sampler=sampler, seed=0)
  other = run.sample(("To be", "Or not"), sampler=sampler, seed=1)
  assert first.texts == again.texts != other.texts
  assert all(map(str.startswith, first.texts, prompts))
  (launcher,) = run.generator.launchers
  assert launcher.programs() == 1
  tokens = np.asarray(first.generation.tokens)
  assert tokens.max() < run.objective.vocab_size
  begun = int(run.objective.begin_id is not None)
  assert not np.any(tokens[:, begun:] == run.objective.mask_id)


@stateful
def test_moving_the_process_recompiles_nothing(trained, name):
  """Constants and state are arguments of the step, never baked into it."""
  run = trained(name)
  with jax.set_mesh(run.mesh):
    state = run.program.init()
    moved = jax.tree.map(lambda x: x * 0.999, state.process)
    rows, length = run.config.training.batch_size, run.config.data.length
    batch = global_batch(data.blank(rows, length), run.mesh)
    moved = jax.device_put(
      moved, jax.tree.map(lambda x: x.sharding, state.process)
    )
    state, _ = run.program.step(state, batch)
    programs = run.program.step._cache_size()
    run.program.step(state.replace(process=moved), batch)
  assert run.program.step._cache_size() == programs
