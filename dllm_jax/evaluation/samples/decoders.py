r"""Which of two decoders is faster on a machine that is not here, by its roofline.

Both have a cache of the text so far. The autoregressive one computes a slot of each
row and writes a token, in t_1 seconds; the diffusion one computes a block of b slots
and writes k tokens a call, on average, in t_b seconds. It is faster where

    k > t_b / t_1,  t = max(FLOPs / (e F), bytes / (e_m R))

(`traffic`). Few rows wait for the weights, which both read once a call: t_b / t_1 is
near 1. Many rows compute: t_b / t_1 comes near b, and to write all of a block at once
would be level.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
from typing import Any

import jax

from dllm_jax.config import config as configs
from dllm_jax.config import files
from dllm_jax.core.paths import Path
from dllm_jax.data import numbers
from dllm_jax.evaluation.samples import traffic
from dllm_jax.parallel.hardware import Chip, CHIPS
from dllm_jax.plots import line_plot
from dllm_jax.run.run import Run

_MOST_POWER = 11  # 1024 rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Level:
  """Where two decoders are level.

  Attributes:
    network: the configuration of both.
    chip: the machine, one chip.
    rows: decoded together.
    token: t_1, seconds.
    block: t_b, seconds.
    tokens: t_b / t_1, tokens that a call must write for a row.
    token_intensity: FLOPs a byte of a call of one slot a row.
    block_intensity: of a block.
  """

  network: str
  chip: str
  rows: int
  token: float
  block: float
  tokens: float
  token_intensity: float
  block_intensity: float


def network(name: str) -> Run:
  """Returns a run of a configuration that is not trained: its shapes.

  Weights are bfloat16, as they are served.

  Raises:
    FileNotFoundError: there is no such configuration.
    ValueError: it does not state its vocabulary.
  """
  size = files.vocab_size(name)
  if size is None:
    raise ValueError(
      f"config {name} states no vocab_size; give one that does, such as llada_8b"
    )
  resolved = configs.load(name)
  resolved.model.param_dtype = "bfloat16"
  resolved.training.ema_decay = 0.0
  tokenizer = numbers.Numbers(
    vocab_size=size, mask_id=size - 1, bos_id=0, eos_id=1
  )
  return Run(Path(), resolved, tokenizer, devices=jax.devices()[:1])


def levels(
  names: Sequence[str], chips: Sequence[str], *, context: int, block: int
) -> Iterator[Level]:
  """Yields where decoders are level, for 1, 2, 4 ... rows, as many as fit.

  Args:
    names: configurations that state their vocabulary.
    chips: machines, as `parallel.hardware` names them.
    context: slots of a row's cache.
    block: slots of a block.

  Raises:
    FileNotFoundError: there is no such configuration.
    ValueError: one states no vocabulary, there is no such machine, or it does
      not hold a row.
  """
  if not names or not chips:
    raise ValueError(
      "decoders are set against each other on a network and a chip"
    )
  unknown = [chip for chip in chips if chip not in CHIPS]
  if unknown:
    raise ValueError(f"unknown chip {unknown[0]!r}; legal: {', '.join(CHIPS)}")
  for name in names:
    run = network(name)
    token, wide = (_calls(run, slots, context) for slots in (1, block))
    held = traffic.size(run.served.abstract.params)
    cache = traffic.kept(run, rows=1, slots=context)
    row = traffic.size((cache.key, cache.value))
    for chip in chips:
      machine = CHIPS[chip]
      most = (machine.memory * machine.usable - held) // row
      if most < 1:
        raise ValueError(
          f"{name} with a cache of {context} slots takes "
          f"{(held + row) / 2**30:.0f} GiB, more than one {chip} has; take a "
          "smaller network or a larger chip"
        )
      for rows in (2**power for power in range(_MOST_POWER)):
        if rows <= most:
          yield _level(name, chip, machine, rows, token(rows), wide(rows))


def _calls(run: Run, slots: int, context: int):
  """Returns the traffic of a call by rows, in which it is linear."""
  one, two = (
    traffic.call(run, rows=rows, slots=slots, cached=context) for rows in (1, 2)
  )
  return lambda rows: one + (two - one) * (rows - 1)


def _level(
  name: str,
  chip: str,
  machine: Chip,
  rows: int,
  token: traffic.Traffic,
  block: traffic.Traffic,
) -> Level:
  seconds = token.seconds(machine), block.seconds(machine)
  return Level(
    network=name,
    chip=chip,
    rows=rows,
    token=seconds[0],
    block=seconds[1],
    tokens=seconds[1] / seconds[0],
    token_intensity=token.flops / token.bytes,
    block_intensity=block.flops / block.bytes,
  )


def faster_up_to(
  found: Sequence[Level], tokens: float
) -> dict[tuple[str, str], int]:
  """Returns the most rows at which a diffusion decoder is the faster one.

  Args:
    found: levels.
    tokens: that it writes a call for each row.

  Returns:
    Rows by network and chip; 0 for never.
  """
  most = {(one.network, one.chip): 0 for one in found}
  for one in found:
    if tokens > one.tokens:
      key = one.network, one.chip
      most[key] = max(most[key], one.rows)
  return most


def table(found: Sequence[Level], tried: Sequence[Mapping[str, Any]]) -> str:
  """Returns Markdown of the rows up to which samplers are faster.

  Args:
    found: levels.
    tried: samplers, with `point`, their name, and `tokens_per_call`.
  """
  fit: dict[tuple[str, str], int] = {}
  for one in found:
    fit[one.network, one.chip] = one.rows  # the last is the most
  names = " | ".join(f"{network}, {chip}" for network, chip in fit)
  lines = [
    f"| sampler, faster up to | tokens a call | {names} |",
    "|---" * (len(fit) + 2) + "|",
  ]
  for row in tried:
    tokens = row["tokens_per_call"]
    most = faster_up_to(found, tokens)
    cells = [f"{rows} rows" if rows else "never" for rows in most.values()]
    lines.append(f"| {row['point']} | {tokens:.2f} | {' | '.join(cells)} |")
  cells = " | ".join(f"{rows} rows" for rows in fit.values())
  lines.append(f"| (what the memory holds) | | {cells} |")
  return "\n".join(lines) + "\n"


def picture(found: Sequence[Level], tried: Sequence[Mapping[str, Any]]) -> str:
  """Returns an SVG: above a curve, the diffusion decoder is the faster one.

  Level lines are samplers that none beats in both tokens a call and perplexity,
  and that write more than one: what does not is never faster.

  Args:
    found: levels.
    tried: samplers, with `point`, `tokens_per_call` and `perplexity`.
  """
  curves: dict[str, list] = {}
  for one in found:
    name = f"{one.network}, {one.chip}"
    curves.setdefault(name, []).append((one.rows, one.tokens, 0.0))
  most = max(one.rows for one in found)
  for row in tried:
    tokens, perplexity = row["tokens_per_call"], row["perplexity"]
    if perplexity is None or tokens <= 1 or _beaten(row, tried):
      continue
    name = f"{row['point']}: perplexity {perplexity:.1f}"
    curves[name] = [(1, tokens, 0.0), (most, tokens, 0.0)]
  return line_plot(
    curves,
    x_label="rows decoded together",
    y_label="tokens that a call must write",
    log_x=True,
    log_y=True,
  )


def _beaten(
  row: Mapping[str, Any], others: Sequence[Mapping[str, Any]]
) -> bool:
  return any(
    other["perplexity"] is not None
    and other["perplexity"] < row["perplexity"]
    and other["tokens_per_call"] >= row["tokens_per_call"]
    for other in others
  )
