"""Published models of the recorded cases, and their generations."""

import dataclasses
import functools
import json
import pathlib
import tempfile

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from dllm_jax.core.types import Process
from dllm_jax.pretrained import load_pretrained
from dllm_jax.sampling.program import generate, Generation, Sampler
from dllm_jax.sampling.requests import build
from tests import golden_cases


@functools.cache
def model(name: str, leave_out: tuple[str, ...] = ()):
  """Returns the published model of a case, laid out as a published folder.

  Args:
    name: the case.
    leave_out: weights that are no part of the network.
  """
  config = golden_cases.load(name).config
  fields = config.get("hf_config")
  if fields is None:
    fields = config["sampler_model"] | {"model_type": "llada"}
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    (folder / "config.json").write_text(json.dumps(fields))
    weights = golden_cases.weights(name)
    kept = {k: v for k, v in weights.items() if k not in leave_out}
    save_file(kept, folder / "model.safetensors")
    return load_pretrained(folder, mask_id=config.get("mask_id"))


def prompts(tokens: np.ndarray, mask: np.ndarray | None = None):
  """Returns rows of tokens without their padding on the left."""
  if mask is None:
    mask = np.ones_like(tokens)
  return [
    row[keep > 0].tolist() for row, keep in zip(tokens, mask, strict=True)
  ]


@struct.dataclass
class Best:
  """Noise of greedy generations, which compiles faster than real noise."""

  like: jax.Array

  def uniform(self, tag, n=1):
    del tag
    return jnp.full((*self.like.shape, n), 0.5)

  def categorical(self, tag, logits):
    del tag
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def best(step, slots) -> Best:
  """Returns greedy noise."""
  del step
  return Best(like=slots)


@functools.lru_cache(maxsize=64)
def program(sampler, denoiser, **options):
  """Returns `generate`, compiled: equal samplers share it, whatever the test."""
  return jax.jit(functools.partial(generate, sampler, denoiser, **options))


def quick(sampler, denoiser, *args, **options) -> Generation:
  """Returns `generate(...)` as arrays of numpy; a trace agrees with it."""
  made = jax.device_get(program(sampler, denoiser, **options)(*args))
  if made.trace is not None:
    np.testing.assert_array_equal(made.revealed_at, revealed_at(made.trace))
  return made


def revealed_at(trace) -> np.ndarray:
  """Returns each row's own step at which a slot took its token for good."""
  step = np.cumsum(trace.frames.ran, axis=0) - 1
  taken = np.where(trace.frames.committed, step[..., None], -1)
  return taken.max(axis=0)


def run(
  name: str,
  rows,
  *,
  objective=None,
  noise=None,
  length: int | None = None,
  request=None,
  **fields,
) -> Generation:
  """Samples rows (None where a token is wanted) with a trace.

  `fields` are the sampler's; `policy` is called with the objective.
  """
  published = model(name)
  objective = objective or published.objective
  policy = fields.pop("policy")(objective)
  length = length or max(map(len, rows))
  sampler = Sampler(policy=policy, length=length, **fields)
  requests = build(rows, objective=objective, length=length, request=request)
  args = published.params, Process(), jax.random.key(0), requests
  return quick(
    sampler, published.denoiser, *args, trace=True, noise=noise or best
  )


def history(generation: Generation, row: int) -> np.ndarray:
  """Returns a row's canvas at its start and after each step it took part in."""
  trace = generation.trace
  ran = np.asarray(trace.frames.ran[:, row])
  frames = np.asarray(trace.frames.tokens[:, row])[ran]
  return np.concatenate([np.asarray(trace.initial[row])[None], frames])


def replace(objective, **fields):
  """Returns an objective with other fields."""
  return dataclasses.replace(objective, **fields)
