"""Set-up for every test: CPU, 8 simulated devices, quick and cached compiling."""

import collections
import gc
import importlib.metadata
import os
import pathlib

import pytest

pytest_plugins = ["tests.buckets"]

# Before jax is imported anywhere: both are read once, at its start.
os.environ["JAX_PLATFORMS"] = "cpu"
_FLAGS = (
  "--xla_force_host_platform_device_count=8",
  # Most programs run once, for a moment: that is not worth LLVM's optimisations.
  "--xla_backend_optimization_level=0",
  # Programs in one part are compiled in less time.
  "--xla_cpu_parallel_codegen_split_count=1",
  # Programs of the tests' own; see `parallel.compilation`.
  "--xla_cpu_experimental_ynn_fusion_type=",
)
# Plain loops, too, in half of it; later versions abort at a flag that went.
if importlib.metadata.version("jaxlib").startswith("0.10."):
  _FLAGS += ("--xla_cpu_use_fusion_emitters=false",)
_given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join((*_FLAGS, _given)).strip()
_CACHE = pathlib.Path(__file__).parent.parent / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
# Small programs are many: together they take more than the large ones.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Whole tracebacks at each operation are a tenth of the time that lowering takes.
os.environ.setdefault("JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS", "false")
# Tracing makes objects by the million, and next to no cycles of them: looking
# for those as often as usual took a quarter of the time.
gc.set_threshold(200_000, 50, 100)


def pytest_sessionfinish():
  """Keeps the last search for cycles, some seconds, from all that is alive."""
  gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _shared_programs():
  """Lets runs, generators and scorers that are equal have equal programs."""
  from tests import sharing  # Imports jax, which reads what is set above.

  with pytest.MonkeyPatch.context() as patch:
    sharing.share(patch)
    yield


@pytest.fixture(scope="module", autouse=True)
def _few_maps():
  """Drops compiled programs before they are as many as Linux has maps for.

  Each takes some memory maps, of which a process may have 65,530 as a rule
  (vm.max_map_count); without another one, XLA's next program crashes it.
  """
  yield
  maps = pathlib.Path("/proc/self/maps")
  most = pathlib.Path("/proc/sys/vm/max_map_count")
  if not most.exists():
    return
  if len(maps.read_bytes().splitlines()) > int(most.read_text()) // 2:
    import jax  # Reads what is set above.

    jax.clear_caches()
    gc.collect()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
  """Marks all but a few cases of each test that is marked so as long."""
  cases = collections.defaultdict(list)
  for item in items:
    if item.get_closest_marker("few") and not item.get_closest_marker("all"):
      cases[item.path, item.originalname].append(item)
  for found in cases.values():
    (few,) = found[0].get_closest_marker("few").args
    # From the first to the last: neighbours have most in common.
    kept = {round(i * (len(found) - 1) / max(few - 1, 1)) for i in range(few)}
    for i, item in enumerate(found):
      if i not in kept:
        item.add_marker(pytest.mark.all)
