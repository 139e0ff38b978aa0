"""What the pages say of the code is there: lines, messages, systems, findings."""

import ast
import functools
import re
import sys

import pytest

from dllm_jax.core import Causal
from dllm_jax.evaluation.likelihood import estimators
from dllm_jax.objectives import objective_class, objectives, TokenSpace
from dllm_jax.sampling import SamplerConfig
from dllm_jax.sampling.catalogue import PRESETS
from tests.docs import blocks

sys.path.insert(0, str(blocks.ROOT / "docs" / "site"))
import hooks  # noqa: E402

SYSTEMS = blocks.ROOT / "docs" / "systems"
LINES = [
  (page, found[1], (page.parent / found[2]).resolve())
  for page in blocks.PAGES
  for found in hooks.LINK.finditer(hooks.FENCE.sub("", page.read_text("utf-8")))
  if found[2].endswith(".py")
]


def test_linked_lines_of_code_stand_once_in_their_files():
  shown = [line for line in LINES if hooks.is_code(line[1], line[2])]
  assert len(shown) > 60
  assert not [
    (page.name, code)
    for page, code, path in shown
    if hooks.line(path, code.strip("`")) is None
  ]


def test_a_line_that_is_gone_is_found(tmp_path):
  file = tmp_path / "a.py"
  file.write_text("x = 1\ny = (\n  2 +\n  3)\nx = 1\n")
  assert hooks.line(file, "y = (2 + 3)") == 2
  assert hooks.line(file, "y = 2") is None
  assert hooks.line(file, "x = 1") is None  # which of the two?


@pytest.mark.parametrize("name", sorted(objectives()))
def test_every_objective_has_a_page_with_its_formula_and_lines(name):
  text = (SYSTEMS / f"{name}.md").read_text("utf-8")
  assert "$$" in text and f"objective.name={name}" in text
  assert f"objectives/{name}.py)" in text
  assert f"]({name}.md)" in (SYSTEMS / "README.md").read_text("utf-8")


def is_built(objective, **fields) -> bool:
  """Whether a sampler goes with an objective."""
  try:
    SamplerConfig(**fields).build(objective, length=256)
  except (TypeError, ValueError):
    return False
  return True


def abilities(name: str) -> list[str]:
  """Returns a system's row of the table of abilities, but for its name."""
  space = TokenSpace(vocab_size=12, mask_id=11, length=256, eos_id=1)
  objective = objective_class(name).over(space)
  goes = lambda preset: is_built(objective, preset=preset)
  one_by_one = isinstance(objective.mask_spec, Causal)  # nothing to choose from
  able = [
    goes("mdlm"),
    goes("llada") and not one_by_one,
    goes("remdm"),
    goes("psi") or goes("diffusion_gemma"),
  ]
  able = ["yes" if does else "" for does in able]
  own = "diffusion_gemma" if objective.two_passes else "mdlm"
  cached = SamplerConfig(preset=own).build(objective, length=256).cache
  dual = is_built(objective, preset="llada", block_length=8, cache="dual")
  cache = "exact" if cached == "block" else "approximate" if dual else ""
  likelihood = estimators.choose(objective, "auto")
  try:
    estimators.choose(objective, "left")
  except ValueError:
    return [*able, cache, likelihood]
  return [*able, cache, f"{likelihood}, orders"]


@pytest.mark.parametrize("name", sorted(objectives()))
def test_what_each_system_can_do_is_what_its_row_says(name):
  text = (SYSTEMS / "README.md").read_text("utf-8")
  _, rows = text.split("| system | law |")
  [row] = re.findall(
    rf"^\| \[[^\]]*\]\({name}\.md\) \|(.*)\|$", rows, re.MULTILINE
  )
  assert [cell.strip() for cell in row.split("|")] == abilities(name)


def test_presets_that_the_pages_name_are_there():
  text = (SYSTEMS / "samplers.md").read_text("utf-8")
  assert {"llada", "dream", "maskgit", "fast_dllm", "remdm"} <= PRESETS.keys()
  rules = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
  assert rules and set(rules) <= PRESETS.keys()


@functools.cache
def messages() -> list[str]:
  """Returns every text of the package's code, with … for what is filled in."""
  found = []
  for path in sorted((blocks.ROOT / "dllm_jax").rglob("*.py")):
    tree = ast.parse(path.read_text("utf-8"))
    found += [_text(node) for node in ast.walk(tree)]
  return [text for text in found if text]


def _text(node) -> str:
  if isinstance(node, ast.Constant):
    return node.value if isinstance(node.value, str) else "…"
  if isinstance(node, ast.JoinedStr):
    return "".join(_text(part) for part in node.values)
  if isinstance(node, ast.FormattedValue):
    return "…"
  if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
    return _text(node.left) + _text(node.right)
  return ""


HEADINGS = re.findall(
  r"^### `(.+)`$",
  (blocks.ROOT / "docs" / "troubleshooting.md").read_text("utf-8"),
  re.MULTILINE,
)
OTHERS = {"RESOURCE_EXHAUSTED: Out of memory"}  # jax's own


def is_said(heading: str) -> bool:
  """Whether one message of the code has all parts of a heading, in order."""
  parts = [part for part in heading.split("…") if part.strip(" ,:;()[]")]
  pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
  return any(pattern.search(text) for text in messages())


@pytest.mark.parametrize("heading", sorted(set(HEADINGS) - OTHERS))
def test_messages_are_those_of_the_code(heading):
  assert is_said(heading)


def test_a_message_that_is_not_said_is_found():
  assert len(HEADINGS) > 25
  assert not is_said("mesh … does not match … devices")


@pytest.mark.parametrize(
  "path", sorted((blocks.ROOT / "findings").glob("*.sh")), ids=lambda p: p.stem
)
def test_findings_say_what_was_seen(path):
  title, body = hooks.head(path)
  assert title and "Seen" in body
  assert title in hooks.findings()
