"""Families that are sampled by rules of others: every recorded canvas."""

import numpy as np
import pytest

from dllm_jax.sampling.policies.guidance import Guidance
from dllm_jax.sampling.policies.processors import (
  Temperature,
  TopK,
  TopP,
)
from dllm_jax.sampling.policies.revision import Edit
from dllm_jax.sampling.policies.selection import Even, Threshold
from dllm_jax.sampling.policies.unmasking import Unmasking
from dllm_jax.sampling.policies.windows.indel import InDel
from dllm_jax.sampling.policies.windows.parts import Sliding, SubBlocks
from tests import golden_cases, quick
from tests.sampling import published
from tests.sampling.test_parity_blocks import blocks_seen, ceil

JOINT = golden_cases.load("llada21_generate").config["runs"]


def blockwise(name, run, prompt, length, block, **fields):
  """Returns the generation of a row of whole blocks, no cache."""
  objective = published.replace(
    published.model(name).objective, block_size=block, length=length
  )
  return published.run(
    name,
    [prompt + [None] * (length - len(prompt))],
    objective=objective,
    block_length=block,
    blocks_from="start",
    **fields,
  )


def changes(history):
  """Returns the canvases that differ from the one before."""
  new = np.any(history[1:] != history[:-1], axis=1)
  return history[:-1][new]


@pytest.mark.parametrize(
  "i",
  quick.few(range(len(JOINT)), lambda i: {JOINT[i]["name"]} & {"quality"}),
)
def test_llada21_reveals_and_edits_in_one_call(i):
  case = golden_cases.load("llada21_generate")
  run, block = JOINT[i], JOINT[i]["block_length"]
  (prompt,) = published.prompts(case.arrays[f"run{i}_prompt"])
  least = run.get("num_to_transfer", 1)
  edits = run["editing_threshold"] <= 1  # above, nothing is edited
  got = blockwise(
    "llada21_generate",
    run,
    prompt,
    ceil(len(prompt) + run["gen_length"], block),
    block,
    policy=lambda objective: Unmasking(
      objective=objective,
      steps=block,
      selection=Threshold(
        value=run["threshold"],
        least=Even(of="window", steps=block // least),
      ),
      revision=Edit(
        threshold=run["editing_threshold"],
        extra=run.get("max_post_steps", 16),
        always=True,
      )
      if edits
      else None,
      processors=(Temperature(0.0),),
    ),
    end_ids=(run["eos_id"],) if run.get("eos_early_stop") else (),
  )
  history = published.history(got, 0)
  canvases = case.arrays[f"run{i}_canvas"]
  seen = history[:-1] if edits else changes(history)
  if not edits:  # its last call in each block is to change nothing
    keep = case.arrays[f"run{i}_revealed"].any(axis=1)
    canvases = canvases[keep]
  assert len(seen) == len(canvases)
  for ours, want in zip(seen, canvases, strict=True):
    np.testing.assert_array_equal(ours[want >= 0], want[want >= 0])
  expected = case.arrays[f"run{i}_output"][0]
  found = history[-1][len(prompt) :][: len(expected)]
  np.testing.assert_array_equal(found, expected)


SDAR_MOE = golden_cases.load("sdar_moe").config["runs"]


@pytest.mark.parametrize(
  "i",
  [*map(quick.long, range(len(SDAR_MOE)))],
)
def test_sdar_moe_is_sampled_as_sdar(i):
  case = golden_cases.load("sdar_moe")
  run, block = SDAR_MOE[i], SDAR_MOE[i]["block_length"]
  (prompt,) = published.prompts(case.arrays[f"run{i}_prompt"])
  quota = Even(of="window")
  kind = run["remasking_strategy"]
  selection = quota
  if kind == "low_confidence_dynamic":
    selection = Threshold(value=run["confidence_threshold"], least=quota)
  filters = (Temperature(run["temperature"]),)
  if run["top_k"]:
    filters += (TopK(run["top_k"]), TopP(run["top_p"]))
  got = blockwise(
    "sdar_moe",
    run,
    prompt,
    ceil(len(prompt) + run["gen_length"], block),
    block,
    policy=lambda objective: Unmasking(
      objective=objective,
      steps=run["denoising_steps"],
      score="left" if kind == "sequential" else "confidence",
      selection=selection,
      filters=filters,
      processors=(Temperature(0.0),),
    ),
  )
  expected = case.arrays[f"run{i}_output"][0]
  np.testing.assert_array_equal(got.tokens[0][: len(expected)], expected)
  mask = case.config["mask_id"]
  seen = blocks_seen(published.history(got, 0), block, mask)
  inputs = case.arrays[f"run{i}_block_inputs"]
  np.testing.assert_array_equal(seen, inputs)
  assert got.function_evaluations[0] == case.arrays[f"run{i}_nfe_denoise"]


REASONER = golden_cases.load("dreamreasoner").config["runs"]


@pytest.mark.parametrize(
  "i",
  [*map(quick.long, range(len(REASONER)))],
)
def test_dream_reasoner_reveals_what_is_sure(i):
  case = golden_cases.load("dreamreasoner")
  run, block = REASONER[i], REASONER[i]["block_size"]
  arrays, mask = case.arrays, case.config["mask_id"]
  for b, prompt in enumerate(published.prompts(arrays[f"run{i}_prompt"])):
    got = blockwise(
      "dreamreasoner",
      run,
      prompt,
      len(prompt) // block * block + run["blocks"] * block,
      block,
      policy=lambda objective: Unmasking(
        objective=objective,
        steps=block,
        selection=Threshold(value=run["threshold"]),
        processors=(Temperature(0.0),),
      ),
    )
    np.testing.assert_array_equal(got.tokens[0], arrays[f"run{i}_output"][b])
    inputs = arrays[f"run{i}_block_inputs"][:, b]
    inputs = inputs[(inputs == mask).any(axis=1)]  # others are to be stored
    seen = blocks_seen(published.history(got, 0), block, mask)
    np.testing.assert_array_equal(seen, inputs)


LIKE_LLADA = [
  (name, i)
  for name in ("illada", "llada_moe_published")
  for i in range(len(golden_cases.load(name).config["runs"]))
]


@pytest.mark.parametrize("case", [*map(quick.long, LIKE_LLADA)])
def test_illada_and_llada_moe_are_sampled_as_llada(case):
  name, i = case
  case = golden_cases.load(name)
  run = case.config["runs"][i]
  (prompt,) = published.prompts(case.arrays[f"run{i}_prompt"])
  grown = run.get("append")
  whole = run["gen_length"] * (grown or 1)
  blocks = run["gen_length"] // run["block_length"]
  scale = run.get("cfg_scale", 0.0)
  got = published.run(
    name,
    [prompt + [None] * whole],
    policy=lambda objective: Unmasking(
      objective=objective,
      steps=run["steps"] // blocks,
      selection=Even(),
      processors=(Temperature(0.0),),
    ),
    block_length=run["block_length"],
    guidance=Guidance(scale=scale) if scale else None,
    extend=bool(grown),  # a block of masks is appended when it is begun
  )
  want = case.arrays[f"run{i}_history"]
  want = want.reshape(len(want), -1)
  history = published.history(got, 0)
  for ours, theirs in zip(history, want, strict=False):
    keep = theirs >= 0
    np.testing.assert_array_equal(ours[keep], theirs[keep])
  assert len(want) in (len(history), len(history) - 1)
  output = case.arrays[f"run{i}_output"][0]
  np.testing.assert_array_equal(history[-1][: len(output)], output)


FAST = golden_cases.load("fast_dllm_v2").config["runs"]


@pytest.mark.parametrize(
  "i",
  [*map(quick.long, range(len(FAST)))],
)
def test_fast_dllm_v2_opens_blocks_and_fills_their_parts(i):
  case = golden_cases.load("fast_dllm_v2")
  run, block, mask = FAST[i], FAST[i]["block_size"], case.config["mask_id"]
  (prompt,) = published.prompts(case.arrays[f"run{i}_prompt"])
  calls = case.arrays[f"run{i}_calls"]
  canvases = case.arrays[f"run{i}_canvas"]
  length = ceil(len(prompt), block) + run["max_new_tokens"] // block * block
  got = blockwise(
    "fast_dllm_v2",
    run,
    prompt,
    length,
    block,
    policy=lambda objective: Unmasking(
      objective=objective,
      steps=block,
      selection=SubBlocks(
        width=run["small_block_size"],
        rule=Threshold(value=run["threshold"]),
        cached=run["use_block_cache"],
      ),
      processors=(Temperature(0.0),),
    ),
    cache="block",
  )
  seen = changes(published.history(got, 0))
  # One that only stores a prompt, which ends inside a block, changes nothing.
  want = canvases[1:] if calls[0, 0] == 2 and len(prompt) % block else canvases
  if not (canvases[-1] == mask).any():
    want = want[:-1]  # its token stands past the canvas
  for ours, theirs in zip(seen, want, strict=False):
    np.testing.assert_array_equal(
      ours[: len(theirs)][theirs[: len(ours)] >= 0],
      theirs[: len(ours)][theirs[: len(ours)] >= 0],
    )
  assert len(seen) >= len(want) - 1
  output = case.arrays[f"run{i}_output"][0]
  both = min(len(output), length)
  np.testing.assert_array_equal(got.tokens[0][:both], output[:both])
  # How likely each token was tells calls of a part from those of a block.
  part, checked = run["small_block_size"], 0
  for r, (before, after) in enumerate(zip(canvases[:-1], canvases[1:])):
    if calls[r, 0] < 2:
      (slots,) = np.nonzero((before == mask) & (after != mask) & (after >= 0))
      sure = case.arrays[f"run{i}_confidence"][r][slots % part]
      np.testing.assert_allclose(
        np.exp(got.log_prob[0][slots]), sure, atol=2e-4
      )
      checked += len(slots)
  assert checked


def cached_parts(rows, width=4, block=8, length=40, steps=None, **fields):
  """Returns a generation of which calls read parts of blocks alone."""
  objective = published.replace(
    published.model("fast_dllm_v2").objective, block_size=block, length=length
  )
  return published.run(
    "fast_dllm_v2",
    rows,
    objective=objective,
    length=length,
    block_length=block,
    blocks_from="start",
    cache="block",
    policy=lambda objective: Unmasking(
      objective=objective,
      steps=steps or block,
      selection=SubBlocks(width=width, rule=Threshold(value=0.5), cached=True),
      processors=(Temperature(0.0),),
    ),
    **fields,
  )


@pytest.mark.parametrize("block", [8, quick.long(40)], ids=["blocks", "one"])
def test_rows_at_different_parts_of_their_blocks_do_not_meet(block):
  arrays = golden_cases.load("fast_dllm_v2").arrays
  prompts = [published.prompts(arrays[f"run{i}_prompt"])[0] for i in (4, 5, 2)]
  rows = [prompt + [None] * (40 - len(prompt)) for prompt in prompts]
  rows[2] = rows[2][:33]  # a shorter one
  batch = cached_parts(rows, block=block)
  for i, row in enumerate(rows):
    alone = cached_parts([row], block=block)
    np.testing.assert_array_equal(batch.tokens[i], alone.tokens[0])
    np.testing.assert_array_equal(batch.revealed_at[i], alone.revealed_at[0])
    np.testing.assert_allclose(batch.log_prob[i], alone.log_prob[0], atol=1e-4)
    assert batch.function_evaluations[i] == alone.function_evaluations[0]


def test_parts_that_cannot_be_read_alone_are_refused():
  rows = [[1, 2, None]]
  with pytest.raises(ValueError, match="no divisor of a block of 8"):
    cached_parts(rows, width=3)
  policy = lambda objective: Unmasking(
    objective=objective, steps=8, selection=SubBlocks(cached=True)
  )
  with pytest.raises(ValueError, match="the call before it gives its first"):
    published.run("sdar_moe", rows, policy=policy, length=8)
  with pytest.raises(ValueError, match="leave steps at 8, one a slot, not 6"):
    cached_parts(rows, steps=6)


WEDLM = golden_cases.load("wedlm").config["runs"]


@pytest.mark.parametrize("i", [*map(quick.long, range(len(WEDLM)))])
def test_wedlm_slides_a_window_over_decided_tokens(i):
  case = golden_cases.load("wedlm")
  run, arrays, mask = WEDLM[i], case.arrays, case.config["mask_id"]
  (prompt,) = published.prompts(arrays[f"run{i}_prompt"][None])
  # Its window goes on behind the last token that is asked for.
  count = run["max_tokens"] + 2 * run["window"]
  got = published.run(
    "wedlm",
    [prompt + [None] * count],
    policy=lambda objective: Unmasking(
      objective=objective,
      steps=count,
      score="entropy",
      selection=Sliding(
        width=run["window"],
        bound=run["wedlm_entropy_threshold"] or 0.0,
        penalty=run["wedlm_pos_penalty_factor"],
      ),
      processors=(Temperature(0.0),),
    ),
  )
  filled = arrays[f"run{i}_filled_positions"]
  tokens = arrays[f"run{i}_filled_tokens"]
  for step, (slots, want) in enumerate(zip(filled, tokens, strict=True)):
    slots, want = slots[slots >= 0], want[slots >= 0]
    if step == len(filled) - 1 and not slots.size:
      continue  # which only hands out what is decided
    assert set(np.flatnonzero(got.revealed_at[0] == step)) == set(slots)
    np.testing.assert_array_equal(got.tokens[0][slots], want)
  output = arrays[f"run{i}_output"]
  np.testing.assert_array_equal(got.tokens[0][: len(output)], output)
  assert mask not in got.tokens[0]


def nemotron(**run):
  """Returns the runs of the recorded model that have these options."""
  runs = golden_cases.load("nemotron").config["runs"]
  return [i for i, one in enumerate(runs) if run.items() <= one.items()]


@pytest.mark.parametrize(
  "i",
  [*map(quick.long, nemotron(method="generate", causal_context=True))],
)
def test_nemotron_reads_blocks_both_ways_on_a_causal_context(i):
  case = golden_cases.load("nemotron")
  run, arrays = case.config["runs"][i], case.arrays
  for b, prompt in enumerate(published.prompts(arrays[f"run{i}_prompt"])):
    length = len(prompt) + run["max_new_tokens"]
    selection = Even()
    if run["threshold"] is not None:
      selection = Threshold(value=run["threshold"])
    got = published.run(
      "nemotron",
      [prompt + [None] * run["max_new_tokens"]],
      objective=published.replace(
        published.model("nemotron").objective,
        block_size=run["block_length"],
        length=ceil(length, run["block_length"]),
      ),
      policy=lambda objective: Unmasking(
        objective=objective,
        steps=run["block_length"],
        selection=selection,
        processors=(Temperature(0.0),),
      ),
      block_length=run["block_length"],
      cache="block",
    )
    history = published.history(got, 0)
    kinds, first, width = arrays[f"run{i}_calls"].T
    inputs = arrays[f"run{i}_inputs"][:, b]
    read = [k for k in range(len(kinds)) if kinds[k] == 0]
    masked = [
      (first[k], inputs[k, : width[k]])
      for k in read
      if (inputs[k] == run_mask(case)).any()
    ]
    seen = [canvas for canvas in changes(history)]
    ours = [c for c in seen if not opened(c, len(prompt), run, run_mask(case))]
    for canvas, (at, block) in zip(ours, masked, strict=False):
      np.testing.assert_array_equal(canvas[at : at + len(block)], block)
    output = arrays[f"run{i}_output"][b]
    np.testing.assert_array_equal(history[-1][: len(output)], output)


def run_mask(case):
  return case.config["mask_id"]


def opened(canvas, prompt, run, mask):
  """Whether a canvas is one on which a block is to be opened."""
  at = int(np.argmax(canvas == mask))
  return (at - prompt) % run["block_length"] == 0 and (
    canvas[at : at + run["block_length"]] == mask
  ).all()


EDITS = golden_cases.load("llada22").config["runs"]


@pytest.mark.parametrize(
  "i",
  [quick.long(i) for i, run in enumerate(EDITS) if not run["literal_mask"]],
)
def test_llada22_deletes_and_splits_inside_a_block(i):
  case = golden_cases.load("llada22")
  run, arrays, block = EDITS[i], case.arrays, EDITS[i]["block_size"]
  rows = published.prompts(arrays[f"run{i}_prompt"])
  length = len(rows[0]) // block * block + run["blocks"] * block
  got = published.run(
    "llada22",
    [row + [None] * (length - len(row)) for row in rows],
    objective=published.replace(
      published.model("llada22").objective, length=length
    ),
    policy=lambda objective: InDel(
      objective=objective,
      steps=block,
      threshold=run["threshold"],
      edit_threshold=run["edit_threshold"],
      post_steps=run["max_post_edit_steps"],
    ),
    block_length=block,
    blocks_from="start",
  )
  np.testing.assert_array_equal(got.tokens, arrays[f"run{i}_output"])
  start, after = arrays[f"run{i}_block_start"], arrays[f"run{i}_block_after"]
  done = arrays[f"run{i}_finished"]
  for b in range(len(rows)):
    history, at = published.history(got, b), 0
    for call, first in enumerate(start):
      fresh = call == 0 or start[call - 1] != first
      if not fresh and done[call - 1, b]:
        continue  # a call that stores, or that others of the batch need
      at += 1
      ours = history[at][first : first + block]
      np.testing.assert_array_equal(ours, after[call, b])
    assert at == len(history) - 1
