"""The notebooks' first cell makes a runtime right, or says why it cannot."""

import json
import os
import pathlib
import queue
import subprocess
import sys

from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpec
import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
OLD = "0.7.2"  # the jax of Colab's TPU image, in August 2026


def first_cell(path) -> str:
  cells = json.loads(path.read_text("utf-8"))["cells"]
  return next("".join(c["source"]) for c in cells if c["cell_type"] == "code")


CELL = first_cell(NOTEBOOKS[0])


def test_all_notebooks_begin_with_one_cell():
  assert len(NOTEBOOKS) >= 5
  assert {first_cell(path) for path in NOTEBOOKS} == {CELL}


def stopped() -> str:
  """Returns what the cell says where it stops."""
  names = {"__name__": "__main__"}
  with pytest.raises(Exception) as caught:
    exec(CELL, names)
  assert isinstance(caught.value, names["Stop"])
  [text] = caught.value._render_traceback_()  # no traceback
  return text


def test_an_old_python_is_told_what_to_choose(monkeypatch):
  class Info(tuple):
    major, minor = 3, 10

  monkeypatch.setattr(sys, "version_info", Info((3, 10, 12)))
  monkeypatch.setattr(sys, "version", "3.10.12 (main)")
  text = stopped()
  assert text.startswith("Python 3.10.12 is too old, dllm_jax needs 3.11")
  assert "Runtime > Change runtime type" in text


class _Kernel:
  """A kernel of an environment, which may go and come back."""

  def __init__(self, python, env):
    class Manager(KernelManager):
      kernel_spec = KernelSpec(
        argv=[
          *(str(python), "-m", "ipykernel_launcher"),
          *("-f", "{connection_file}"),
        ],
        display_name="Python",
        language="python",
      )

    self._make, self._env = Manager, env
    self.start()

  def start(self):
    self.manager = self._make()
    self.manager.start_kernel(env=self._env, cwd=self._env["HOME"])
    self.client = self.manager.client()
    self.client.start_channels()
    self.client.wait_for_ready(timeout=300)

  def run(self, code, seconds=1500) -> str:
    """Returns what a cell prints, its error included."""
    self.client.execute(code)
    said = []
    while True:
      try:
        message = self.client.get_iopub_msg(timeout=seconds)
      except queue.Empty:
        raise TimeoutError("".join(said)) from None
      content = message["content"]
      if message["msg_type"] == "stream":
        said.append(content["text"])
      elif message["msg_type"] == "error":
        said += content["traceback"]
      elif content.get("execution_state") == "idle":
        return "\n".join(said)


@pytest.fixture
def environment(tmp_path):
  """Returns a Python of its own and what its processes find around them."""
  home = tmp_path / "home"
  home.mkdir()
  subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
  env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH",)}
  env |= {"HOME": str(home), "DLLM_SOURCE": str(ROOT), "XLA_FLAGS": ""}
  env |= {"IPYTHONDIR": str(home), "JAX_PLATFORMS": "cpu"}
  return tmp_path / "env" / "bin" / "python", env


@pytest.mark.all
def test_an_old_jax_is_renewed_with_one_restart(environment):
  python, env = environment
  pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
  subprocess.run([*pip, f"jax=={OLD}", "ipykernel<7"], check=True)
  kernel = _Kernel(python, env)
  try:
    assert OLD in kernel.run("import jax; print(jax.__version__)")
    said = kernel.run(CELL)
    assert f"installing, since here are jax {OLD}" in said
    assert "restarting the session, which holds older jax" in said
    assert "run this cell again" in said
    kernel.manager.provisioner.process.wait(timeout=60)  # it went by itself
    kernel.start()  # as Colab and Jupyter do
    said = kernel.run(CELL)
    assert said.strip().endswith("ready"), said
    assert "installing" not in said and "restarting" not in said
    said = kernel.run(
      "import dllm_jax, jax\nfrom dllm_jax import config\n"
      "print(jax.__version__, config.load('smoke').objective.name)"
    )
    new, name = said.split()
    assert tuple(map(int, new.split(".")[:2])) >= (0, 10) and name == "mdlm"
  finally:
    kernel.manager.shutdown_kernel(now=True)


@pytest.mark.all
def test_no_network_is_told(environment):
  python, env = environment
  env |= {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}
  env |= {"PIP_NO_CACHE_DIR": "1", "PIP_CONFIG_FILE": os.devnull}
  done = subprocess.run(
    [python, "-c", CELL], env=env, capture_output=True, text=True, check=False
  )
  assert done.returncode == 1
  last = done.stderr.strip().splitlines()[-1]
  assert "dllm_jax could not be installed" in last
  assert "if this runtime has no network, in Colab choose Runtime" in last
