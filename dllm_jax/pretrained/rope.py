"""What rotates in a published network: `rope_parameters` and its forerunners."""

from collections.abc import Collection
import math
from typing import Any

from dllm_jax.models import rotary
from dllm_jax.pretrained.fields import Fields


def rotation(
  f: Fields,
  head_dim: int,
  *,
  theta: float = 10_000.0,
  kinds: Collection[str] = (),
) -> dict[str, Any]:
  """Returns what rotates: how much of a head, by which wavelengths.

  Args:
    f: the fields.
    head_dim: the features of a head.
    theta: the longest wavelength where nothing says it.
    kinds: the legal kinds of scaling; empty for all that we have.
  """
  kinds = kinds or tuple(_SCALINGS)
  name, r = _rope_section(f)
  theta = _agreed(f, r, name, "rope_theta", theta)
  share = _agreed(f, r, name, "partial_rotary_factor", 1.0)
  kind = r.get("rope_type", "type", default="default")
  if kind not in kinds:
    raise ValueError(
      f"{f.path}: {name} of type {kind!r} is not supported; legal:"
      f" {', '.join(kinds)}"
    )
  scaling = _SCALINGS[kind](f, r)
  r.no_others(*_UNUSED_OF_ROPE, what=f"{name} of type {kind!r}")
  return {
    "rotary_dim": int(head_dim * share),
    "rope_theta": theta,
    "rope_scaling": scaling,
  }


_LAYER_KINDS = (
  "full_attention",
  "sliding_attention",
  "chunked_attention",
  "linear_attention",
)


def _rope_section(f: Fields) -> tuple[str, Fields]:
  """Returns the fields of what rotates, and what they are called.

  Newer configs have it all under `rope_parameters`, some once for each kind of
  layer, of which only those of full attention are there.
  """
  older, newer = f.mapping("rope_scaling"), f.mapping("rope_parameters")
  if "full_attention" in newer and set(newer) <= set(_LAYER_KINDS):
    newer = Fields(newer, f.path).mapping("full_attention")
  for key in set(older) & set(newer):
    if older[key] != newer[key]:
      raise ValueError(
        f"{f.path}: {key} is {older[key]!r} in rope_scaling, but"
        f" {newer[key]!r} in rope_parameters; remove the wrong one"
      )
  name = "rope_scaling" if older else "rope_parameters"
  return name, Fields({**newer, **older}, f.path)


def _agreed(f: Fields, r: Fields, name: str, key: str, default: float) -> float:
  """Returns a number that stands in the config, in a section of it, or both."""
  inner = r.number(key, default) if r.get(key) is not None else None
  outer = f.number(key, default) if f.get(key) is not None else None
  if None not in (inner, outer) and inner != outer:
    raise ValueError(
      f"{f.path}: {key} is {outer}, but {inner} in {name}; remove the wrong one"
    )
  given = inner if inner is not None else outer
  return default if given is None else given


# Numbers of one kind of scaling, which others leave in a file.
_UNUSED_OF_ROPE = (
  "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
  "mscale", "mscale_all_dim", "original_max_position_embeddings", "finetuned",
  "max_position_embeddings",
)  # fmt: skip


def _llama3(f: Fields, r: Fields) -> rotary.Llama3:
  return rotary.Llama3(
    factor=r.number("factor"),
    first_length=r.integer("original_max_position_embeddings"),
    low=r.number("low_freq_factor"),
    high=r.number("high_freq_factor"),
  )


def _yarn(f: Fields, r: Fields) -> rotary.Yarn:
  factor = r.number("factor")
  scale = r.get("attention_factor")
  if scale is None and r.get("mscale") and r.get("mscale_all_dim"):
    log = max(math.log(factor), 0.0) if factor > 0 else 0.0
    grown = lambda name: 0.1 * r.number(name) * log + 1.0
    scale = grown("mscale") / grown("mscale_all_dim")
  first = r.get("original_max_position_embeddings")
  return rotary.Yarn(
    factor=factor,
    first_length=first or f.integer("max_position_embeddings"),
    low=r.number("beta_slow", 1.0),
    high=r.number("beta_fast", 32.0),
    whole=r.flag("truncate", True),
    scale=scale,
    query_growth=r.number("llama_4_scaling_beta", 0.0),
  )


_SCALINGS = {
  "default": lambda f, r: rotary.Unscaled(),
  "linear": lambda f, r: rotary.Linear(factor=r.number("factor")),
  "llama3": _llama3,
  "yarn": _yarn,
}
