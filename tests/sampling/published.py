"""Published models of the recorded cases, and their generations."""

import dataclasses
import functools
import json
import pathlib
import shutil
import tempfile

import jax
import numpy as np

from dllm_jax.core.types import Process
from dllm_jax.pretrained import load_pretrained
from dllm_jax.sampling.launch import Launcher
from dllm_jax.sampling.program import Generation, Sampler
from dllm_jax.sampling.requests import build
from tests import golden_cases


@functools.cache
def model(name: str):
  """Returns the published model of a case, laid out as a published folder."""
  config = golden_cases.load(name).config
  fields = config.get("hf_config")
  if fields is None:
    fields = config["sampler_model"] | {"model_type": "llada"}
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    (folder / "config.json").write_text(json.dumps(fields))
    weights = golden_cases.ROOT / name / "weights.safetensors"
    shutil.copy(weights, folder / "model.safetensors")
    return load_pretrained(folder, mask_id=config.get("mask_id"))


def prompts(tokens: np.ndarray, mask: np.ndarray | None = None):
  """Returns rows of tokens without their padding on the left."""
  if mask is None:
    mask = np.ones_like(tokens)
  return [row[keep > 0].tolist() for row, keep in zip(tokens, mask, strict=True)]


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
  launcher = Launcher(sampler, published.denoiser, trace=True, noise=noise)
  return launcher(published.params, Process(), jax.random.key(0), requests)


def history(generation: Generation, row: int) -> np.ndarray:
  """Returns a row's canvas at its start and after each step it took part in."""
  trace = generation.trace
  ran = np.asarray(trace.frames.ran[:, row])
  frames = np.asarray(trace.frames.tokens[:, row])[ran]
  return np.concatenate([np.asarray(trace.initial[row])[None], frames])


def replace(objective, **fields):
  """Returns an objective with other fields."""
  return dataclasses.replace(objective, **fields)
