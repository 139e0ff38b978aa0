"""What a program would cost on a machine that is not here."""

from dllm_jax.planning.plan import Plan, plan
from dllm_jax.planning.search import search

__all__ = ["plan", "Plan", "search"]
