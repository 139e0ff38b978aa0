"""Plans on simulated devices, whose peaks are made up; what is counted, exactly."""

import dataclasses
import functools
import importlib
import importlib.util
import json
import math
from pathlib import Path

import jax
import pytest

from dllm_jax.cli.main import main
from dllm_jax.config import config
from dllm_jax.core import vocabulary
from dllm_jax.core.mask import Causal, Full, TwoStream
from dllm_jax.data.numbers import Numbers
from dllm_jax.models.attention import splash
from dllm_jax.parallel import compilation
from dllm_jax.parallel.hardware import Chip
from dllm_jax.parallel.topology import Machine
from dllm_jax.planning import plan, report, roofline, search
from dllm_jax.planning.facts import Reference, state_bytes
from dllm_jax.planning.search import rank
from dllm_jax.run.run import Run

VOCAB = 512
CHIP = Chip(
  kind="cpu",
  flops=1e12,
  memory=2**30,
  usable=1.0,
  memory_rate=1e11,
  link_rate=1e9,
  network_rate=1e8,
  matmul_efficiency=0.5,
)


def resolved(**mesh):
  given = config.load("smoke")
  given.model.width, given.model.layers, given.model.heads = 128, 4, 4
  given.data.length, given.training.batch_size = 64, 16
  given.mesh.update(dict.fromkeys(given.mesh, 1) | mesh)
  return given


def tokens(size=VOCAB):
  return Numbers(vocab_size=size, mask_id=size - 1, bos_id=0, eos_id=1)


@pytest.fixture(scope="module", autouse=True)
def quick():
  """Compiles fast: what is tested are counts, not speed."""
  options = {"cpu": {"xla_backend_optimization_level": "0"}}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(compilation, "_STEP_OPTIONS", options)
    yield


@pytest.fixture(scope="module")
def machine():
  return Machine(name="test:8", chip=CHIP, devices=tuple(jax.devices()))


@pytest.fixture(scope="module")
def reference():
  return Reference(resolved(), tokens())


@pytest.fixture(scope="module")
def sharded(machine, reference):
  given = resolved(fsdp=4, tensor=2)
  given.model.remat = "full"
  return plan(given, machine, tokens(), reference=reference)


def test_flops_are_six_for_each_parameter_and_token_and_attention(reference):
  facts, network = reference.facts, reference.network
  length = 64
  embedding = network.padded_vocab * network.width
  norms = (2 * network.layers + 1) * network.width
  multiplied = facts.parameters - embedding - norms
  attention = 2 * 2 * length**2 * network.width * network.layers
  assert 3 * facts.forward == 6 * multiplied * length + 3 * attention
  assert 2 * facts.attention == attention
  assert facts.vocabulary == 2 * length * embedding


@pytest.mark.parametrize(
  "mask, share",
  [
    (Full(), 1),
    (Causal(), 10 / 16),  # 4 x 4 tiles of 512
    (TwoStream(length=1024, block=32), (2 + 3 + 3) / 16),
  ],
)
def test_kernels_pass_over_tiles_that_the_mask_empties(mask, share):
  assert splash.visited(mask, 2048) == share


@pytest.mark.all
def test_recomputation_is_time_and_no_model_flops(reference):
  passes = {p: reference.remat(p)[0] for p in ("none", "dots", "full")}
  facts = reference.facts
  forward = facts.forward - facts.vocabulary
  assert passes["none"] == 3 * forward
  assert 0 <= passes["dots"] - 3 * forward <= 2 * facts.attention
  # All but the last product of a layer, which no gradient needs.
  assert 3.7 * forward < passes["full"] < 4 * forward


@pytest.mark.all
def test_full_remat_keeps_the_input_of_each_layer(reference):
  _, kept = reference.remat("full")
  network = reference.network
  inputs = 4 * 64 * network.width * network.layers
  assert inputs <= kept < 2 * inputs
  assert reference.remat("none")[1] > 5 * kept


def test_state_bytes_are_those_of_the_shards(reference):
  whole = {"data": 8, "fsdp": 1, "tensor": 1, "context": 1, "expert": 1}
  facts = reference.facts
  kinds = state_bytes(facts.state, whole)
  assert kinds["parameters"] == 4 * facts.parameters
  assert kinds["optimizer"] == pytest.approx(8 * facts.parameters, rel=1e-4)
  parts = state_bytes(facts.state, whole | {"data": 1, "fsdp": 8})
  assert parts["parameters"] == pytest.approx(facts.parameters / 2, rel=0.02)


@pytest.mark.all
def test_the_program_multiplies_what_was_counted(sharded, reference):
  facts = reference.facts
  passes = reference.remat("full")[0] + 3 * facts.vocabulary
  assert sharded.flops_per_device == pytest.approx(16 * passes / 8, rel=0.02)
  model = 3 * facts.forward * 16 / 8
  assert sharded.model_flops_per_device == model < sharded.flops_per_device


@pytest.mark.all
def test_what_is_planned_is_compiled_as_it_runs(monkeypatch, machine):
  """The train step brings its compiler's options with it."""
  options = {"cpu": {"xla_no_such_option": "1"}}
  monkeypatch.setattr(compilation, "_STEP_OPTIONS", options)
  with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
    plan(resolved(data=8), machine, tokens())


def test_chunks_of_the_loss_are_those_of_the_machine(monkeypatch, machine):
  """A plan for GPUs is made on a CPU, whose chunks are smaller."""
  planning = importlib.import_module("dllm_jax.planning.plan")
  given, vocab = resolved(data=8), 2**14
  run = Run(Path(), given, tokens(vocab), devices=machine.devices)
  positions = 16 * 64 // 8
  assert vocabulary.chunks(positions, vocab) == 1

  def platform():
    return "cpu" if jax.sharding.get_abstract_mesh().empty else "gpu"

  monkeypatch.setattr(vocabulary, "platform", platform)
  monkeypatch.setattr(vocabulary, "_CHUNK", (1, 32))
  assert planning._step(run)[1] == (positions // 32,)


def test_what_is_planned_is_kept_nowhere():
  """XLA reads no program of a machine that is not here, and says so at length."""
  least = lambda: jax.config.jax_persistent_cache_min_compile_time_secs
  found, before = [], least()

  class Lowered:
    def compile(self):
      found.append(least())
      raise jax.errors.JaxRuntimeError("Used 2.5K of 1K")

  planning = importlib.import_module("dllm_jax.planning.plan")
  assert planning._compiled(Lowered()) == (None, 2560.0)
  assert found == [math.inf] and least() == before


def test_kinds_of_memory_add_up(sharded):
  assert sum(sharded.bytes_by_kind.values()) == sharded.bytes_per_device
  assert min(sharded.bytes_by_kind.values()) > 0
  assert list(sharded.bytes_by_kind) == [
    "parameters",
    "optimizer",
    "gradients",
    "activations",
    "temporaries",
  ]
  assert sharded.fits


def test_weights_travel_along_fsdp_and_activations_along_tensor(sharded):
  sent = sharded.collective_bytes
  assert {"fsdp", "tensor"} <= set(sent)
  # At least: weights twice and gradients once, a half of them on each device.
  least = 3 * 3 / 4 * sharded.bytes_by_kind["parameters"] * 4 * 0.8
  assert sent["fsdp"] > least


def test_the_bound_is_the_stated_formula(sharded):
  seconds = sharded.seconds
  assert seconds["compute"] == pytest.approx(
    sharded.flops_per_device / (0.5 * CHIP.flops)
  )
  overlap = lambda axes: min(roofline.OVERLAP[a] for a in axes.split("+"))
  hidden = sum(overlap(a) * t for a, t in seconds["network"].items())
  waits = sum((1 - overlap(a)) * t for a, t in seconds["network"].items())
  step = max(seconds["compute"], seconds["memory"], hidden) + waits
  assert sharded.step_seconds_bound == pytest.approx(step)
  mfu = sharded.model_flops_per_device / CHIP.flops / step
  assert sharded.mfu_bound == pytest.approx(mfu)


def test_text_and_pictures_show_the_plan(sharded):
  text = report.text(sharded)
  assert "fsdp 4, tensor 2" in text and "fits" in text and "MFU" in text
  pictures = report.pictures({"a": sharded, "b": sharded})
  assert set(pictures) == {"memory", "roofline"}
  assert "optimizer" in pictures["memory"] and "limit" in pictures["memory"]
  json.dumps(dataclasses.asdict(sharded))


@pytest.mark.all
def test_search_compiles_the_first_and_returns_the_best(machine, reference):
  lines = []
  best, found = search(
    resolved(),
    machine,
    tokens(),
    compiled=1,
    report=lines.append,
    reference=reference,
  )
  assert len(lines) == 1 and found.fits
  assert math.prod(found.settings["mesh"].values()) == 8
  assert best.model.remat == found.settings["remat"]


@pytest.mark.all
def test_candidates_divide_everything_and_are_ordered(machine, reference):
  ranked = rank(resolved(), machine, reference)
  assert len(ranked) > 50
  for c in ranked:
    assert math.prod(c.mesh.values()) == 8
    rows = c.mesh["data"] * c.mesh["fsdp"] * c.mesh["expert"]
    assert 16 % (rows * c.microbatches) == 0
  seconds = [c.seconds for c in ranked if c.memory <= CHIP.memory]
  assert seconds == sorted(seconds)


@pytest.mark.all
def test_a_plan_that_does_not_fit_says_what_would(machine, reference):
  small = dataclasses.replace(CHIP, memory=12 * 2**20)
  tight = dataclasses.replace(machine, chip=small)
  given = resolved(data=8)
  found = plan(given, tight, tokens(), reference=reference)
  assert not found.fits
  advised = functools.partial(
    report.advised, found, given, tokenizer=tokens(), reference=reference
  )
  found = advised(tight)
  assert "--config.mesh.fsdp=" in found.advice
  none = dataclasses.replace(
    machine, chip=dataclasses.replace(CHIP, memory=2**16)
  )
  assert "take more devices" in advised(none).advice


def test_the_sampler_is_planned_too(machine, reference):
  given = resolved(data=8)
  given.sampler.steps = 4
  found = plan(
    given, machine, tokens(), program="sample", rows=2, reference=reference
  )
  facts = reference.facts
  assert found.flops_per_device == pytest.approx(
    4 * 2 * facts.forward, rel=0.35
  )
  assert "optimizer" not in found.bytes_by_kind
  assert found.call["ratio"] > 1 and found.call["cache_copies"] == 0


@pytest.mark.parametrize(
  "cache", ["dual", pytest.param("prefix", marks=pytest.mark.all)]
)
@pytest.mark.all
def test_a_cached_call_writes_no_cache_whole(machine, reference, cache):
  """Keys and values stay in place while tokens are revealed.

  Each layer would otherwise write all layers, or each call copy them.
  """
  given = resolved(data=4, tensor=2)
  given.sampler.update({"cache": cache, "block_length": 16, "steps": 4})
  if cache == "prefix":
    given.sampler.reach = 32
  found = plan(
    given, machine, tokens(), program="sample", rows=16, reference=reference
  )
  call, network = found.call, reference.network
  size = 4 * network.layers * network.width * 64 * 4 * 16 / 8
  assert call["cache"] == 2 * size and call["cache_copies"] == 0
  assert call["block"] == call["cache"] / (4 if cache == "dual" else 2)
  assert f"{call['ratio']:.2f} times what it has to" in report.text(found)


def test_what_two_passes_keep_is_counted_by_the_row():
  """The second pass is given a cache, whose rows are not its first dimension."""
  given = config.load("shakespeare_diffusion_gemma:smoke")
  given.model.update({"width": 32, "layers": 3, "heads": 2, "window": 8})
  given.data.length, given.objective.canvas = 64, 16
  reference = Reference(given, tokens())
  flops, kept = zip(*map(reference.remat, ("full", "none")), strict=True)
  # Two passes, and of a layer at least its input: 64 and 16 positions.
  assert kept[0] >= 4 * 32 * 3 * (64 + 16)
  assert kept[1] > 2 * kept[0] and flops[0] > flops[1]


@pytest.mark.all
def test_caches_of_several_kinds_of_layers_are_counted(machine):
  """A canvas reads what windowed layers and full ones keep, and writes nothing."""
  given = config.load(
    "shakespeare_diffusion_gemma:smoke", {"objective": "diffusion_gemma"}
  )
  given.model.update({"width": 32, "layers": 3, "heads": 2, "window": 8})
  given.data.length, given.objective.canvas = 64, 16
  given.sampler.steps = 4
  given.mesh.update(dict.fromkeys(given.mesh, 1) | {"data": 8})
  found = plan(given, machine, tokens(), program="sample", rows=1)
  call = found.call
  of_layer = lambda places: 2 * 2 * 16 * places * 4  # keys and values, float32
  assert call["cache"] == 2 * of_layer(7) + of_layer(64)
  assert call["block"] == 0 and call["ratio"] > 0


@pytest.mark.parametrize(
  "mesh, message",
  [
    ({"fsdp": 3}, "must multiply to 8"),
    ({"tensor": 8}, "does not divide"),
    ({"data": 3, "fsdp": -1}, "must multiply to 8"),
  ],
)
def test_meshes_that_do_not_fit(machine, mesh, message):
  with pytest.raises(ValueError, match=message):
    plan(resolved(**mesh), machine, tokens())


def test_the_command_says_which_extra_is_missing(monkeypatch, capsys):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  assert main(["plan", "--config=smoke", "--topology=v5p:4x4x4"]) == 2
  error = capsys.readouterr().err
  assert "pip install 'dllm_jax[plan]'" in error and error.count("\n") == 1


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--config=smoke"], "--topology must be given"),
    (["--config=smoke", "--topology=v5p:3x3x3"], "there are v5e and v6e"),
    (["--config=llada_8b", "--topology=h200:1x9"], "h200:8x8"),
    (["--topology=v5p:4x4x4"], "--config must be given"),
    (["--config=smoke:v9:1x1", "--topology=v5p:4x4x4"], "unknown size"),
  ],
)
def test_the_command_refuses_in_one_line(arguments, message, capsys):
  assert main(["plan", *arguments]) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1
