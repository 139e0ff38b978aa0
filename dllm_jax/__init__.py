"""Diffusion language models in JAX: train, evaluate and sample on meshes."""
