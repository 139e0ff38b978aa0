r"""How a harness's requests are answered: published settings by name.

Sources: LLaDA's `eval_llada.py` and the commands that it is started with
(`eval_llada_lm_eval.sh`, and `llada_instruct_gen_gsm8k_length256_block8.py` of
its OpenCompass), and Dream's `eval/eval.py` with `eval_dream_mc.sh` and
`eval_dream_gen.sh`. Both give answers a length and a temperature of their own,
whatever the task asks for, and neither has `loglikelihood_rolling` or, as
started, `is_greedy`.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from dllm_jax.core import check
from dllm_jax.sampling.presets import IDS, SamplerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
  """How requests are answered.

  Attributes:
    estimator: of likelihoods, as in `dllm evaluate --task=likelihood`.
    mc_num: samples of a likelihood.
    strata: how many of them are spread evenly, a mini-batch; several give the
      standard error.
    overlap: tokens before a window of a long document that it is given.
    greedy: whether to say if a continuation is what the sampler would write
      with temperature 0 (`is_greedy`, which `acc` of LAMBADA reads): one
      generation for each request.
    cfg_scale: guidance of the context in likelihoods, w; 0 for none.
    begin: whether a context begins with the token that begins a text.
    end: whether the token that ends a text stands, given, after what is scored.
    max_gen_toks: tokens to write where a task does not say.
    fixed: whether answers have this length, and are sampled so, whatever a task
      asks for.
    sampler: the preset; "" for the run's own.
    fields: fields of the sampler, over the preset's.
  """

  estimator: str = "auto"
  mc_num: int = 128
  strata: int = 16
  overlap: int = 0
  greedy: bool = False
  cfg_scale: float = 0.0
  begin: bool = False
  end: bool = False
  max_gen_toks: int = 256
  fixed: bool = False
  sampler: str = ""
  fields: tuple[tuple[str, Any], ...] = ()

  def __post_init__(self):
    check.at_least(self, 1, "mc_num", "strata", "max_gen_toks")
    if self.mc_num > self.strata and self.mc_num % self.strata:
      raise ValueError(
        f"mc_num must lie in [1, {self.strata}], one mini-batch, or be a "
        f"multiple of strata={self.strata}, not {self.mc_num}"
      )


def _fields(**fields: Any) -> tuple[tuple[str, Any], ...]:
  return tuple(sorted(fields.items()))


# LLaDA-8B-Base: 128 samples by exact counts, 8 spread evenly; answers of 1024
# tokens in as many steps, one block, the surest token first.
_LLADA = Protocol(
  estimator="counts",
  strata=8,
  max_gen_toks=1024,
  fixed=True,
  sampler="llada",
  fields=_fields(temperature=0.0),
)
# Dream-7B-Base: 128 samples by times, 32 spread evenly, between the tokens that
# begin and end a text; the least entropy first, one token a step. GSM8K.
_DREAM = Protocol(
  estimator="times",
  strata=32,
  begin=True,
  end=True,
  max_gen_toks=256,
  fixed=True,
  sampler="dream",
  fields=_fields(temperature=0.0, top_p=0.95),
)
PROTOCOLS = {
  "default": Protocol(),
  "llada": _LLADA,
  # MMLU, CMMLU, C-Eval, whose answers are one token: its count is 1.
  "llada_single": dataclasses.replace(_LLADA, mc_num=1, strata=1),
  # GSM8K of LLaDA-8B-Instruct: blocks of 8 from left to right.
  "llada_blocks": dataclasses.replace(
    _LLADA, max_gen_toks=256, fields=_fields(temperature=0.0, block_length=8)
  ),
  "dream": _DREAM,
  # MATH and BBH.
  "dream_long": dataclasses.replace(_DREAM, max_gen_toks=512),
  # HumanEval and MBPP.
  "dream_code": dataclasses.replace(
    _DREAM, max_gen_toks=512, fields=_fields(temperature=0.2, top_p=0.95)
  ),
}


UNUSED = ("device", "max_batch_size", "trust_remote_code", "parallelize")
"""What `lm_eval` hands to every class: jax takes the devices there are, and no
code of a folder is ever run."""
_ELSEWHERE = {
  "pretrained": "workdir=DIR names the run; dllm convert makes one of a folder",
  "dtype": "parameters have the run's type, which dllm convert sets",
  "add_bos_token": "begin=True says so",
}


def rows(batch_size: int | str | None) -> int:
  """Returns the rows of a call: "auto" and "auto:N" leave it to this class.

  Raises:
    ValueError: it is no number of rows.
  """
  text = str(batch_size)
  if batch_size is None or text.partition(":")[0] == "auto":
    return 16
  if not text.isdigit() or not int(text):
    raise ValueError(
      f"--batch_size {text} must be auto, auto:N or a number of rows"
    )
  return int(text)


def _spelled(value: Any) -> Any:
  """Returns token ids as text: lm_eval makes numbers and lists of some."""
  if isinstance(value, list | tuple):
    return ",".join(map(str, value))
  return str(value)


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
    hints = [f"; {k}: {_ELSEWHERE[k]}" for k in unknown if k in _ELSEWHERE]
    raise ValueError(
      f"unknown --model_args {', '.join(unknown)}; legal: workdir, protocol, "
      f"batch_size, length, seed, use_ema, block_size, "
      + ", ".join(sorted(own | sampler))
      + "".join(hints)
    )
  counts = ("mc_num", "strata", "overlap", "max_gen_toks")
  fields = {
    k: _spelled(v) if k in IDS else int(v) if k in counts else v
    for k, v in fields.items()
  }
  protocol = PROTOCOLS[name]
  own_sampler = {
    k: v for k, v in fields.items() if k in sampler and k not in own
  }
  return dataclasses.replace(
    protocol,
    **{k: v for k, v in fields.items() if k in own},
    fields=_fields(**dict(protocol.fields) | own_sampler),
  )
