"""Diffusion from autoregressive weights: a mask token and an objective.

DiffuLLaMA (arXiv:2410.17891) and Dream (arXiv:2508.15487) begin with a trained
autoregressive network, keep its shift by one, and let attention go both ways.
The mask is a row of the embedding that no token uses, or a new one: the mean of
all rows, so that it is no stranger to the network.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from dllm_jax.data.tokenizer import HuggingFace
from dllm_jax.pretrained import families
from dllm_jax.pretrained.families import Fields
from dllm_jax.pretrained.family import DIFFUSION
from dllm_jax.pretrained.load import Pretrained

TARGETS = ("dream", "llada", "bd3lm")
TOLD = ("sdar", "idlm")
"""Families of one name, which whoever reads a folder may have to tell apart."""


def check_target(target: str) -> None:
  """Raises ValueError unless weights can be adopted for an objective."""
  if target not in TARGETS + TOLD:
    raise ValueError(
      f"unknown objective {target!r} to adopt; legal: {', '.join(TARGETS)}, or"
      f" {' or '.join(TOLD)} for what a folder named sdar is"
    )


def adopt(model: Pretrained, target: str) -> Pretrained:
  """Returns an autoregressive model, set up to be trained by diffusion.

  Args:
    model: of a family whose weights may be adopted: an autoregressive one.
    target: "dream" (shifted), "llada" or "bd3lm".

  Raises:
    ValueError: the target is unknown, or the model is not autoregressive.
  """
  check_target(target)
  if not model.family.adopts:
    raise ValueError(
      f"{model.folder} holds a {model.family.name} model, which diffuses"
      " already; leave --as out"
    )
  mask, config, params = _with_mask(model)
  published = {
    **model.published,
    "vocab_size": config.vocab_size,
    "mask_token_id": mask,
    DIFFUSION: target,
  }
  if target == "dream" and model.published.get("model_type") == "qwen2":
    # The original's own layout: its code then loads what is written.
    published |= {"model_type": "Dream", "architectures": ["DreamModel"]}
    del published[DIFFUSION]
  fields = Fields(published, "config.json")
  family = families.find(fields)
  ids = model.ids._replace(mask=mask)
  tokenizer = dataclasses.replace(
    model.tokenizer,
    mask_id=mask,
    **{
      "size"
      if isinstance(model.tokenizer, HuggingFace)
      else "vocab_size": config.vocab_size
    },
  )
  return dataclasses.replace(
    model,
    denoiser=family.table.network(config),
    params=params,
    objective=families.objective(family, fields, config.vocab_size, ids),
    tokenizer=tokenizer,
    sampler=family.sampler,
    config=config,
    family=family,
    published=published,
    ids=ids,
  )


def _with_mask(model: Pretrained) -> tuple[int, Any, PyTree]:
  """Returns the mask's id, and a config and parameters that have it."""
  config, tokenizer = model.config, model.tokenizer
  if isinstance(tokenizer, HuggingFace):
    named = tokenizer.mask_id <= tokenizer.last_id
    spare = tokenizer.last_id + 1
    if not named and spare < config.vocab_size:
      return spare, config, model.params
  mask = config.vocab_size
  larger = dataclasses.replace(config, vocab_size=mask + 1)
  more = larger.padded_vocab - config.padded_vocab

  def grow(matrix, axis):
    rows = jnp.moveaxis(matrix, axis, 0)
    mean = jnp.mean(rows[:mask].astype(jnp.float32), axis=0)
    pads = [(0, more)] + [(0, 0)] * (rows.ndim - 1)
    rows = jnp.pad(rows, pads).at[mask].set(mean.astype(rows.dtype))
    return jax.device_put(jnp.moveaxis(rows, 0, axis), matrix.sharding)

  params = dict(model.params)
  params["embed"] = {"embedding": grow(params["embed"]["embedding"], 0)}
  if not config.tied:
    params["unembed"] = {"kernel": grow(params["unembed"]["kernel"], 1)}
  return mask, larger, params
