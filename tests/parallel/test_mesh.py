"""Meshes: what fits, what does not, several slices."""

import dataclasses

import jax
import pytest

from dllm_jax.core.axes import AXES, constrain
from dllm_jax.parallel import make_mesh, mesh, MeshConfig


@pytest.mark.parametrize("sizes, shape", [
    ({}, None),
    (MeshConfig(), (8, 1, 1, 1, 1)),
    ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2, 1, 1)),
    ({"fsdp": -1, "context": 2}, (1, 4, 1, 2, 1)),
    (MeshConfig(data=1, expert=8), (1, 1, 1, 1, 8)),
], ids=str)  # fmt: skip
def test_sizes(sizes, shape):
  if shape is None:
    with pytest.raises(ValueError, match="mesh data 1 does not fit 8 devices"):
      make_mesh(sizes)
    return
  made = make_mesh(sizes)
  assert made.axis_names == AXES
  assert made.devices.shape == shape
  assert set(made.axis_types) == {jax.sharding.AxisType.Auto}


def test_some_devices_only():
  made = make_mesh({"tensor": -1}, jax.devices()[:2])
  assert made.devices.size == 2


@pytest.mark.parametrize("sizes, message", [
    ({"model": 2}, "mesh axis 'model' is unknown; the axes are data, fsdp"),
    ({"data": 3}, "mesh data 3 does not fit 8 devices"),
    ({"data": -1, "tensor": 3}, "mesh data -1 x tensor 3 does not fit 8"),
    ({"data": -1, "fsdp": -1}, "axes data and fsdp are all -1"),
    ({"data": 0}, "mesh axis data has size 0"),
], ids=str)  # fmt: skip
def test_bad_sizes(sizes, message):
  with pytest.raises(ValueError, match=message):
    make_mesh(sizes)


def test_data_spans_the_slices(monkeypatch):
  @dataclasses.dataclass(frozen=True)
  class Device:
    id: int
    slice_index: int
    process_index: int = 0
    device_kind: str = "none"
    platform: str = "cpu"

  devices = [Device(i, i // 4) for i in range(8)]
  monkeypatch.setattr(
    jax.sharding, "Mesh", lambda array, names, axis_types: array
  )
  array = mesh.make_mesh({"data": 4, "fsdp": 2}, devices)
  assert array.shape == (4, 2, 1, 1, 1)
  for row, of_slice in enumerate((0, 0, 1, 1)):
    assert {d.slice_index for d in array[row].flat} == {of_slice}
  with pytest.raises(ValueError, match="which 2 slices do not divide"):
    mesh.make_mesh({"fsdp": 8}, devices)


def test_constrain_without_and_with_a_mesh():
  x = jax.numpy.ones((4, 6))
  assert constrain(x, "data", None) is x
  with jax.set_mesh(make_mesh({"data": 4, "fsdp": 2})):
    place = jax.jit(lambda x: constrain(x, ("data", "nowhere"), "data"))
    assert place(x).sharding.spec == jax.P("data")
