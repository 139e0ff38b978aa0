"""The notebooks run from the first cell to the last, at smoke size."""

import os
import pathlib
import sys

from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_BYTES = 300_000


class _ThisInterpreter(AsyncKernelManager):
  """Starts kernels of the running interpreter; none needs to be registered."""

  @property
  def kernel_spec(self):
    command = [sys.executable, "-m", "ipykernel_launcher"]
    return KernelSpec(
      argv=[*command, "-f", "{connection_file}"],
      display_name="Python",
      language="python",
    )


def test_there_are_notebooks():
  assert {path.stem for path in NOTEBOOKS} >= {
    "finetune",
    "from_the_ground_up",
    "objectives_compared",
    "pretrain_on_tpu",
    "quickstart",
    "reinforce",
    "text_and_images",
  }


def said(path) -> str:
  """Returns what a notebook's cells print, as it is stored."""
  cells = nbformat.read(path, as_version=4).cells
  outputs = [o for cell in cells for o in cell.get("outputs", [])]
  return "".join(o.text for o in outputs if o.output_type == "stream")


@pytest.mark.parametrize(
  "number",
  [
    "98% of the step is reading",  # 14 GB at 2 TB/s
    "0.0441 for keep, mask, keep, mask",  # t = 0.3
    "0.367 nats per token",  # t = 0.5
    "5 times faster",  # 500 tokens: 25 calls of 20 ms, 500 steps of 5 ms
  ],
)
def test_the_course_computes_its_numbers(number):
  [course] = [p for p in NOTEBOOKS if p.stem == "from_the_ground_up"]
  assert number in said(course)


@pytest.mark.all  # by .ci/run at every change
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch):
  search = [str(ROOT), os.environ.get("PYTHONPATH", "")]
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, search)))
  monkeypatch.setenv("DLLM_SMOKE", "1")
  monkeypatch.setenv("XLA_FLAGS", "")  # one device, as on a laptop
  monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
  monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
  notebook = nbformat.read(path, as_version=4)
  (tmp_path / "work").mkdir()
  nbclient.NotebookClient(
    notebook,
    kernel_manager_class=_ThisInterpreter,  # its own, so that it ends the kernel
    timeout=300,  # seconds for one cell
    resources={"metadata": {"path": str(tmp_path / "work")}},
  ).execute()  # raises with the cell and its traceback
  figures = [
    output
    for cell in notebook.cells
    for output in cell.get("outputs", [])
    if {"image/png", "image/svg+xml"} & output.get("data", {}).keys()
  ]
  assert figures


@pytest.mark.all  # by .ci/run at every change
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_small_and_clean(path):
  assert path.stat().st_size < MAX_BYTES
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
  assert not [o for o in outputs if o.output_type == "error"]
