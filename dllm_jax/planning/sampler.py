"""The sampler's program, lowered for a machine that is not here."""

import jax
import numpy as np

from dllm_jax.planning.facts import state_bytes
from dllm_jax.run.run import Run
from dllm_jax.sampling.launch import Launcher
from dllm_jax.sampling.requests import Requests


def lowered(run: Run, rows: int):
  """Returns the lowered sampler, rounds of its loops, bytes by kind.

  Canvases are as long as training rows and have no prompt.

  Args:
    run: whose network and sampler.
    rows: rows sampled together, over all devices.
  """
  length = run.config.data.length
  built = run.config.sampler.build(
    run.objective,
    length=length,
    end_ids=run.tokenizer.end_ids,
  )
  state, shape = run.program.served, (rows, length)
  ones = lambda kind, dims=shape: jax.ShapeDtypeStruct(dims, kind)
  requests = Requests(
    tokens=ones(np.int32),
    fixed=ones(bool),
    valid=ones(bool),
    request=ones(np.int32, (rows,)),
  )
  params = state.eval_params
  process = state.process.replace(params=params["process"])
  key = jax.eval_shape(lambda: jax.random.key(0))
  with jax.set_mesh(run.mesh):
    program = Launcher(built, run.denoiser).lower(
      params["model"], process, key, requests
    )
  calls = built.steps + built.policy.extra
  rounds = (calls,) if built.blocks == 1 else (built.blocks, calls)
  kinds = state_bytes(state, run.mesh.shape)
  kinds = {"parameters": kinds.get("average", kinds["parameters"])}
  return program, rounds, kinds
