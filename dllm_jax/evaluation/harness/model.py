r"""The model class of lm-evaluation-harness: `--model dllm_jax`.

    dllm harness --model dllm_jax --model_args workdir=runs/mine,protocol=llada \
        --tasks my_task --include_path my_tasks

is the `lm_eval` command with this model registered: it has no other way to find
models of other packages. What a request is given depends on the seed and on the
request alone, never on what else is in its batch. A protocol names published
settings; any of its fields can be given instead.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import sys
from typing import Any

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
import numpy as np

from dllm_jax.evaluation.harness import batches, choices, protocols
from dllm_jax.evaluation.harness.chat import Chats
from dllm_jax.evaluation.likelihood import contexts, documents
from dllm_jax.evaluation.likelihood.scorer import Item, Scorer
from dllm_jax.run.run import Run
from dllm_jax.sampling import requests as sampling
from dllm_jax.sampling.constraints.automaton import Automaton
from dllm_jax.sampling.options import RowOptions
from dllm_jax.sampling.presets import SamplerConfig


@register_model("dllm_jax")
class DiffusionLM(Chats, LM):
  """A run behind the interface of lm-evaluation-harness.

  Attributes:
    protocol: how requests are answered.
    standard_errors: of the likelihoods so far, nats.

  Args:
    workdir: the run.
    protocol: a name of `protocols.PROTOCOLS`.
    batch_size: rows of a call, about; "auto" for 16.
    max_batch_size: of how many "auto" is at most.
    length: slots of a canvas at most; 0 for the trained length.
    seed: of estimates and samples.
    use_ema: whether to use averaged parameters where the run has them.
    block_size: block diffusion: tokens of a block; 0 as trained.
    max_length: the harness's own word for `length`.
    think_end_token: what stands between thoughts and an answer, which follows
      its last: a text or a token; None for no thoughts.
    enable_thinking: what the chat template is told by this name; None for
      nothing.
    chat_template_args: what else it is told.
    **fields: fields of the protocol or of the sampler, instead of its own, as
      values or as text. What the command adds for other classes
      (`protocols.UNUSED`) has no effect.

  Raises:
    ValueError: a field is unknown or illegal.
    FileNotFoundError: there is no run.
  """

  def __init__(
    self,
    workdir: str = "",
    *,
    protocol: str = "default",
    batch_size: int | str = 16,
    max_batch_size: int | None = None,
    length: int = 0,
    seed: int = 0,
    use_ema: bool = True,
    block_size: int = 0,
    max_length: int = 0,
    think_end_token: str | int | None = None,
    enable_thinking: bool | None = None,
    chat_template_args: Mapping[str, Any] | None = None,
    **fields: Any,
  ):
    super().__init__()
    self.protocol = protocols.named(protocol, fields)
    if not workdir:
      raise ValueError("give the run as --model_args workdir=DIR")
    self._run = Run.open(workdir)
    typed = protocols.typed
    self._seed = typed("seed", seed, int)
    self._use_ema = typed("use_ema", use_ema, bool)
    self._rows = protocols.rows(batch_size, max_batch_size)
    length = typed("length", length or max_length, int)
    self._length = length or self._run.config.data.length
    self._think_end, self._rendered = think_end_token, False
    self._template = dict(chat_template_args or {})
    if enable_thinking is not None:
      self._template["enable_thinking"] = enable_thinking
    self._sampler = self.protocol.sampled(self._run.config.sampler)
    self._scorer = Scorer.of(
      self._run,
      use_ema=self._use_ema,
      estimator=self.protocol.estimator,
      block_size=typed("block_size", block_size, int),
      cfg_scale=self.protocol.cfg_scale,
    )
    self.standard_errors: list[float] = []
    _made.append(self)

  @property
  def tokenizer_name(self) -> str:
    """The run's directory, a name for the harness's caches."""
    return str(self._run.workdir)

  def get_model_info(self) -> dict[str, Any]:
    """Returns the protocol of the figures, with what was spent and its error."""
    errors = self.standard_errors
    return {
      "protocol": dataclasses.asdict(self.protocol)
      | {
        "estimator": self._scorer.estimator,
        "sampler": dataclasses.asdict(self._sampler),
        "length": self._length,
        "seed": self._seed,
        "use_ema": self._use_ema,
        "chat_template_args": self._template,
        "step": int(self._run.state.step),
      },
      "forward_tokens": self._scorer.forward_tokens,
      "mean_standard_error_nats": float(np.mean(errors)) if errors else None,
    }

  # ------------------------------------------------------------- likelihood

  def loglikelihood(
    self, requests: Sequence[Instance], disable_tqdm: bool = False
  ) -> list[tuple[float, bool]]:
    """Returns (log p(continuation | context), is_greedy) of each request.

    Of choices by constrained decoding (0, True) for the one that is written.

    Raises:
      ValueError: a continuation is longer than the canvas, or constrained decoding
        has no choice.
    """
    if self.protocol.multiple_choice == "constrained":
      return self._chosen(requests, disable_tqdm)
    if not self.protocol.greedy:
      contexts.say_once(
        "is_greedy is reported as False: what a diffusion model would write is "
        "a generation of its own; give greedy=True in --model_args for tasks "
        "whose accuracy reads it"
      )
    items = [self._pair(*request.args) for request in requests]

    def answer(part: Sequence[int]) -> list[tuple[float, bool]]:
      chosen = [items[i] for i in part]
      if not chosen[0].targets:
        contexts.say_once("an empty continuation is certain: its log p is 0")
        return [(0.0, True)] * len(chosen)
      nats = self._nats(chosen)
      greedy = (
        self._greedy(chosen) if self.protocol.greedy else [False] * len(chosen)
      )
      return list(zip((-nats).tolist(), greedy, strict=True))

    sizes = [
      item.targets and self._scorer.canvas(len(item.tokens)) for item in items
    ]
    return self._each("loglikelihood", requests, sizes, answer, disable_tqdm)

  def _chosen(self, requests, quiet) -> list[tuple[float, bool]]:
    """Returns what was written of each document's choices, and what was not."""
    tokenizer, length = self._run.tokenizer, self._length
    parts = choices.documents(requests, cached=self.cache_hook.dbdict)
    args = [[requests[i].args for i in part] for part in parts]
    asked = [choices.Asked.of(a, self._encode, tokenizer, length) for a in args]
    rows = [
      [*self._context(a.given, length - a.slots), *[None] * a.slots]
      for a in asked
    ]
    config = dataclasses.replace(self._sampler, steps=0)

    def answer(part: Sequence[int]) -> list[list[tuple[float, bool]]]:
      languages = [asked[i].language for i in part]
      written = self._write([rows[i] for i in part], config, languages)
      return [asked[i].told(new) for i, new in zip(part, written, strict=True)]

    alike = [self._canvas(row, config) for row in rows]
    told = batches.each(
      "multiple_choice", parts, alike, answer, rows=self._rows, quiet=quiet
    )
    found: list[Any] = [None] * len(requests)
    for part, values in zip(parts, told, strict=True):
      for i, value in zip(part, values, strict=True):
        found[i] = value
    return found

  def _each(self, kind, requests, alike, answer, quiet) -> list[Any]:
    return batches.each(
      kind,
      requests,
      alike,
      answer,
      rows=self._rows,
      keep=self.cache_hook.add_partial,
      quiet=quiet,
    )

  def _pair(self, context: str, continuation: str) -> Item:
    """Returns a continuation given its context, cut from the left to fit."""
    given, reply = contexts.divided(self._encode, context, continuation)
    end = contexts.special(self._run.tokenizer, "end", self.protocol.end)
    room = self._length - len(reply) - len(end)
    if room < 0:
      raise ValueError(
        f"a continuation of {len(reply)} tokens does not fit the canvas of "
        f"{self._length}: give a longer length in --model_args"
      )
    given = self._context(given, room)
    return Item(tokens=(*given, *reply, *end), given=len(given), after=len(end))

  @property
  def _begin(self) -> Sequence[int]:
    """What a context begins with, unless it does so already."""
    tokenizer, wanted = self._run.tokenizer, self.protocol.begin
    # A template has written the beginning itself.
    own = not self._rendered and wanted is not False
    begin = tokenizer.begin_ids if own else ()
    return begin or contexts.special(tokenizer, "begin", wanted)

  def _context(self, given: Sequence[int], room: int) -> list[int]:
    """Returns a context as it begins, cut from the left to fit."""
    return contexts.fitting(self._begin, given, room)

  def _encode(self, text: str) -> list[int]:
    return [int(i) for i in self._run.tokenizer.encode(text)]

  def _nats(self, items: Sequence[Item]) -> np.ndarray:
    """Returns -log p of items on one canvas, and keeps their errors."""
    free = self._scorer.estimator in documents.FREE
    samples = 1 if free else min(self.protocol.mc_num, self.protocol.strata)
    key = jax.random.key(self._seed)
    passes = 1 if free else self.protocol.mc_num // samples
    found = np.stack([
      self._scorer.score(
        items,
        samples=samples,
        key=jax.random.fold_in(key, i),
        rows=self._rows,
      )
      for i in range(passes)
    ])
    if free or passes > 1:
      self.standard_errors += [documents.mean(each)[1] for each in found.T]
    return found.mean(axis=0)

  def _greedy(self, items: Sequence[Item]) -> list[bool]:
    """Returns whether each is what the surest tokens first would write."""
    ends = [item.given + item.targets for item in items]
    rows = [
      [*i.tokens[: i.given], *[None] * i.targets, *i.tokens[end:]]
      for i, end in zip(items, ends, strict=True)
    ]
    config = dataclasses.replace(
      self._sampler, temperature=0.0, stop=False, steps=0
    )
    written = self._write(rows, config)
    return [
      tuple(new[: item.targets]) == item.tokens[item.given : end]
      for new, item, end in zip(written, items, ends, strict=True)
    ]

  def loglikelihood_rolling(
    self, requests: Sequence[Instance], disable_tqdm: bool = False
  ) -> list[float]:
    """Returns log p of each document, in windows with the stated overlap."""
    asked = [self._windows(request.args[0]) for request in requests]

    def answer(part: Sequence[int]) -> list[float]:
      return [0.0 - self._document(asked[i]) for i in part]

    alike = [""] * len(requests)
    return self._each(
      "loglikelihood_rolling", requests, alike, answer, disable_tqdm
    )

  def _windows(self, text: str) -> list[Item]:
    ids = self._encode(text)
    if not ids:
      contexts.say_once("an empty document is certain: its log p is 0")
      return []
    return documents.windows(
      ids,
      length=self._length,
      overlap=self.protocol.overlap,
      begin=self._begin,
    )

  def _document(self, items: Sequence[Item]) -> float:
    """Returns the nats of a document's windows together."""
    canvases: dict[int, list[Item]] = {}
    for item in items:
      size = self._scorer.canvas(len(item.tokens))
      canvases.setdefault(size, []).append(item)
    return sum(float(self._nats(part).sum()) for part in canvases.values())

  # ------------------------------------------------------------- generation

  def generate_until(
    self, requests: Sequence[Instance], disable_tqdm: bool = False
  ) -> list[str]:
    """Returns what follows each context, cut at the first of its `until`.

    Raises:
      ValueError: a request wants what a diffusion model cannot give, or more
        tokens than the canvas has.
    """
    asked = [self._asked(*request.args) for request in requests]

    def answer(part: Sequence[int]) -> list[str]:
      config = asked[part[0]][2]
      written = self._write([asked[i][0] for i in part], config)
      return [
        self._text(new, asked[i][1])
        for i, new in zip(part, written, strict=True)
      ]

    kinds = [(self._canvas(row, c), c) for row, _, c in asked]
    return self._each("generate_until", requests, kinds, answer, disable_tqdm)

  def _text(self, new: Sequence[int], until: Sequence[str]) -> str:
    """Returns the text of an answer: to what ends it, behind its thoughts."""
    decode, ends = self._run.tokenizer.decode, self._run.tokenizer.end_ids
    if self._think_end is None:
      return contexts.stopped(new, until, decode, ends=ends)
    new = contexts.behind(new, self._think_end, decode, ends=ends)
    return contexts.stopped(new, until, decode, ends=ends).lstrip()

  def _asked(self, context: str, kwargs: dict[str, Any]):
    """Returns (template, until, sampler) of a request."""
    until, wanted, fields = contexts.wishes(
      kwargs, tokens=self.protocol.max_gen_toks, fixed=self.protocol.fixed
    )
    config = dataclasses.replace(self._sampler, **fields)
    room = self._length - wanted
    if room < 0:
      raise ValueError(
        f"an answer of {wanted} tokens is longer than the canvas of "
        f"{self._length}: lower max_gen_toks, or give a longer length in "
        "--model_args"
      )
    given = self._context(self._encode(context), room)
    return [*given, *[None] * wanted], until, config

  def _canvas(self, row: sampling.Template, config: SamplerConfig) -> int:
    """Returns the slots of a row's canvas."""
    objective = self._run.objective
    return config.canvas(objective, len(sampling.begun(row, objective)))

  def _write(
    self,
    rows: Sequence[sampling.Template],
    config: SamplerConfig,
    languages: Sequence[Automaton] = (),
  ) -> list[list[int]]:
    """Returns the new tokens of templates, as many as were asked for."""
    missing = -len(rows) % self._rows  # one program, whatever is left over
    rows = [*rows, *[rows[-1]] * missing]
    languages = [*languages, *languages[-1:] * missing]
    sampled = self._run.sample_rows(
      rows,
      length=max(self._canvas(row, config) for row in rows),
      seed=self._seed,
      sampler=config,
      use_ema=self._use_ema,
      numbers=[batches.number(row) for row in rows],
      options=[RowOptions(language=one) for one in languages] or None,
    )
    given = [row.index(None) for row in rows]
    new = [ids[n:] for ids, n in zip(sampled.rows, given, strict=True)]
    return new[: len(new) - missing]


_made: list[DiffusionLM] = []


def main(argv: Sequence[str]) -> list[DiffusionLM]:
  """Runs the `lm_eval` command; returns the models that it made."""
  from lm_eval.__main__ import cli_evaluate

  _made.clear()
  sys.argv = ["lm_eval", *argv]
  cli_evaluate()
  return list(_made)
