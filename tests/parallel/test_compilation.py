"""Programs are right on CPUs whatever XLA fuses, and say so where others are not."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from dllm_jax.parallel import compilation, make_mesh
from tests import runs

# The programs that jaxlib 0.10.2 and later compute wrongly, of rows of ones.
_PROGRAMS = """
import warnings
import jax, jax.numpy as jnp
from dllm_jax.parallel import compilation

matrix, bias = jnp.ones((64, 100)), jnp.full(100, 0.5)
programs = {
  "sum": (lambda x: jnp.sum(x @ jnp.ones((64, 100))), 6400 * 1024),
  "mean": (lambda x: jnp.mean(x @ matrix + bias), 64.5),
  "max": (lambda x: jnp.mean(jnp.max(x @ matrix, -1)), 64),
  "softmax": (lambda x: jnp.mean(jax.nn.logsumexp(x @ matrix, -1)), 68.6052),
}
x = jnp.ones((1024, 64))
with warnings.catch_warnings(record=True) as caught:
  warnings.simplefilter("always")
  for name, (program, right) in programs.items():
    for dtype, near in {"float32": 1e-4, "bfloat16": 1e-2}.items():
      found = compilation.jit(program, dtype=dtype)(x.astype(dtype))
      if not jnp.allclose(found.astype(jnp.float32), right, rtol=near):
        print("wrong", name, dtype)
print("live" if compilation.wrong_products() else "none")
for warning in caught:
  print("warned", warning.message)
"""


def _said(flags: str) -> list[str]:
  done = subprocess.run(
    [sys.executable, "-c", _PROGRAMS],
    env=os.environ | {"XLA_FLAGS": flags},
    cwd=runs.ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  return done.stdout.splitlines()


def test_products_with_constants_are_right_without_any_flag():
  live, *warned = _said("")  # a line more for each program that is wrong
  if live == "none":
    assert not warned
    return
  assert live == "live"
  (line,) = warned
  assert (
    "yours set XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= before" in line
  )


def test_these_tests_are_safe():
  with jax.set_mesh(make_mesh({"data": 8})):
    assert not compilation.wrong_products()
    assert compilation._cpu_options.__wrapped__() == compilation._CPU_OPTIONS


def test_options_are_those_of_the_platform(monkeypatch):
  compilation.jit(jnp.sin, dtype="bfloat16")  # tries them, and remembers
  kept = {}
  monkeypatch.setattr(jax, "jit", lambda fn, **fields: kept.update(fields))
  compilation.jit(jnp.sin, options={"a": "b"}, donate_argnums=0)
  assert kept["donate_argnums"] == 0
  assert kept["compiler_options"] == dict(compilation._CPU_OPTIONS) | {"a": "b"}
  compilation.jit(jnp.sin, dtype="bfloat16")
  assert kept["compiler_options"] == compilation._CPU_BFLOAT16_OPTIONS
  monkeypatch.setattr(compilation, "_cpu_knows_bfloat16", lambda: False)
  compilation.jit(jnp.sin, dtype="bfloat16")
  assert kept["compiler_options"] == compilation._CPU_OPTIONS
  monkeypatch.setattr(compilation, "platform", lambda: "tpu")
  compilation.jit(jnp.sin, dtype="bfloat16")
  assert kept["compiler_options"] == {}


def test_a_version_without_the_option_compiles_without_it(monkeypatch):
  unknown = {"xla_cpu_no_such_option": ""}
  monkeypatch.setattr(compilation, "_CPU_OPTIONS", unknown)
  monkeypatch.setattr(
    compilation, "_cpu_options", compilation._cpu_options.__wrapped__
  )
  assert compilation.jit(lambda: jnp.ones(3).sum())() == 3


def test_calls_have_options_on_gpus_that_know_them(monkeypatch):
  mesh = make_mesh({"data": 1}, jax.devices()[:1])
  assert compilation.call_options(mesh) == compilation.call_options()
  assert list(compilation.call_options()) == ["xla_disable_hlo_passes"]
  monkeypatch.setattr(compilation, "platform", lambda: "tpu")
  assert not compilation.call_options()
  monkeypatch.setattr(compilation, "platform", lambda: "NVIDIA H200")
  options = compilation.call_options()  # of a plan
  assert options == {"xla_gpu_experimental_force_split_k": 1}
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  for known in (True, False):
    monkeypatch.setattr(compilation, "_compiles", lambda _, known=known: known)
    compilation._gpu_knows.cache_clear()
    assert compilation.call_options() == (options if known else {})
  compilation._gpu_knows.cache_clear()


def test_a_program_is_no_part_of_another():
  with pytest.raises(ValueError, match="top-level"):
    jax.jit(compilation.jit(jnp.sin))(1.0)
