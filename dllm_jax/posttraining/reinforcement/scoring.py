"""What the old policy and the reference say of rollouts, as compiled programs.

With adapters the reference is the network without them: no second copy of its
matrices. Else it is the run that this one began with.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jaxtyping import PyTree

from dllm_jax import models
from dllm_jax.core.types import Denoiser, Objective
from dllm_jax.models import without_adapters
from dllm_jax.parallel import compilation
from dllm_jax.parallel.sharding import global_batch
from dllm_jax.posttraining.reinforcement.methods.base import (
  Method,
  Reinforced,
)
from dllm_jax.posttraining.reinforcement.rollouts import Rollouts
from dllm_jax.run.run import Run
from dllm_jax.training.step import TrainState

Score = Callable[[TrainState, Rollouts], PyTree]
Params = Callable[[TrainState], PyTree]


def _trained(state: TrainState) -> PyTree:
  return state.params


def scorer(
  method: Method,
  objective: Objective,
  denoiser: Denoiser,
  mesh: jax.sharding.Mesh,
  params_of: Params = _trained,
) -> Score:
  """Returns a function to what a network says of rows, on the host.

  Args:
    method: its views and scores.
    objective: how the network was trained.
    denoiser: the network.
    mesh: the device mesh.
    params_of: whose parameters, of the state that trains.
  """
  ask = _said(method, objective, denoiser)
  return _launched(ask, denoiser, mesh, params_of)


def valuer(objective: Reinforced, mesh: jax.sharding.Mesh) -> Score:
  """Returns a function to what the value model says of rows, on the host."""

  def ask(params, process, batch):
    process = process.replace(params=params["process"])
    views = objective.method.views(objective.objective, process, batch)
    return objective.values(process, views, batch)

  return _launched(ask, objective.denoiser, mesh)


def shape(method: Method, run: Run, batch: Rollouts) -> PyTree:
  """Returns the shape of what a network says of rows."""
  ask = _said(method, run.objective, run.denoiser)
  abstract = run.served.abstract
  with jax.set_mesh(run.mesh):
    return jax.eval_shape(ask, abstract.params, abstract.process, batch)


def _said(method: Method, objective: Objective, denoiser: Denoiser):
  """Returns parameters, process, rows -> what the network says of the rows."""

  def ask(params, process, batch):
    process = process.replace(params=params["process"])
    denoise = lambda inputs: denoiser.apply(params["model"], inputs, None)[0]
    views = method.views(objective, process, batch)
    return method.scores(objective, process, denoise, views, batch)

  return ask


def _launched(
  ask: Callable,
  denoiser: Denoiser,
  mesh: jax.sharding.Mesh,
  params_of: Params = _trained,
) -> Score:
  """Returns a program that is asked of rows, and answers on the host."""
  program = compilation.jit(ask, mesh=mesh, dtype=denoiser.dtype)

  def score(state: TrainState, batch: Rollouts) -> PyTree:
    with jax.set_mesh(mesh):
      said = program(params_of(state), state.process, global_batch(batch, mesh))
    return jax.device_get(said)

  return score


def reference(method: Method, run: Run, source: Run) -> Score:
  """Returns the reference of a run that began with another.

  Args:
    method: its views and scores.
    run: the run that trains.
    source: the run that it began with.
  """
  network = run.network
  adapter = getattr(network, "adapter", None)
  if adapter is None or not adapter.rank:
    params = source.state.eval_params
    return scorer(
      method,
      run.objective,
      source.denoiser,
      run.mesh,
      params_of=lambda state: params,
    )
  bare = dataclasses.replace(
    network, adapter=dataclasses.replace(adapter, rank=0, base="default")
  )
  build: Any = getattr(models, run.config.model["name"])

  def base(state: TrainState) -> PyTree:
    params = state.params
    return {**params, "model": without_adapters(params["model"])}

  return scorer(method, run.objective, build(bare), run.mesh, params_of=base)
