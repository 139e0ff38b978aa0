"""Diffusion language models in JAX: train, evaluate and sample on meshes."""

import importlib

_HOMES = {
  "load_pretrained": "dllm_jax.pretrained",
  "Pretrained": "dllm_jax.pretrained",
  "save_pretrained": "dllm_jax.pretrained",
}

__all__ = ["load_pretrained", "Pretrained", "save_pretrained"]


def __getattr__(name: str):
  if name not in _HOMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(_HOMES[name]), name)
