"""The house as docs/architecture.md draws it: imports go one way, and more."""

import ast
import collections
import functools
import importlib
import importlib.util
import pathlib
import subprocess
import sys
import warnings

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "dllm_jax"

# A room imports itself and the groups before its own, nothing else.
ORDER = (
  {"core"},
  {"objectives", "models"},
  {"parallel", "data"},
  {"sampling"},
  {"training", "pretrained"},
  {"config"},
  {"run"},
  {"plots"},
  {"evaluation"},
  {"posttraining"},
  {"planning"},
  {"serving"},
  {"reports"},
  {"cli"},
  {"__main__"},
)
# Where programs are launched; everything else is a plain function.
LAUNCHERS = {
  "evaluation/likelihood/scorer.py",
  "evaluation/samples/pictures.py",
  "posttraining/reference.py",
  "posttraining/reinforcement/scoring.py",
  "pretrained/layouts/magvit2.py",
  "pretrained/load.py",
  "reports/benchmark.py",
  "reports/benchmark_loss.py",
  "sampling/launch.py",
  "serving/launch.py",
  "training/held_out.py",
  "training/program.py",
  "training/served.py",
}
MAX_LINES = 60  # of code in a function
MAX_FILE = 400
MAX_ROOM = 14  # files beside its folders


@functools.cache
def sources() -> dict[str, ast.Module]:
  """Returns the package's syntax trees by path inside it."""
  return {
    path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text("utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
  }


def imported(tree: ast.Module) -> set[str]:
  """Returns the dotted names of everything a file imports, at any depth."""
  names = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, "imports are absolute"
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  return names


def room(path: str) -> str:
  """Returns the room of a path such as "core/types.py" or "run.py"."""
  return path.split("/")[0].removesuffix(".py")


def rooms_used(tree: ast.Module) -> set[str]:
  """Returns the rooms that a file imports from."""
  parts = [name.split(".") for name in imported(tree)]
  return {p[1] for p in parts if p[0] == "dllm_jax" and len(p) > 1}


def test_every_room_has_its_place():
  found = {room(path) for path in sources()} - {"__init__"}
  assert found == set().union(*ORDER)


def test_imports_go_one_way():
  wrong, earlier = [], set()
  for group in ORDER:
    for path, tree in sources().items():
      if room(path) in group:
        legal = earlier | {room(path)}
        wrong += [f"{path}: {r}" for r in rooms_used(tree) - legal]
    earlier |= group
  assert not wrong


def test_flax_modules_live_in_models():
  linen = lambda names: any(n.startswith("flax.linen") for n in names)
  users = {room(p) for p, tree in sources().items() if linen(imported(tree))}
  assert users == {"models"}


def test_configs_are_read_in_one_place():
  # The launchers pass a ConfigDict on; only `config` makes dataclasses of it.
  uses = lambda names: any(n.startswith("ml_collections") for n in names)
  users = {room(p) for p, tree in sources().items() if uses(imported(tree))}
  assert users <= {
    "config",
    "run",
    "posttraining",
    "planning",
    "reports",
    "cli",
  }


def users(module: str, *names: str) -> set[str]:
  """Returns the files that use a module's functions."""
  used = lambda tree: (
    any(
      isinstance(node, ast.Attribute)
      and node.attr in names
      and isinstance(node.value, ast.Name)
      and node.value.id == module.split(".")[-1]
      for node in ast.walk(tree)
    )
    or imported(tree) & {f"{module}.{name}" for name in names}
  )
  return {path for path, tree in sources().items() if used(tree)}


# Places are paths of one type, in buckets as on disks.


def test_paths_come_from_one_place():
  found = {p for p, tree in sources().items() if "pathlib" in imported(tree)}
  assert found == {"core/paths.py"}


def test_programs_are_made_in_one_place():
  # Which gives them the options without which some come out wrong. A product of
  # experts is inside of others and traced by itself: it is no program.
  found = users("jax", "jit", "pmap", "pjit")
  assert found == {"parallel/compilation.py", "models/grouped.py"}


def test_jit_only_where_a_program_is_launched():
  assert users("dllm_jax.parallel.compilation", "jit") == LAUNCHERS


@pytest.mark.parametrize(
  "kind", [DeprecationWarning, PendingDeprecationWarning, FutureWarning]
)
@pytest.mark.parametrize("name", ["dllm_jax.models.block", "tests.runs"])
def test_what_libraries_will_drop_is_an_error(name, kind):
  warn = lambda: warnings.warn("goes", kind, stacklevel=2)  # as a library does
  with pytest.raises(kind, match="goes"):
    exec("warn()", {"__name__": name, "warn": warn})
  with pytest.warns(kind, match="goes"):
    exec("warn()", {"__name__": "dllm_jaxer", "warn": warn})


def doors() -> list[str]:
  """Returns the dotted names of all rooms and the rooms inside them."""
  folders = sorted({path.rpartition("/")[0] for path in sources()})
  return [".".join(["dllm_jax", *f.split("/")]).rstrip(".") for f in folders]


def test_import_is_light():
  heavy = {"jax", "flax", "grain", "ml_collections", "numpy"}
  code = (
    f"import sys, {', '.join(doors())}\nprint(*{heavy} & sys.modules.keys())"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    check=True,
    cwd=ROOT,
  )
  assert done.stdout.split() == []


@pytest.mark.parametrize("door", doors())
def test_doors_open_on_what_they_name(door):
  room = importlib.import_module(door)
  assert room.__doc__
  for name in getattr(room, "__all__", ()):
    if door.endswith("harness") and not importlib.util.find_spec("lm_eval"):
      continue
    assert getattr(room, name).__doc__ or not callable(getattr(room, name))


def test_rooms_are_small():
  files = collections.Counter(path.rpartition("/")[0] for path in sources())
  del files["objectives"]  # one file a system
  assert not {room: n for room, n in files.items() if n > MAX_ROOM}


def length(function: ast.FunctionDef, lines: list[str]) -> int:
  """Returns a function's lines that hold code: no docstring, comment or space."""
  numbers = set(range(function.lineno, function.end_lineno + 1))
  if ast.get_docstring(function) is not None:
    doc = function.body[0]
    numbers -= set(range(doc.lineno, doc.end_lineno + 1))
  code = [lines[i - 1].strip() for i in numbers]
  return sum(bool(line) and not line.startswith("#") for line in code)


def test_functions_are_short():
  found = {
    f"{path}: {node.name}": length(
      node, (PACKAGE / path).read_text().split("\n")
    )
    for path, tree in sources().items()
    for node in ast.walk(tree)
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
  }
  assert found and not {k: n for k, n in found.items() if n > MAX_LINES}


def test_files_are_short():
  sizes = {p: (PACKAGE / p).read_text("utf-8").count("\n") for p in sources()}
  assert not {path: n for path, n in sizes.items() if n > MAX_FILE}


@pytest.mark.parametrize("name", ["utils.py", "helpers.py", "misc.py"])
def test_no_drawer_for_everything(name):
  assert not [path for path in sources() if path.endswith(name)]
