"""Low-rank adapters, multiplied out into the matrices that they change."""

from typing import Any

from jaxtyping import PyTree


def merge_adapters(params: PyTree, config: Any) -> PyTree:
  """Returns parameters without adapters, W + (alpha / rank) A B for each W.

  Args:
    params: the network's parameters, with adapters or without.
    config: the network's config, whose `lora_alpha` and `lora_rank` are read.
  """
  if not isinstance(params, dict):
    return params
  merged = {
    name: merge_adapters(value, config)
    for name, value in params.items()
    if name not in ("lora_a", "lora_b")
  }
  if "lora_a" in params:
    kernel = params["kernel"]
    change = params["lora_a"].astype("float32") @ params["lora_b"].astype(
      "float32"
    )
    change *= config.lora_alpha / config.lora_rank
    merged["kernel"] = (
      kernel.astype("float32") + change.reshape(kernel.shape)
    ).astype(kernel.dtype)
  return merged
