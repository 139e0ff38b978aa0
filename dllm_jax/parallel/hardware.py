"""Published peaks of accelerators, for utilisation figures."""

# Dense bfloat16 matrix products, FLOP/s a device, by jax's device_kind; vendors'
# data sheets. Nothing is claimed for devices that are not here.
_PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU7x": 2307e12,
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
  "NVIDIA B200": 2250e12,
}


def peak_flops(device_kind: str) -> float | None:
  """Returns the peak bfloat16 FLOP/s of a device; None if it is not known.

  The longest known name that begins `device_kind` counts: "NVIDIA H100 80GB HBM3"
  is an H100.
  """
  known = [k for k in _PEAK_FLOPS if device_kind.startswith(k)]
  return _PEAK_FLOPS[max(known, key=len)] if known else None
