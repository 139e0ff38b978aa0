"""The published samplers by name, with their defaults."""

from collections.abc import Callable, Mapping
import dataclasses
import re
from typing import Any

from dllm_jax.core.images import ImageVocabulary
from dllm_jax.core.types import Objective
from dllm_jax.sampling.policies.ancestral import Ancestral
from dllm_jax.sampling.policies.policy import Policy
from dllm_jax.sampling.policies.remasking import (
  Cap,
  Conf,
  FlowCorrector,
  ForwardBackward,
  Loop,
  ReMDM,
  Rescale,
)
from dllm_jax.sampling.policies.renoising import Psi, Renoise
from dllm_jax.sampling.policies.revision import Edit, MaskPredict
from dllm_jax.sampling.policies.selection import (
  Chance,
  CosinePlan,
  EntropyBound,
  Even,
  Everything,
  Factor,
  Proportional,
  Threshold,
  Truncated,
)
from dllm_jax.sampling.policies.speculation import Speculation
from dllm_jax.sampling.policies.unmasking import FirstHitting, Unmasking
from dllm_jax.sampling.policies.windows.indel import InDel
from dllm_jax.sampling.policies.windows.parts import Sliding, SubBlocks
from dllm_jax.sampling.policies.windows.resizing import Resizing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
  """A published sampler.

  Attributes:
    policy: builds the policy.
    fields: its own fields of the policy.
    temperature: divides the logits; 0 takes the best token.
    top_p: the nucleus.
    steps: network calls for each block; 0 for one a slot.
    block_length: slots sampled together; 0 for the whole canvas.
    cache: what is kept between calls.
    sharpens: whether confidence is read after temperature, top-k and top-p.
    stops: whether a row stops at its end of text.
    fills: whether padding stands behind what ends a row, and not that end again.
    capped: whether more steps than slots make no sense.
    draws: whether it is of pictures: of image tokens alone, guided by a prompt
      that is empty.
  """

  policy: Callable[..., Policy]
  fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  temperature: float = 1.0
  top_p: float = 1.0
  steps: int = 0
  block_length: int = 0
  cache: str = "none"
  sharpens: bool = False
  stops: bool = False
  fills: bool = False
  capped: bool = True
  draws: bool = False


def _unmasking(**fields: Any) -> Mapping[str, Any]:
  return {"policy": Unmasking, "temperature": 0.0, "fields": fields}


def _remdm(rule: Any, top_p: float = 0.9) -> Preset:
  return Preset(policy=ReMDM, fields={"rule": rule}, top_p=top_p, capped=False)


_QUOTA = Even(of="window")
PRESETS: dict[str, Preset] = {
  # The process's own law.
  "mdlm": Preset(policy=Ancestral),
  "md4": Preset(policy=Ancestral, fields={"spacing": "cosine"}),
  "uniform_grid": Preset(policy=Ancestral, fields={"spacing": "uniform"}),
  "sedd": Preset(policy=Ancestral, capped=False),
  "udlm": Preset(policy=Ancestral, capped=False),
  "duo": Preset(policy=Ancestral, capped=False),
  "psi": Preset(policy=Psi, fields={"kappa": 0.95}, capped=False),
  "autoregressive": Preset(policy=Ancestral, cache="block", stops=True),
  "bd3lm": Preset(policy=FirstHitting, top_p=0.9, cache="block", stops=True),
  # Masks that come back.
  "remdm": _remdm(Cap(eta=0.04)),
  "remdm_rescale": _remdm(Rescale(eta=0.04)),
  "remdm_conf": _remdm(Conf()),
  "remdm_loop": _remdm(Loop(eta=0.02)),
  "forward_backward": _remdm(ForwardBackward()),
  "dfm": _remdm(FlowCorrector()),
  "mask_predict": Preset(
    **_unmasking(selection=Everything(), revision=MaskPredict()), steps=10
  ),
  # By confidence.
  "llada": Preset(**_unmasking()),
  "llada_random": Preset(**_unmasking(score="random")),
  "dllm": Preset(**_unmasking(selection=Proportional())),
  "dream": Preset(
    policy=Unmasking,
    fields={"score": "entropy", "selection": Truncated()},
    temperature=0.2,
    top_p=0.95,
    sharpens=True,
  ),
  "dream_margin": Preset(
    **_unmasking(score="margin", selection=Truncated()), sharpens=True
  ),
  "dream_origin": Preset(
    **_unmasking(score="random", selection=Chance()), sharpens=True
  ),
  "dreamon": Preset(
    policy=Resizing, temperature=0.2, top_p=0.9, sharpens=True, capped=False
  ),
  "maskgit_plus": Preset(**_unmasking(selection=Truncated()), sharpens=True),
  "maskgit": Preset(
    policy=Unmasking,
    fields={
      "selection": CosinePlan(),
      "noise_temperature": 4.5,
      "falling": "masked",
    },
    steps=12,
  ),
  "mmada": Preset(
    policy=Unmasking,
    fields={
      "selection": CosinePlan(waits=True),
      "noise_temperature": 1.0,
      "falling": "compounding",
    },
    steps=15,
    draws=True,
  ),
  "fast_dllm": Preset(
    **_unmasking(selection=Threshold(value=0.9)), block_length=32, cache="dual"
  ),
  "fast_dllm_factor": Preset(
    **_unmasking(selection=Factor(value=1.0)), block_length=32, cache="dual"
  ),
  "entropy_bound": Preset(
    **_unmasking(score="entropy", selection=EntropyBound(value=0.1))
  ),
  "sdar": Preset(
    policy=Unmasking,
    fields={"selection": Threshold(value=0.85, least=_QUOTA)},
    cache="block",
    sharpens=True,
    stops=True,
  ),
  "llada2": Preset(
    **_unmasking(selection=Threshold(value=0.95, least=_QUOTA)),
    cache="block",
    stops=True,
  ),
  "llada2_edit": Preset(
    **_unmasking(
      selection=Threshold(value=0.95, least=_QUOTA), revision=Edit()
    ),
    cache="block",
    stops=True,
  ),
  "llada2_1": Preset(
    **_unmasking(
      selection=Threshold(value=0.7), revision=Edit(threshold=0.5, always=True)
    ),
    cache="block",
    stops=True,
  ),
  "llada2_1_speed": Preset(
    **_unmasking(selection=Threshold(value=0.5)), cache="block", stops=True
  ),
  "llada2_2": Preset(policy=InDel, temperature=0.0, cache="block", stops=True),
  "dream_reasoner": Preset(
    **_unmasking(selection=Threshold(value=0.95)), cache="block", stops=True
  ),
  "fast_dllm_v2": Preset(
    **_unmasking(selection=SubBlocks(width=8, rule=Threshold(value=0.9))),
    cache="block",
    stops=True,
  ),
  "fast_dllm_v2_cached": Preset(
    **_unmasking(
      selection=SubBlocks(width=8, rule=Threshold(value=0.9), cached=True)
    ),
    cache="block",
    stops=True,
  ),
  "wedlm": Preset(
    policy=Unmasking,
    fields={"score": "entropy", "selection": Sliding()},
    temperature=0.2,
    stops=True,
  ),
  "idlm": Preset(policy=Speculation, cache="block", stops=True),
  "idlm_quadratic": Preset(
    policy=Speculation,
    fields={"source": "quadratic"},
    cache="block",
    stops=True,
  ),
  "idlm_published": Preset(
    policy=Speculation,
    fields={"rule": "published"},
    cache="block",
    stops=True,
  ),
  "nemotron_speculative": Preset(
    policy=Speculation,
    fields={"source": "block", "rule": "best"},
    temperature=0.0,
    cache="block",
    stops=True,
  ),
  "nemotron": Preset(**_unmasking(), cache="block", stops=True),
  "diffusion_gemma": Preset(
    policy=Renoise, steps=48, stops=True, fills=True, capped=False
  ),
}

OWNERS: dict[str, tuple[type, ...]] = {
  "threshold": (Unmasking,),
  "factor": (Unmasking,),
  "entropy_bound": (Unmasking, Renoise),
  "score_temperature": (Unmasking,),
  "doubted": (Unmasking,),
  "doubt_end": (Unmasking,),
  "eta": (ReMDM,),
  "kappa": (Psi,),
  "hot": (Renoise,),
  "cold": (Renoise,),
  "rest": (Renoise,),
  "stable": (Renoise,),
  "start": (Resizing,),
}
"""Policies that fields of a sampler mean something to, by field."""


IDS = ("banned", "forced", "doubted")
"""Fields that are token ids."""
OF_TOKENS = (
  "banned",
  "forced",
  "suppress_end",
  "top_k",
  "top_p",
  "min_p",
  "repetition_penalty",
  "cfg_scale",
)
RULES = ("threshold", "factor", "entropy_bound")
"""Fields that are rules of what is revealed, of which one holds."""


def check_owner(name: str, preset: str) -> None:
  """Raises ValueError unless a field means something to a preset."""

  def has(candidate: Preset) -> bool:
    if candidate.policy not in OWNERS[name]:
      return False
    if name in ("doubted", "doubt_end"):  # Chance asks for no score.
      return not isinstance(candidate.fields.get("selection"), Chance)
    return name != "eta" or hasattr(candidate.fields["rule"], "eta")

  if not has(PRESETS[preset]):
    legal = ", ".join(key for key, value in PRESETS.items() if has(value))
    raise ValueError(
      f"sampler.{name} means nothing to sampler.preset {preset!r}; legal: {legal}"
    )


def images_of(preset: str, objective: Objective) -> ImageVocabulary:
  """Returns the image tokens of an objective.

  Raises:
    ValueError: it has none.
  """
  images = getattr(objective, "images", None)
  if images is None:
    raise ValueError(
      f"sampler.preset {preset!r} draws pictures, and the model's tokens are of"
      " text alone: take another preset, or a model with images"
      " (configs/digits_mmada.py, MMaDA)"
    )
  return images


def token_ids(name: str, text: str) -> tuple[int, ...]:
  """Returns the ids that a field of a sampler lists.

  Raises:
    ValueError: it lists something else.
  """
  try:
    return tuple(int(part) for part in re.split(r"[,;+\s]+", text) if part)
  except ValueError:
    raise ValueError(
      f"sampler.{name} must be token ids separated by commas, or by +, not"
      f" {text!r}"
    ) from None
