"""Machines that are not here: which exist, and what their wires take."""

import importlib.util
from types import SimpleNamespace

import pytest

from dllm_jax.parallel import topology
from dllm_jax.parallel.hardware import CHIPS, peak_flops
from dllm_jax.parallel.topology import Machine, machine

LINK, NETWORK = CHIPS["v5p"].link_rate, CHIPS["v5p"].network_rate


def torus(*sides, slices=1):
  devices = [
    SimpleNamespace(coords=(x, y, z), slice_index=s)
    for s in range(slices)
    for x in range(sides[0])
    for y in range(sides[1])
    for z in range(sides[2])
  ]
  closed = (all(side % 4 == 0 for side in sides),) * 3
  return Machine(
    name="test",
    chip=CHIPS["v5p"],
    devices=tuple(devices),
    grid=sides,
    wrapped=closed,
  )


def line(machine, **fixed):
  place = {"x": 0, "y": 1, "z": 2}
  return [
    d
    for d in machine.devices
    if all(d.coords[place[k]] == v for k, v in fixed.items())
  ]


@pytest.mark.parametrize(
  "name",
  ["v5p:3x3x3", "v5p:4x8x4", "v5p:4x4", "v6e:4x4x4", "v6e:3x3", "v9:2x2",
   "h200:8x9", "h200:0x8", "h200:8", "h200", "v5p:axbxc", ""],
)  # fmt: skip
def test_what_does_not_exist_lists_what_does(name):
  with pytest.raises(ValueError, match=r"there is no topology .* v5p.*h200"):
    machine(name)


def test_slices_are_of_tpus():
  with pytest.raises(ValueError, match="h200:16x8"):
    machine("h200:8x8", slices=2)


@pytest.mark.parametrize(
  "name, wheel", [("v5p:4x4x4", "libtpu"), ("h200:1x8", "cuda")]
)
def test_a_missing_wheel_names_the_extra(name, wheel, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ModuleNotFoundError, match=rf"{wheel}.*dllm_jax\[plan\]"):
    machine(name)


def test_a_closed_ring_gives_two_links_and_each_side_its_own():
  m = torus(4, 4, 8)
  size = 1e9
  along_z = line(m, x=0, y=0)
  expected = size * 7 / 8 / (2 * LINK)
  assert m.seconds("all-gather", size, along_z) == pytest.approx(expected)
  assert m.seconds("all-reduce", size, along_z) == pytest.approx(2 * expected)
  plane = line(m, x=0)
  expected = size * 31 / 32 / (4 * LINK)
  assert m.seconds("reduce-scatter", size, plane) == pytest.approx(expected)
  half = along_z[:4]  # an open line: one link
  expected = size * 3 / 4 / LINK
  assert m.seconds("all-gather", size, half) == pytest.approx(expected)
  pair = along_z[:2]
  assert m.seconds("collective-permute", size, pair) == size / LINK


def test_small_slices_are_not_closed():
  m = torus(2, 2, 1)
  expected = 1e9 * 1 / 2 / LINK
  group = line(m, y=0)
  assert m.seconds("all-gather", 1e9, group) == pytest.approx(expected)


def test_slices_meet_on_the_network():
  m = torus(4, 4, 4, slices=2)
  # 4 chips of each slice send their share: half of everything crosses.
  group = [d for d in m.devices if d.coords[:2] == (0, 0)]
  expected = 1e9 * 1 / 2 / (4 * NETWORK)
  assert m.seconds("all-gather", 1e9, group) == pytest.approx(expected)
  # All of them have more network than the torus has links.
  expected = 1e9 * 63 / 64 / (6 * LINK)
  assert m.seconds("all-gather", 1e9, m.devices) == pytest.approx(expected)
  pair = [m.devices[0], m.devices[64]]
  expected = 2 * 1e9 / 2 / NETWORK
  assert m.seconds("all-reduce", 1e9, pair) == pytest.approx(expected)


def test_servers_share_a_switch_inside_and_network_cards_outside():
  chip = CHIPS["h200"]
  devices = tuple(SimpleNamespace(process_index=i // 8) for i in range(64))
  m = Machine(name="h200:8x8", chip=chip, devices=devices)
  inside = 1e9 * 7 / 8 / chip.link_rate
  assert m.seconds("all-gather", 1e9, devices[:8]) == pytest.approx(inside)
  across = 1e9 * 7 / 8 / (8 * chip.network_rate)
  assert m.seconds("all-gather", 1e9, devices) == pytest.approx(across)
  alone = 1e9 * 7 / 8 / chip.network_rate
  assert m.seconds("all-gather", 1e9, devices[::8]) == pytest.approx(alone)


@pytest.mark.parametrize(
  "kind, teraflops",
  [
    ("TPU v5 lite", 197),
    ("TPU v5p", 459),
    ("TPU v5", 459),
    ("TPU v6 lite", 918),
    ("TPU7x", 2307 / 2),  # two devices a chip
    ("TPU v4", 275),
    ("NVIDIA H100 80GB HBM3", 989),
    ("NVIDIA H200", 989),
  ],
)
def test_peaks_by_device_kind(kind, teraflops):
  assert peak_flops(kind) == pytest.approx(teraflops * 1e12)


def test_no_peak_is_claimed_for_others():
  assert peak_flops("cpu") is None


@pytest.mark.all
@pytest.mark.parametrize(
  "name, slices, devices, islands, kind",
  [
    ("v5e:1x1", 1, 1, 1, "TPU v5 lite"),
    ("v5p:4x4x8", 1, 128, 1, "TPU v5"),
    ("v6e:16x16", 2, 512, 2, "TPU v6 lite"),
    ("tpu7x:2x2x1", 1, 8, 1, "TPU7x"),
    ("h200:8x8", 1, 64, 8, "NVIDIA H200"),
    ("b200:2x8", 1, 16, 2, "NVIDIA B200"),
  ],
)
def test_devices_of_real_topologies(name, slices, devices, islands, kind):
  try:
    found = machine(name, slices=slices)
  except ModuleNotFoundError as error:
    pytest.skip(str(error))
  assert len(found.devices) == devices
  assert found.devices[0].device_kind == kind
  assert len({found.island(d) for d in found.devices}) == islands


def test_every_chip_has_a_form():
  assert set(topology._NVIDIA) | {"v5e", "v5p", "v6e", "tpu7x"} == set(CHIPS)
