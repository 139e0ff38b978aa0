"""Sampling: one program for every objective, policies, and its pictures."""

from dllm_jax.sampling.infill import parse
from dllm_jax.sampling.launch import Launcher
from dllm_jax.sampling.policies.ancestral import Ancestral
from dllm_jax.sampling.policies.processors import Temperature, TopK, TopP
from dllm_jax.sampling.policies.unmasking import FirstHitting, Unmasking
from dllm_jax.sampling.program import generate, Generation, Sampler
from dllm_jax.sampling.requests import build, continuation, Requests
from dllm_jax.sampling.traces.strip import write_strip
from dllm_jax.sampling.traces.trace import films, Trace, write_page

__all__ = [
  "Ancestral",
  "FirstHitting",
  "Generation",
  "Launcher",
  "Requests",
  "Sampler",
  "Temperature",
  "TopK",
  "TopP",
  "Trace",
  "Unmasking",
  "build",
  "continuation",
  "films",
  "generate",
  "parse",
  "write_page",
  "write_strip",
]
