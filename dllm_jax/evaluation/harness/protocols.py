r"""How a harness's requests are answered: published settings by name.

Sources: LLaDA's `eval_llada.py` and the commands that it is started with
(`eval_llada_lm_eval.sh`; for Instruct and 1.5 the table of `EVAL.md` and the
examples of its OpenCompass), and Dream's `eval/eval.py` with `eval_dream_mc.sh`
and `eval_dream_gen.sh`. Both give answers a length and a temperature of their
own, whatever the task asks for, and neither has `loglikelihood_rolling` or, as
started, `is_greedy`.
"""

from collections.abc import Mapping
import dataclasses
import types
import typing
from typing import Any

from dllm_jax.core import check
from dllm_jax.sampling.presets import IDS, SamplerConfig

_DECIDE = ("likelihood", "constrained")


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
    multiple_choice: what decides among continuations of a context: the
      "likelihood" of each, or which of them is written where the sampler is held
      to them, "constrained".
    cfg_scale: guidance by the context, w, of likelihoods and answers (LLaDA's
      `cfg`); 0 for none.
    begin: whether a context begins with the token that begins a text; None for
      what the tokenizer writes itself.
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
  multiple_choice: str = "likelihood"
  cfg_scale: float = 0.0
  begin: bool | None = None
  end: bool = False
  max_gen_toks: int = 256
  fixed: bool = False
  sampler: str = ""
  fields: tuple[tuple[str, Any], ...] = ()

  def __post_init__(self):
    check.at_least(self, 1, "mc_num", "strata", "max_gen_toks")
    if self.multiple_choice not in _DECIDE:
      raise ValueError(
        f"multiple_choice must be one of {', '.join(_DECIDE)}, not"
        f" {self.multiple_choice!r}"
      )
    if self.mc_num > self.strata and self.mc_num % self.strata:
      raise ValueError(
        f"mc_num must lie in [1, {self.strata}], one mini-batch, or be a "
        f"multiple of strata={self.strata}, not {self.mc_num}"
      )

  def sampled(self, own: SamplerConfig) -> SamplerConfig:
    """Returns the sampler of answers, given the run's own."""
    config = SamplerConfig(preset=self.sampler) if self.sampler else own
    guided = {"cfg_scale": self.cfg_scale} if self.cfg_scale else {}
    return dataclasses.replace(config, **guided | dict(self.fields))


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
  # LLaDA-8B-Instruct, no blocks: GSM8K, MATH; others by length and flags.
  "llada_instruct": dataclasses.replace(
    _LLADA, max_gen_toks=512, fields=_fields(temperature=0.0, doubt_end=True)
  ),
  # LLaDA 1.5: GSM8K, IFEval; others by length and blocks.
  "llada_1p5": dataclasses.replace(
    _LLADA,
    max_gen_toks=256,
    fields=_fields(temperature=0.0, block_length=16, doubt_end=True),
  ),
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
  # The choice that the run's own sampler writes, held to them.
  "constrained": Protocol(
    multiple_choice="constrained", fields=_fields(temperature=0.0)
  ),
}


UNUSED = ("device", "trust_remote_code", "parallelize", "logits_cache")
"""What changes nothing here: jax takes the devices there are, and no code of a
folder is ever run."""
_RUN = "workdir=DIR names the run; dllm convert makes one of a folder"
_ELSEWHERE = {
  **dict.fromkeys(("pretrained", "revision", "subfolder", "tokenizer"), _RUN),
  **dict.fromkeys(("peft", "delta", "gguf_file", "backend"), _RUN),
  "dtype": "parameters have the run's type, which dllm convert sets",
  "prefix_token_id": "the run's tokenizer says what texts begin with",
}
_OURS = (
  "workdir",
  "protocol",
  "batch_size",
  "max_batch_size",
  "length (or max_length)",
  "seed",
  "use_ema",
  "block_size",
  "think_end_token",
  "enable_thinking",
  "chat_template_args",
)


def rows(batch_size: int | str | None, most: int | str | None = None) -> int:
  """Returns the rows of a call: "auto" and "auto:N" leave it to this class.

  Args:
    batch_size: what the command says.
    most: of how many "auto" is at most; None for any.

  Raises:
    ValueError: one of them is no number of rows.
  """
  text = str(batch_size)
  if batch_size is None or text.partition(":")[0] == "auto":
    most = 16 if most is None else typed("max_batch_size", most, int)
    if most < 1:
      raise ValueError(f"max_batch_size must be at least 1, not {most}")
    return min(most, 16)
  if not text.isdigit() or not int(text):
    raise ValueError(
      f"--batch_size {text} must be auto, auto:N or a number of rows"
    )
  return int(text)


def _spelled(value: Any) -> str:
  """Returns token ids as text: lm_eval makes numbers and lists of some."""
  if isinstance(value, list | tuple):
    return ",".join(map(str, value))
  return "" if value is None else str(value)


def typed(name: str, value: Any, kind: Any) -> Any:
  """Returns a value as its field has it: Python, too, may hand over text.

  Args:
    name: of the field.
    value: what was given.
    kind: a type, or several as `int | None`.

  Raises:
    ValueError: it is nothing of the kind.
  """
  kinds = typing.get_args(kind) or (kind,)
  if type(value) in kinds:
    return value
  text = str(value).strip()
  if types.NoneType in kinds and text.lower() == "none":
    return None
  if bool in kinds and text.lower() in ("true", "false"):
    return text.lower() == "true"
  for number in (int, float):
    if number in kinds and not isinstance(value, bool):
      try:
        found = float(text)
        if number is float or found.is_integer():
          return number(found)
      except ValueError:
        continue
  names = " or ".join(getattr(k, "__name__", str(k)) for k in kinds)
  raise ValueError(f"--model_args {name} must be {names}, not {value!r}")


def named(name: str, fields: Mapping[str, Any]) -> Protocol:
  """Returns a named protocol with some fields replaced.

  Args:
    name: of `PROTOCOLS`.
    fields: of the protocol or of the sampler; `UNUSED` ones are left out, and
      `add_bos_token` is `begin`, as the harness's own class calls it.

  Raises:
    ValueError: the name or a field is unknown, or a value is of another kind.
  """
  if name not in PROTOCOLS:
    raise ValueError(
      f"unknown protocol {name!r}; legal: {', '.join(PROTOCOLS)}"
    )
  own, sampler = (
    {f.name: f.type for f in dataclasses.fields(kind)}
    for kind in (Protocol, SamplerConfig)
  )
  del own["fields"], sampler["preset"]
  given = {
    "begin" if k == "add_bos_token" else k: v
    for k, v in fields.items()
    if k not in UNUSED
  }
  unknown = [k for k in given if k not in own | sampler]
  if unknown:
    legal = f"legal: {', '.join([*_OURS, *sorted(own | sampler)])}"
    hints = [f"{k}: {_ELSEWHERE[k]}" for k in unknown if k in _ELSEWHERE]
    raise ValueError(
      f"unknown --model_args {', '.join(unknown)}; "
      + ("; ".join(hints) if len(hints) == len(unknown) else legal)
    )
  given = {
    k: _spelled(v) if k in IDS else typed(k, v, (own | sampler)[k])
    for k, v in given.items()
  }
  protocol = PROTOCOLS[name]
  of_sampler = {k: v for k, v in given.items() if k not in own}
  return dataclasses.replace(
    protocol,
    **{k: v for k, v in given.items() if k in own},
    fields=_fields(**dict(protocol.fields) | of_sampler),
  )
