"""Checkpoints in buckets: what makes one complete, and S3 by way of a disk.

In a bucket nothing can be renamed: a step is complete when it holds the object
that is written last. On gs:// Orbax writes it; s3:// Orbax does not write, so
that a step is saved on the local disk and uploaded.
"""

from collections.abc import Mapping
from concurrent import futures
import tempfile
import types
from typing import Any

from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from dllm_jax.core import files
from dllm_jax.core.paths import in_bucket, Path

ALWAYS = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
"""When to save: whenever the loop asks."""

MARKER = "commit_success.txt"
"""The object that Orbax writes last, in each step of a bucket."""


def complete(directory: Path) -> list[int]:
  """Returns the steps of complete checkpoints in a directory, oldest first."""
  if not directory.exists():
    return []
  found = [path for path in directory.iterdir() if path.name.isdecimal()]
  if in_bucket(directory):
    found = [path for path in found if (path / MARKER).exists()]
  return sorted(int(path.name) for path in found)


class Staged:
  """What of Orbax's `Checkpointer` is used, for a directory on S3.

  A save is written to a temporary folder, then uploaded, the marker last; a
  checkpoint is downloaded to be read. One process only: the parts of several
  would lie on several disks.
  """

  def __init__(self, directory: Path, keep: int, keep_first: bool = False):
    """Opens a directory in which the `keep` newest checkpoints stay.

    Args:
      directory: the directory.
      keep: how many.
      keep_first: whether step 0 stays, too.
    """
    self._directory, self._keep = directory, keep
    self._always = {0} if keep_first else set()
    self._temporary = tempfile.TemporaryDirectory(prefix="dllm_")
    self._folder = Path(self._temporary.name)
    self._local = ocp.training.Checkpointer(
      self._folder, save_decision_policy=ALWAYS
    )
    self._thread = futures.ThreadPoolExecutor(1)
    self._upload: futures.Future | None = None

  @property
  def checkpoints(self) -> list[Any]:
    """The complete checkpoints, with their `step`."""
    steps = complete(self._directory)
    return [types.SimpleNamespace(step=step) for step in steps]

  def reload(self) -> None:
    """Does nothing: what is there is looked up each time."""

  def save_checkpointables_async(
    self, step: int, items: Mapping[str, Any]
  ) -> None:
    """Starts to save; returns when the device arrays have been copied."""
    self.wait()
    self._clear()
    self._local.save_checkpointables_async(step, items)
    self._upload = self._thread.submit(self._publish, step)

  def load_checkpointables(
    self, step: int, wanted: Mapping[str, PyTree]
  ) -> dict[str, Any]:
    """Returns what a checkpoint holds, as Orbax does."""
    if not (self._folder / str(step)).exists():
      self._clear()
      files.download(self._directory / str(step), self._folder / str(step))
      self._local.reload()
    return self._local.load_checkpointables(step, wanted)

  def wait(self) -> None:
    """Waits until what was started is in the bucket."""
    upload, self._upload = self._upload, None
    if upload is not None:
      upload.result()

  def close(self) -> None:
    """Waits and releases the writers and the disk."""
    try:
      self.wait()
    finally:
      self._local.close()
      self._thread.shutdown()
      self._temporary.cleanup()

  def _publish(self, step: int) -> None:
    self._local.wait()
    source, target = self._folder / str(step), self._directory / str(step)
    # Orbax has written it here, too; it must not travel with the others.
    (source / MARKER).unlink(missing_ok=True)
    files.remove_folder(target, MARKER)
    files.upload(source, target)
    (target / MARKER).write_text("complete\n")
    for old in complete(self._directory)[: -self._keep]:
      if old not in self._always:
        files.remove_folder(self._directory / str(old), MARKER)

  def _clear(self) -> None:
    """Empties the disk of the step that was read or saved before."""
    for step in complete(self._folder):
      (self._folder / str(step)).rmtree()
    self._local.reload()
