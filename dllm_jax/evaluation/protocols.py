"""How a harness's requests are answered: published settings by name."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from dllm_jax.sampling.presets import SamplerConfig

STRATA = 16
"""Samples of a mini-batch, spread evenly (arXiv:2502.09992, app. B.5)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
  """How requests are answered.

  Attributes:
    estimator: of likelihoods, as in `dllm evaluate --task=likelihood`.
    mc_num: samples of a likelihood, in mini-batches of at most 16 spread evenly.
    overlap: tokens before a window of a long document that it is given.
    greedy: whether to say if a continuation is what the sampler would write
      with temperature 0 (`is_greedy`, which `acc` of LAMBADA reads): one
      generation for each request.
    max_gen_toks: tokens to write where a task does not say.
    sampler: the preset; "" for the run's own.
    fields: fields of the sampler, over the preset's.
  """

  estimator: str = "auto"
  mc_num: int = 128
  overlap: int = 0
  greedy: bool = False
  cfg_scale: float = 0.0
  max_gen_toks: int = 256
  sampler: str = ""
  fields: tuple[tuple[str, Any], ...] = ()

  def __post_init__(self):
    if self.mc_num < 1 or (self.mc_num > STRATA and self.mc_num % STRATA):
      raise ValueError(
        f"mc_num must lie in [1, {STRATA}] or be a multiple of {STRATA}, not "
        f"{self.mc_num}"
      )
    if self.max_gen_toks < 1:
      raise ValueError(
        f"max_gen_toks must be at least 1, not {self.max_gen_toks}"
      )


def _fields(**fields: Any) -> tuple[tuple[str, Any], ...]:
  return tuple(sorted(fields.items()))


PROTOCOLS = {
  "default": Protocol(),
  # arXiv:2502.09992, app. B.5: 128 samples by exact counts; answers of 1024
  # tokens in as many steps, one block, the surest token first.
  "llada": Protocol(
    estimator="counts",
    max_gen_toks=1024,
    sampler="llada",
    fields=_fields(temperature=0.0),
  ),
  # The same where every answer is one token (MMLU, CMMLU, C-Eval).
  "llada_single": Protocol(estimator="counts", mc_num=1, sampler="llada"),
  # GSM8K of LLaDA-8B-Instruct: blocks of 8 from left to right.
  "llada_blocks": Protocol(
    estimator="counts",
    max_gen_toks=256,
    sampler="llada",
    fields=_fields(temperature=0.0, block_length=8),
  ),
  # Dream-7B: 128 samples by evenly spread times; 256 tokens in as many steps,
  # the least entropy first.
  "dream": Protocol(
    estimator="times",
    max_gen_toks=256,
    sampler="dream",
    fields=_fields(temperature=0.0, top_p=0.95),
  ),
}


def named(name: str, fields: Mapping[str, Any]) -> Protocol:
  """Returns a named protocol with some fields replaced.

  Raises:
    ValueError: the name or a field is unknown.
  """
  if name not in PROTOCOLS:
    raise ValueError(
      f"unknown protocol {name!r}; legal: {', '.join(PROTOCOLS)}"
    )
  own = {f.name for f in dataclasses.fields(Protocol)} - {"fields"}
  sampler = {f.name for f in dataclasses.fields(SamplerConfig)} - {"preset"}
  unknown = [k for k in fields if k not in own | sampler]
  if unknown:
    raise ValueError(
      f"unknown --model_args {', '.join(unknown)}; legal: workdir, protocol, "
      f"batch_size, length, seed, use_ema, block_size, "
      + ", ".join(sorted(own | sampler))
    )
  protocol = PROTOCOLS[name]
  own_sampler = {
    k: v for k, v in fields.items() if k in sampler and k not in own
  }
  return dataclasses.replace(
    protocol,
    **{k: v for k, v in fields.items() if k in own},
    fields=_fields(**dict(protocol.fields) | own_sampler),
  )
