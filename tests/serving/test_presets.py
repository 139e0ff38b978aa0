"""Every preset, and rows over several devices and processes: as offline."""

import functools
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from dllm_jax.cli.main import main
from dllm_jax.core.types import Process
from dllm_jax.models.transformer import transformer, TransformerConfig
from dllm_jax.parallel import make_mesh, RULES, shardings
from dllm_jax.sampling.options import RowOptions, stack
from dllm_jax.sampling.presets import PRESETS, SamplerConfig
from dllm_jax.sampling.requests import build
from dllm_jax.serving.launch import check_served, Program
from tests import runs
from tests.pretrained.golden import publish
from tests.sampling import published, small
from tests.sampling.test_invariance import ALONE
from tests.sampling.test_presets import objective_of
from tests.serving import served

LENGTH = 24


@functools.cache
def network(vocab):
  """A random transformer whose logits are far apart."""
  config = TransformerConfig(vocab_size=vocab, width=16, layers=1, heads=2)
  denoiser = transformer(config)
  objective = objective_of("mdlm", vocab, LENGTH)
  params = jax.jit(denoiser.init)(
    jax.random.key(1),
    objective.inputs(
      None, np.zeros((1, 4), np.int32), np.ones((1, 1)), small._batch()
    ),
  )
  rng = np.random.default_rng(2)
  normal = lambda x: rng.normal(scale=0.3, size=x.shape).astype(np.float32)
  return denoiser, jax.tree.map(lambda x: 2 * np.asarray(x) + normal(x), params)


REFUSED = (
  "fast_dllm_v2",
  "fast_dllm_v2_cached",
  "idlm",
  "idlm_quadratic",
  "idlm_published",
  "nemotron",
)
REFUSED += ("nemotron_speculative",)


@pytest.mark.parametrize("name", REFUSED)
def test_drafts_and_blocks_that_open_are_not_served(name):
  spec = SamplerConfig(preset=name).build(
    objective_of(name, 20, LENGTH), length=LENGTH
  )
  with pytest.raises(ValueError, match="not served: use"):
    check_served(spec)


@pytest.mark.all
@pytest.mark.filterwarnings("ignore:.*may be SDAR")
def test_a_run_that_drafts_is_refused_at_the_start(tmp_path, capsys):
  folder, run = publish("idlm", tmp_path / "hf"), tmp_path / "run"
  convert = "convert", f"--from_hf={folder}", "--as=idlm"
  assert main([*convert, f"--workdir={run}"]) == 0
  capsys.readouterr()
  assert main(["serve", f"--workdir={run}", "--port=0"]) == 2
  lines = capsys.readouterr().err.splitlines()
  assert [x for x in lines if x.startswith("dllm: ")] == [
    "dllm: drafts are not served: use sampler.preset 'autoregressive', which has"
    " the same texts, or `dllm sample`"
  ]


@pytest.mark.all
@pytest.mark.parametrize("name", [n for n in PRESETS if n not in REFUSED])
def test_a_preset_is_served_as_it_samples(name):
  objective = objective_of(name, 20, LENGTH)
  config = SamplerConfig(preset=name)
  if name in ("fast_dllm", "fast_dllm_factor"):
    config = SamplerConfig(preset=name, block_length=8)
  spec = config.build(objective, length=LENGTH, end_ids=(3,))
  denoiser, params = network(20)
  made = Program(
    spec,
    denoiser,
    params,
    Process(),
    rows=3,
    counts=(3,),
    mesh=served.one_device(),
    defaults=config.options((3,)),
  )
  made.compile()
  process = objective.init(jax.random.key(0))
  made._held = (made._held[0], process)
  rows = served.templates(objective, 6)
  chosen = [
    RowOptions(
      seed=served.SEED,
      temperature=0.7 if number % 2 else None,
      steps=2 if spec.row_steps and number % 3 == 0 else None,
    )
    for number in range(len(rows))
  ]
  options = stack(
    chosen,
    defaults=config.options((3,)),
    objective=objective,
    steps=spec.row_steps,
  )
  requests = build(rows, objective=objective, length=LENGTH, options=options)
  want = published.quick(spec, denoiser, params, process, small.KEY, requests)
  found = served.at_random(made, rows, seed=1, options=chosen)
  for number, row in enumerate(rows):
    heard = found.heard[number]
    for event in heard[:-1]:
      for slot, token in zip(event.slots, event.tokens, strict=True):
        assert want.tokens[number][slot] == token
    if heard.reason == "length":
      assert heard.tokens == want.tokens[number][: len(row)].tolist()
    else:
      ends = [t for t, given in zip(want.tokens[number], row) if given is None]
      assert heard.reason == "stop" and 3 in ends
  assert {found.heard[n].reason for n in range(len(rows))} <= {"length", "stop"}


@pytest.mark.all
@pytest.mark.parametrize("name", ["dual", "block"])
@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 4, "tensor": 2}])
def test_rows_over_eight_devices_are_those_of_one(name, sizes):
  spec, mesh = ALONE[name], make_mesh(sizes)
  denoiser, params = small.network()
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, shardings(params, mesh, RULES))
  made = Program(
    spec,
    denoiser,
    placed,
    Process(),
    rows=8,
    mesh=mesh,
    defaults=served.defaults(spec),
  )
  made.compile()
  compiled, rows = made.programs(), served.templates(spec.objective, 12)
  found = served.at_random(made, rows, seed=2)
  want = served.offline(spec, rows)
  assert [found.heard[n].tokens for n in range(len(rows))] == want
  assert made.programs() == compiled


PROCESS = """
import json, sys
from dllm_jax.parallel import distributed
distributed.initialise()
import jax
from dllm_jax.parallel import make_mesh
from dllm_jax.sampling.options import RowOptions
from dllm_jax.serving.engine import Engine
from dllm_jax.serving.requests import Request
from tests.sampling.test_invariance import ALONE
from tests.serving import served

spec = ALONE["block"]
made = served.program(spec, rows=4, mesh=make_mesh({"data": 2}))
engine = Engine(made, queue=10)
engine.start()
if jax.process_index():
  engine.join()
else:
  rows = served.templates(spec.objective, 7)
  heard = [served.Heard(row) for row in rows]
  options = RowOptions(seed=served.SEED, logit_bias={3: -1.0, 4: 0.5})
  for number, row in enumerate(rows):
    request = Request(template=row, number=number, options=options)
    engine.submit(request, heard[number].append)
  engine.stop(deadline=120.0)
  print(json.dumps([one.tokens for one in heard]))
"""


@pytest.mark.all
def test_two_processes_serve_what_one_does():
  port = runs.free_port()
  flags = "--xla_force_host_platform_device_count=1"
  start = lambda number: subprocess.Popen(
    [sys.executable, "-c", PROCESS],
    cwd=runs.ROOT,
    env=os.environ
    | {
      "PYTHONPATH": str(runs.ROOT),
      "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flags}",
      "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
      "JAX_NUM_PROCESSES": "2",
      "JAX_PROCESS_ID": str(number),
    },
    stdout=subprocess.PIPE,
    text=True,
  )
  processes = [start(number) for number in range(2)]
  said = [process.communicate(timeout=300)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0]
  spec = ALONE["block"]
  made = served.program(spec, counts=(1, 3))
  rows = served.templates(spec.objective, 7)
  options = RowOptions(seed=served.SEED, logit_bias={3: -1.0, 4: 0.5})
  alone = served.Served(made)
  for number, row in enumerate(rows):
    alone.round(alone.ticket(row, number, options=options))
    alone.finish()
  want = [alone.heard[number].tokens for number in range(7)]
  assert json.loads(said[0].splitlines()[-1]) == want
