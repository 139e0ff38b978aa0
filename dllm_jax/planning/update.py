"""The update of reinforcement learning, lowered for a machine that is not here."""

from collections.abc import Mapping
from typing import Any

import jax

from dllm_jax.parallel import batch_sharding, RULES
from dllm_jax.planning.facts import state_bytes
from dllm_jax.posttraining.reinforcement import methods
from dllm_jax.posttraining.reinforcement.loop import blank, Reinforce
from dllm_jax.posttraining.reinforcement.methods.base import Reinforced
from dllm_jax.posttraining.train import trainer
from dllm_jax.run.run import Run
from dllm_jax.training.program import compile_program


def lowered(run: Run, stated: Mapping[str, Mapping[str, Any]]):
  """Returns the lowered update, and bytes by kind.

  The old policy and the reference are asked before it, by a program that keeps
  nothing for gradients.

  Args:
    run: whose network.
    stated: sections of the configuration, as `files.methods` returns them.

  Raises:
    ValueError: the configuration has none.
    KeyError: there is no such method.
  """
  if "reinforce" not in stated:
    raise ValueError(
      "--program=reinforce plans a configuration with a section reinforce, such"
      " as reinforce_llada_8b"
    )
  loop = dict(stated["reinforce"])
  name = loop.pop("method", "espo")
  method = methods.by_name(name)(**stated.get(name, {}))
  batch = blank(method, run, new_tokens=Reinforce(**loop).new_tokens, asks=True)
  objective = Reinforced(
    objective=run.objective, method=method, denoiser=run.denoiser
  )
  rows = batch_sharding(run.mesh)
  by_row = jax.sharding.NamedSharding(run.mesh, jax.P(rows.spec[0]))
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=rows if x.ndim > 1 else by_row
    ),
    batch,
  )
  with jax.set_mesh(run.mesh):
    program = compile_program(trainer(run, objective), batch, run.mesh, RULES)
    found = program.step.lower(program.abstract, shapes)
  kinds = state_bytes(program.abstract, run.mesh.shape, program.trains)
  kinds["gradients"] = kinds["parameters"]
  return found, kinds
