"""The device mesh: five named axes, all of them always there.

An axis of size 1 costs nothing, so that sharding rules and networks never ask
which axes exist. Rules are in `sharding`, multi-host start-up in `distributed`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math

import jax
from jax.experimental import mesh_utils
import numpy as np

from dllm_jax.core.axes import AXES, BATCH_AXES, CONTEXT, DATA

_FILL = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Sizes of the mesh axes; one may be -1, which takes what devices are left.

  Attributes:
    data: copies of the model, each with its own rows.
    fsdp: devices that divide rows and also parameters.
    tensor: devices that divide heads, hidden features and the vocabulary.
    context: devices that divide positions.
    expert: devices that divide rows and also experts.
  """

  data: int = _FILL
  fsdp: int = 1
  tensor: int = 1
  context: int = 1
  expert: int = 1


def make_mesh(
  sizes: Mapping[str, int] | MeshConfig = MeshConfig(),
  devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
  """Returns a mesh over the axes `core.axes.AXES`, for `jax.set_mesh`.

  Neighbouring devices go to the last axes. Where devices belong to several TPU
  slices, `data` spans the slices and everything else stays inside one; any axis
  may span servers of GPUs.

  Args:
    sizes: axis sizes by name; absent ones are 1, one may be -1.
    devices: the devices to use; None for all.

  Raises:
    ValueError: for an unknown axis or sizes that do not fit the devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  if not isinstance(sizes, Mapping):
    sizes = dataclasses.asdict(sizes)
  shape = _fill(dict(sizes), len(devices))
  types = (jax.sharding.AxisType.Auto,) * len(AXES)
  slices = {getattr(device, "slice_index", 0) for device in devices}
  if len(slices) == 1 or devices[0].platform == "gpu":
    array = _arranged(tuple(shape.values()), devices)
    return jax.sharding.Mesh(array, AXES, axis_types=types)
  if shape[DATA] % len(slices):
    raise ValueError(
      f"mesh axis data has size {shape[DATA]}, which {len(slices)} slices do"
      " not divide; give it a multiple of the number of slices"
    )
  inside = {**shape, DATA: shape[DATA] // len(slices)}
  across = {**dict.fromkeys(AXES, 1), DATA: len(slices)}
  array = mesh_utils.create_hybrid_device_mesh(
    tuple(inside.values()), tuple(across.values()), devices
  )
  return jax.sharding.Mesh(array, AXES, axis_types=types)


def _arranged(shape: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
  """Returns devices in the shape of the mesh, whole sides of a torus to an axis.

  Where that is not possible, sides are split.
  """
  try:
    return mesh_utils.create_device_mesh(shape, devices)
  except NotImplementedError:
    return mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )


def check_batches(
  mesh: jax.sharding.Mesh, sizes: Mapping[str, int], length: int
) -> None:
  """Checks that a mesh divides the rows of batches, and their positions.

  Args:
    mesh: the mesh.
    sizes: rows, by the name of the field that gives them.
    length: positions of a row.

  Raises:
    ValueError: it does not divide one of them.
  """
  rows = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  for name, size in sizes.items():
    if size % rows:
      raise ValueError(
        f"{name} = {size} is not divisible by the {rows} devices of the mesh "
        f"axes {', '.join(BATCH_AXES)}; choose a multiple of {rows}"
      )
  if length % mesh.shape[CONTEXT]:
    raise ValueError(
      f"data.length = {length} is not divisible by the {mesh.shape[CONTEXT]}"
      " devices of mesh axis context; change one of them"
    )


def _fill(sizes: dict[str, int], devices: int) -> dict[str, int]:
  """Returns the size of every axis, in order, or says what does not fit."""
  for name, size in sizes.items():
    if name not in AXES:
      raise ValueError(
        f"mesh axis {name!r} is unknown; the axes are {', '.join(AXES)}"
      )
    if size < 1 and size != _FILL:
      raise ValueError(
        f"mesh axis {name} has size {size}; give at least 1, or -1 to fill"
      )
  shape = {name: sizes.get(name, 1) for name in AXES}
  free = [name for name in AXES if shape[name] == _FILL]
  if len(free) > 1:
    raise ValueError(
      f"mesh axes {' and '.join(free)} are all -1; only one can be filled in"
    )
  known = math.prod(size for size in shape.values() if size != _FILL)
  if free and devices % known == 0:
    shape[free[0]] = devices // known
  elif known != devices or free:
    given = " x ".join(
      f"{name} {size}" for name, size in shape.items() if size != 1
    )
    raise ValueError(
      f"mesh {given or 'data 1'} does not fit {devices} devices: sizes must"
      f" multiply to {devices}; change one, or set one to -1"
    )
  return shape
