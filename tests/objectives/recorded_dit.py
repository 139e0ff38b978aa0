"""Networks of recorded cases: the originals' weights in our DiT."""

import functools

import jax
import jax.numpy as jnp

from dllm_jax.core.types import ModelInputs, ModelOutputs
from dllm_jax.models import dit
from dllm_jax.pretrained import DIT, to_ours
from tests import golden_cases
from tests.pretrained.golden import dit_config


@functools.cache
def network(name: str):
  """Returns `inputs -> outputs` of a case's weights, compiled once a shape."""
  config = dit_config(golden_cases.load(name))
  params = to_ours(DIT, golden_cases.weights(name), config).params
  params = jax.tree.map(jnp.asarray, params)
  apply = jax.jit(dit(config).apply)

  def run(inputs: ModelInputs) -> ModelOutputs:
    return apply(params, inputs, None)[0]

  return run


def logits(run, inputs: ModelInputs):
  """Returns the logits of the real tokens."""
  out = run(inputs)
  out = jax.device_get(out)
  values = out.hidden @ out.unembed + out.bias
  return values[..., : out.vocab_size]
