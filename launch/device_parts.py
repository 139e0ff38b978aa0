"""What `device_check.py` measures: one part to a process, one row at a time.

    python launch/device_parts.py PART ROWS [--tiny]

A part is a function that yields rows, each a mapping of names to figures that is
written as a line of ROWS as soon as it is known. `ok` in a row says whether what
must be equal is equal. The first line tells the device and the versions.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import importlib.metadata
import json
import pathlib
import platform
import statistics
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dllm_jax import load_pretrained
from dllm_jax.config import config
from dllm_jax.core import mask as masks
from dllm_jax.core.types import Process
from dllm_jax.models.attention import dispatch, kept, past
from dllm_jax.parallel import compilation, make_mesh
from dllm_jax.reports import benchmark
from dllm_jax.run import timing
from dllm_jax.run.run import Run
from dllm_jax.sampling.generator import Generator
from dllm_jax.sampling.presets import SamplerConfig
from dllm_jax.training.loop import Hooks
from tests import golden_cases
from tests.pretrained.golden import publish
from tests.sampling import ties

Row = Mapping[str, Any]
Part = Callable[[bool], Iterator[Row]]

_PACKAGES = (
  *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"),
  *("jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu"),
)
# Attention of a platform; the reference elsewhere.
_KERNELS = {"gpu": "cudnn", "tpu": "splash"}
# The names of a case's tokens and logits, under the network's own mask.
_CASES = {
  "llada_logits": ("input_ids", "logits"),
  "dream_logits": ("input_ids", "logits"),
  "llada_logits_gqa": ("input_ids", "logits"),
  "mdlm": ("xt", "logits_sigma0"),
  "sdar": ("input_ids", "logits"),
  "llada_moe": ("input_ids", "logits"),
}
# float32: ten times the originals' own error, as in the tests of parity, absolute.
# bfloat16: 8 bits, of weights and of everything between layers, relative.
_FLOAT32, _BFLOAT16 = 2e-4, 5e-2
_TIE = 1e-4  # of two probabilities between which devices may choose differently


def about() -> Row:
  """Returns what the figures are of: the device and the versions."""
  device = jax.devices()[0]
  versions = {"python": platform.python_version()}
  for name in _PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return {
    "device": {
      "name": device.device_kind,
      "platform": device.platform,
      "count": jax.device_count(),
      "memory_bytes": _memory(),
      "runtime": device.client.platform_version,
    },
    "versions": versions,
  }


def logits(tiny: bool) -> Iterator[Row]:
  """Yields how far logits are from those that the original code computed."""
  jax.config.update("jax_default_matmul_precision", "highest")
  names = list(_CASES)[: 1 if tiny else None]
  for dtype in ("float32", "bfloat16"):
    for name in names:
      arrays = golden_cases.load(name).arrays
      tokens, expected = (arrays[key] for key in _CASES[name])
      ours = np.asarray(_published(name, dtype).logits(tokens), np.float32)
      error = float(np.max(np.abs(ours - expected)))
      relative = _relative(ours, expected)
      agree = ours.argmax(axis=-1) == expected.argmax(axis=-1)
      exact = dtype == "float32"
      yield {
        "network": name,
        "dtype": dtype,
        "largest_error": error,
        "relative_error": relative,
        "same_best_token": float(np.mean(agree)),
        "ok": error <= _FLOAT32 if exact else relative <= _BFLOAT16,
      }


def train(remat: str, tiny: bool) -> Iterator[Row]:
  """Yields the speed of LLaDA 1B's train step under a remat policy."""
  size = "smoke" if tiny else "h200:1x1"
  resolved = config.load(f"benchmark_llada_1b:{size}")
  resolved.model.remat = remat
  if not tiny:
    resolved.model.attention = _KERNELS.get(jax.devices()[0].platform)
    # State takes 18 GB, and eight rows what is left of an H200.
    resolved.training.batch_size = 8 if (_memory() or 0) > 100e9 else 4
  with tempfile.TemporaryDirectory() as directory:
    run = _run(resolved, directory)
    speed = timing.step(run, steps=2 if tiny else 4, rounds=1 if tiny else 5)
  yield {
    "remat": remat,
    "attention": resolved.model.attention,
    "rows": resolved.training.batch_size,
    "length": resolved.data.length,
    **{k: v for k, v in speed.items() if k != "device"},
  }


def cached(tiny: bool) -> Iterator[Row]:
  """Yields a cached network call beside one reading of all weights.

  On a GPU by the reference and by the kernel that reads the cache where it lies.
  """
  gpu = jax.devices()[0].platform == "gpu"
  for attention in (None, "flash") if gpu and not tiny else (None,):
    size = ":smoke" if tiny else ""
    resolved = config.load(f"benchmark_llada_8b{size}")
    resolved.model.attention = attention
    with tempfile.TemporaryDirectory() as directory:
      run = _run(resolved, directory)
      run.start()
      for rows in (2,) if tiny else (1, 8, 32):
        measured = benchmark.sample(
          run,
          run.config.sampler,
          batch_size=rows,
          rounds=1 if tiny else 3,
          # Two blocks: each call costs what it costs in a longer text.
          prompt_tokens=None if tiny else run.config.data.length - 64,
          against="weights",
        )
        names = (
          *(
            "batch_size",
            "cached_step_milliseconds",
            "weight_read_milliseconds",
          ),
          *("ratio", "weight_bytes", "tokens_per_second", "compile_seconds"),
        )
        yield {"attention": attention} | {
          name: measured[name] for name in names
        }
      del run  # before its 16 GB are made again


def kernels(tiny: bool) -> Iterator[Row]:
  """Yields attention by each implementation: its error and its time.

  Errors are relative norms, of the result and of the three gradients, against
  the reference in float32 at the highest precision.
  """
  length, rows, heads, groups = (128, 1, 2, 1) if tiny else (4096, 2, 32, 4)
  keys = jax.random.split(jax.random.key(0), 4)
  inputs = tuple(
    jax.random.normal(key, (rows, length, n, 64), jnp.bfloat16)
    for key, n in zip(keys, (heads, groups, groups, heads), strict=True)
  )
  for what, (mask, segments) in _masks(rows, length).items():
    real = (segments > 0)[:, :, None, None]
    best = _exact(mask, segments, inputs)
    for name in dispatch.IMPLEMENTATIONS[1:]:
      row = {"mask": what, "implementation": name}
      programs = _attend(mask, segments, name)
      try:
        found = programs[1](*inputs)
      except (ImportError, ValueError, NotImplementedError, RuntimeError) as e:
        # Not for this device, or failed: others go on.
        yield row | {"refused": _line(e)}
        continue
      times = [_milliseconds(program, inputs, tiny) for program in programs]
      names = "forward_milliseconds", "both_milliseconds"
      errors = _errors(found, best, real)
      yield {**row, **errors, **dict(zip(names, times, strict=True))}
  if kept.chosen("flash"):
    yield from canvases(tiny)


def canvases(tiny: bool) -> Iterator[Row]:
  """Yields canvases behind kept text by the kernel of caches: error and times.

  Heads of DiffusionGemma's two kinds of layers; a part of `kernels`, on GPUs.
  """
  length, slots, heads = (32, 47, 4) if tiny else (256, 1023, 16)
  for groups, width in ((2, 16),) if tiny else ((8, 256), (2, 512)):
    keys = jax.random.split(jax.random.key(1), 5)
    own, old = (1, length, groups, width), (1, 1, groups, slots, width)
    shapes = (1, length, heads, width), own, own, old, old
    inputs = tuple(
      jax.random.normal(key, shape, jnp.bfloat16)
      for key, shape in zip(keys, shapes, strict=True)
    )
    mine, held = jnp.ones((1, length)), jnp.arange(slots)[None] < slots - 9
    sight = past.Sight(
      mine[:, :, None] == mine[:, None],
      mine[:, :, None] == held[:, None],
      (mine.astype(jnp.int32), held.astype(jnp.int32)),
    )

    def attend(q, k, v, key, value, name, sight=sight):
      kept = past.Past(key, value, jnp.asarray(0))
      return past.attention(q, k, v, kept, sight, name)

    programs = [
      compilation.jit(functools.partial(attend, name=name))
      for name in ("flash", "xla")
    ]
    wide = [x.astype(jnp.float32) for x in inputs]
    with jax.default_matmul_precision("highest"):
      best = np.asarray(programs[1](*wide))
    found = np.asarray(programs[0](*inputs), np.float32)
    error = _relative(found, best)
    times = [_milliseconds(program, inputs, tiny) for program in programs]
    names = "kernel_milliseconds", "reference_milliseconds"
    yield {
      "canvas": [heads, groups, width],
      "slots": slots,
      "error": error,
      "ok": error <= _BFLOAT16,
      **dict(zip(names, times, strict=True)),
    }


def _masks(rows: int, length: int):
  """Returns the masks that training and sampling use, with their segments."""
  one = jnp.ones((rows, length), jnp.int32)
  slot = jnp.arange(length)
  tail = jnp.where(slot < length - length // 8, one, 0)
  packed = one + slot * 4 // length
  return {
    "full": (masks.Full(), one),
    "padded tail": (masks.Full(), tail),
    "packed": (masks.Full(), packed),
    "block-causal": (masks.BlockCausal(32), one),
    "two streams": (masks.TwoStream(length // 2, 32), one),
  }


def _attend(mask, segments, name: str):
  """Returns programs of attention: its result, and that with its gradients."""
  options = {"mask": mask, "implementation": name}
  options |= {"q_segments": segments, "k_segments": segments}
  forward = lambda q, k, v, _=None: dispatch.attention(q, k, v, **options)

  def both(q, k, v, weights):
    weights = jnp.where((segments > 0)[:, :, None, None], weights, 0)
    out, back = jax.vjp(forward, q, k, v)
    return out, back(weights.astype(out.dtype))

  return compilation.jit(forward), compilation.jit(both)


def _exact(mask, segments, inputs):
  """Returns the reference in float32 at the highest precision."""
  wide = [x.astype(jnp.float32) for x in inputs]
  with jax.default_matmul_precision("highest"):
    return _attend(mask, segments, "xla")[1](*wide)


def _errors(found, best, real) -> Row:
  """Returns relative errors; what padded queries get means nothing."""
  zero = lambda x: np.where(real, np.asarray(x, np.float32), 0)
  error = _relative(zero(found[0]), zero(best[0]))
  gradient = max(
    _relative(np.asarray(x, np.float32), np.asarray(y, np.float32))
    for x, y in zip(found[1], best[1], strict=True)
  )
  within = max(error, gradient) <= _BFLOAT16
  return {"error": error, "gradient_error": gradient, "ok": within}


def tokens(tiny: bool) -> Iterator[Row]:
  """Yields how many sampled rows are equal to those of this machine's CPU.

  Greedy rows that differ must do so first at a choice between probabilities that
  are nearly equal; of the others it is told how many are equal.
  """
  jax.config.update("jax_default_matmul_precision", "highest")
  count = 4 if tiny else 64
  name = "llada_generate"
  rows = np.random.default_rng(0).integers(0, 120, (count, 16)).tolist()
  rows = [[*row, *[None] * 32] for row in rows]
  greedy = SamplerConfig(preset="llada", steps=16, block_length=16)
  samplers = {
    "greedy": greedy,
    "greedy, dual cache": dataclasses.replace(greedy, cache="dual"),
    "drawn": dataclasses.replace(greedy, temperature=1.0),
  }
  cpu, device = jax.local_devices(backend="cpu")[-1], jax.devices()[0]
  for what, sampler in list(samplers.items())[: 1 if tiny else None]:
    made = [_sampled(name, rows, sampler, where) for where in (cpu, device)]
    one, other = (np.asarray(each.generation.tokens) for _, _, each in made)
    row = {
      "sampler": what,
      "rows": count,
      "equal": int((one == other).all(axis=1).sum()),
    }
    if what == "greedy":
      model, plan, _ = made[0]
      net = model.denoiser, jax.device_get(model.params)
      traces = (each.generation for _, _, each in made)
      gaps = ties.margins(plan.sampler, net, plan.batch, *traces)
      row["largest_margin"] = max(gaps, default=0.0)
      row["ok"] = row["largest_margin"] <= _TIE
    yield row


def _sampled(name, rows, sampler, device):
  """Returns the network, what was asked of it and what it made, on a device."""
  mesh = make_mesh({"data": 1}, [device])
  with jax.set_mesh(mesh):
    model = _published(name, "float32", mesh=mesh)
    generator = Generator(
      model.objective, model.denoiser, model.tokenizer, mesh=mesh
    )
    plan = generator.plan(rows, length=len(rows[0]), sampler=sampler)
    return (
      model,
      plan,
      generator(model.params, Process(), plan, seed=0, trace=True),
    )


def steps(tiny: bool) -> Iterator[Row]:
  """Yields what 200 steps of a network of 100M parameters on random tokens say.

  The loop itself, with its data, logs and checkpoint; a loss that is not finite
  ends it.
  """
  shape = {"width": 768, "layers": 12, "heads": 12, "dtype": "bfloat16"}
  resolved = config.resolve({
    "data": {"path": "random", "tokenizer": "numbers:16384", "length": 1024},
    "objective": {"name": "mdlm"},
    "model": {"width": 32, "layers": 2, "heads": 2} if tiny else shape,
    "optimizer": {"learning_rate": 3e-4, "warmup_steps": 20},
    "training": {"steps": 200, "batch_size": 16},
    "logging": {"every_steps": 10, "tensorboard": False, "progress": False},
    "checkpoint": {"every_steps": 10**9},
    "mesh": {"data": 1},
  })
  if tiny:
    resolved.data.tokenizer, resolved.data.length = "numbers:64", 32
    resolved.training.steps = 20
  with tempfile.TemporaryDirectory() as directory:
    run = _run(resolved, directory)
    leaves = jax.tree.leaves(run.program.abstract.params)
    run.follow(run.loop(run.workdir, Hooks()))
    lines = (run.workdir / "metrics.jsonl").read_text()
  found = [json.loads(line) for line in lines.splitlines()]
  found = [x for x in found if "loss_nats_per_token" in x]
  losses = [x["loss_nats_per_token"] for x in found]
  yield {
    "parameters": sum(leaf.size for leaf in leaves),
    "steps": found[-1]["step"],
    "first_loss": losses[0],
    "last_loss": losses[-1],
    "tokens_per_second": found[-1]["tokens_per_second"],
    "ok": bool(np.isfinite(losses).all()),
  }


PARTS: Mapping[str, Part] = {
  "logits": logits,
  **{
    f"train_{remat}": functools.partial(train, remat)
    for remat in ("dots", "none", "full", "dots_no_batch")
  },
  "cached": cached,
  "attention": kernels,
  "tokens": tokens,
  "steps": steps,
}
"""Parts by name, in the order of their worth."""


def _run(resolved, directory: str) -> Run:
  """Returns a run on the first device."""
  resolved.mesh.data = 1
  where = pathlib.Path(directory) / "run"
  return Run.create(resolved, where, devices=jax.devices()[:1])


def _memory() -> int | None:
  """Returns the bytes of memory that programs may use, where it is told."""
  return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def _published(name: str, dtype: str, **where):
  """Returns the network of a recorded case, read as a published folder."""
  with tempfile.TemporaryDirectory() as directory:
    folder = publish(name, pathlib.Path(directory) / name)
    return load_pretrained(folder, dtype=dtype, **where)


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
  """Returns |found - expected| / |expected|, Euclidean norms."""
  return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _milliseconds(program, inputs, tiny: bool) -> float:
  """Returns the median time of a call among rounds of several."""
  calls, rounds = (1, 2) if tiny else (5, 7)
  jax.block_until_ready(program(*inputs))
  found = []
  for _ in range(rounds):
    start = time.perf_counter()
    out = [program(*inputs) for _ in range(calls)]
    jax.block_until_ready(out)
    found.append(1000 * (time.perf_counter() - start) / calls)
  return statistics.median(found)


def _line(error: Exception) -> str:
  """Returns an error as one line."""
  return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def main() -> None:
  """Runs one part."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("part", choices=PARTS)
  parser.add_argument("rows", type=pathlib.Path, help="a file to append to")
  parser.add_argument("--tiny", action="store_true")
  args = parser.parse_args()
  if not args.tiny and jax.default_backend() == "cpu":
    parser.error(
      "jax finds no accelerator here: see that its plugin is installed, or try "
      "the command with --tiny"
    )
  compilation.enable_compilation_cache()
  with args.rows.open("a") as file:
    write = lambda row: print(json.dumps(row), file=file, flush=True)
    write(about())
    for row in PARTS[args.part](args.tiny):
      write(row)


if __name__ == "__main__":
  main()
