"""`--task=likelihood`: of held-out text, of documents, of answers to prompts."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import jax

from dllm_jax import data
from dllm_jax.core import check, paths
from dllm_jax.data import source
from dllm_jax.data.packing import text_size, TextSize
from dllm_jax.evaluation.benchmarks import json_lines
from dllm_jax.evaluation.likelihood import contexts, documents
from dllm_jax.evaluation.likelihood.detokenize import RULES
from dllm_jax.evaluation.likelihood.scorer import Item, Scorer
from dllm_jax.evaluation.tasks.registry import option, Setting, Task

_MOST = 1024  # passes, where an error is to be reached


@dataclasses.dataclass(frozen=True, kw_only=True)
class Likelihood:
  """What `--task=likelihood` is told.

  Attributes: as their help says.
  """

  text: str = option(
    "",
    "documents to score instead of the held-out text: a path as in data.path",
    path=True,
  )
  pairs: str = option(
    "", "answers to score: JSONL with the fields prompt and answer", path=True
  )
  detokenizer: str = option(
    "none",
    "how --text was published as words, which its word perplexity counts: "
    + ", ".join(RULES),
  )
  separator: str = option("", "what stands between documents of a text file")
  length: int = option(0, "tokens of a window; 0 for the trained length")
  overlap: int = option(0, "tokens before a window that it is given")
  estimator: str = option(
    "auto",
    "exact, counts, times, or an order: left, confidence, margin, entropy, target",
  )
  block_size: int = option(
    0, "block diffusion: tokens of a block; 0 as trained"
  )
  samples: int = option(16, "evenly spread samples of a text in a pass")
  passes: int = option(0, "passes over the text; 0 for the run's own number")
  error: float = option(
    0.0, "passes until the standard error, bits per token, is no larger"
  )
  batches: int = option(0, "at most so many held-out batches; 0 for all")
  cfg_scale: float = option(0.0, "guidance of prompts by w; 0 for none")
  seed: int = option(0, "seed of the estimate")

  def __post_init__(self):
    if self.passes < 0 or self.passes == 1:
      raise ValueError(
        "--passes must be at least 2 (the standard error needs two), or 0 for "
        f"the run's own number, not {self.passes}"
      )
    check.at_least(
      self, 0, "batches", "length", "overlap", "block_size", prefix="--"
    )
    check.at_least(self, 1, "samples", prefix="--")
    check.at_least(self, 0, "error", prefix="--")
    if self.text and self.pairs:
      raise ValueError("give --text or --pairs, not both")
    if self.detokenizer not in RULES:
      raise ValueError(
        f"unknown --detokenizer {self.detokenizer!r}; legal: {', '.join(RULES)}"
      )

  def how_often(self, configured: int) -> documents.Passes:
    """Returns the passes to make."""
    least = self.passes or configured
    if not self.error:
      return documents.Passes(least=least, most=least)
    least = max(least, documents.LEAST_PASSES)
    return documents.Passes(
      least=least, most=max(_MOST, least), error=self.error
    )


def _run(setting: Setting, options: Likelihood) -> Mapping[str, Any]:
  scorer = Scorer.of(
    setting.run,
    use_ema=setting.use_ema,
    estimator=options.estimator,
    block_size=options.block_size,
    cfg_scale=options.cfg_scale,
  )
  if options.pairs:
    return _pairs(setting, options, scorer)
  if options.text:
    return _text(setting, options, scorer)
  return _held_out(setting, options, scorer)


def _protocol(setting: Setting, options: Likelihood, scorer: Scorer, **fields):
  """Returns what a figure depends on; not how exactly it is to be known."""
  block = scorer.objective.block_length
  return setting.protocol(
    {
      "task": "likelihood",
      "objective": setting.run.resolved.objective.name,
      "estimator": scorer.estimator,
      "strata": fields.pop("strata"),
      "seed": options.seed,
      "block_size": block,
      "cfg_scale": options.cfg_scale,
    }
    | fields
  )


def _held_out(setting, options, scorer) -> dict[str, Any]:
  run = setting.run
  size = run.corpus.held_out_text
  if size is None:
    raise ValueError(
      "nothing is held out: set config.data.held_out above 0, or give --text"
    )
  rows = run.config.evaluation.batch_size
  batches = data.held_out_batches(
    run.corpus,
    batch_size=rows,
    limit=options.batches or None,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  protocol = _protocol(
    setting,
    options,
    scorer,
    text=f"held out of {run.config.data.path}",
    length=run.config.data.length,
    strata=f"over the {rows} rows of a batch",
    batches=options.batches,
    overlap=0,
  )
  nats, tokens = documents.of_batches(
    scorer,
    batches,
    passes=options.how_often(run.config.evaluation.passes),
    seed=options.seed,
    ledger=setting.ledger("likelihood", protocol),
  )
  tokens = round(tokens * run.corpus.text_share)
  scored = TextSize(
    tokens=tokens,
    characters=round(tokens * size.characters_per_token),
    bytes=round(tokens * size.bytes_per_token),
  )
  return _done(documents.figures(nats, scored), protocol, scorer)


def _done(figures, protocol, scorer) -> dict[str, Any]:
  figures["forward_tokens"] = scorer.forward_tokens
  return figures | {"protocol": protocol}


def _documents(options: Likelihood, tokenizer) -> tuple[list, TextSize, int]:
  """Returns token ids of each document, their size, and published words."""
  rules, found, size, words = RULES[options.detokenizer], [], TextSize(), 0
  form = source.Format(document_separator=options.separator or None)
  for i, document in enumerate(
    source.documents(source.find(options.text), form)
  ):
    text = rules.text(document.text)
    if not text.strip():
      raise ValueError(
        f"document {i} of {options.text} is empty: an empty document has no "
        "likelihood; leave it out"
      )
    ids = tokenizer.encode(text)
    found.append([int(token) for token in ids])
    size += text_size(text, ids)
    words += rules.words(document.text)
  if not found:
    raise source.empty(options.text)
  return found, size, words


def _text(setting, options, scorer) -> dict[str, Any]:
  run = setting.run
  texts, size, words = _documents(options, run.tokenizer)
  length = options.length or run.config.data.length
  items = [
    item
    for ids in texts
    for item in documents.windows(
      ids,
      length=length,
      overlap=options.overlap,
      begin=run.tokenizer.begin_ids,
    )
  ]
  protocol = _protocol(
    setting,
    options,
    scorer,
    text=options.text,
    detokenizer=options.detokenizer,
    separator=options.separator,
    length=length,
    strata="over the samples of a window",
    samples=options.samples,
    overlap=options.overlap,
  )
  nats, _ = _score(setting, options, scorer, items, protocol)
  totals = [float(sum(each)) for each in nats]
  figures = documents.figures(totals, size, words=words)
  figures |= {"documents": len(texts), "windows": len(items)}
  return _done(figures, protocol, scorer)


def _score(setting, options, scorer, items: Sequence[Item], protocol):
  run = setting.run
  return documents.of_items(
    scorer,
    items,
    samples=options.samples,
    passes=options.how_often(run.config.evaluation.passes),
    seed=options.seed,
    rows=run.config.evaluation.batch_size,
    ledger=setting.ledger("likelihood", protocol),
  )


def _pairs(setting, options, scorer) -> dict[str, Any]:
  run = setting.run
  canvas = options.length or run.config.data.length
  begin, encode = run.tokenizer.begin_ids, run.tokenizer.encode
  items, size = [], TextSize()
  for i, (prompt, reply) in enumerate(_read_pairs(options.pairs)):
    given, ids = contexts.divided(encode, prompt, reply)
    try:
      given = contexts.begun(begin, given)
      items.append(documents.answer(given, ids, canvas=canvas))
    except ValueError as error:
      raise ValueError(f"pair {i} of {options.pairs}: {error}") from error
    size += text_size(reply, ids)
  protocol = _protocol(
    setting,
    options,
    scorer,
    text=options.pairs,
    length=canvas,
    strata="over the samples of an answer",
    samples=options.samples,
  )
  nats, _ = _score(setting, options, scorer, items, protocol)
  totals = [float(sum(each)) for each in nats]
  each = [documents.mean(values) for values in zip(*nats, strict=True)]
  figures = documents.figures(totals, size) | {
    "log_likelihoods": [-value[0] for value in each],
    "standard_errors": [value[1] for value in each],
  }
  return _done(figures, protocol, scorer)


def _read_pairs(path: str) -> list[tuple[str, str]]:
  """Returns (prompt, answer) of each line."""
  lines = json_lines.rows(paths.place(path), ("prompt", "answer"))
  found = [(str(row["prompt"]), str(row["answer"])) for _, row in lines]
  if not found:
    raise source.empty(path)
  return found


def _report(figures: Mapping[str, Any]) -> str:
  exact = figures["protocol"]["estimator"] in documents.FREE
  lines = [
    f"{'' if exact else 'at most '}{figures['bits_per_token']:.4f} bits per "
    f"token (standard error {figures['standard_error']:.4f}), "
    f"{figures['bits_per_char']:.4f} bits per character, perplexity "
    f"{figures['perplexity']:.2f}, on {figures['tokens']} tokens"
  ]
  if "word_perplexity" in figures:
    lines.append(
      f"perplexity {figures['word_perplexity']:.2f} per word of "
      f"{figures['words']} words"
    )
  lines.append(
    ", ".join(f"{k} {v}" for k, v in figures["protocol"].items() if v != "")
  )
  return "\n".join(lines)


TASK = Task(
  summary="the likelihood (bound) of held-out text, of documents, of answers",
  run=_run,
  text=_report,
  options=Likelihood,
)
