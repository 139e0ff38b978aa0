"""DreamOn's gaps, which grow and shrink: every recorded canvas."""

import numpy as np
import pytest

from dllm_jax.core.types import Process
from dllm_jax.sampling.options import RowOptions, stack
from dllm_jax.sampling.policies.processors import Banned, Temperature
from dllm_jax.sampling.policies.unmasking import Unmasking
from dllm_jax.sampling.policies.windows.resizing import Resizing
from dllm_jax.sampling.requests import build, text_ids
from dllm_jax.sampling.sampler import Sampler
from tests import golden_cases, quick
from tests.sampling import published

CASE = golden_cases.load("dreamon")
SCORES = {
  "entropy": "entropy",
  "maskgit_plus": "confidence",
  "topk_margin": "margin",
}
BEST = (Temperature(0.0),)


def objective():
  """Returns Dream's objective with the tokens that the case names."""
  return published.replace(
    published.model("dreamon").objective,
    expand_id=CASE.config["expand_id"],
    delete_id=CASE.config["eos_id"],
  )


def template(run, tokens):
  """Returns a row with the gap's room, and the gap's slots."""
  first, room = run["prefix"], run["max_gen_len"]
  last = first + run["min_gen_len"]
  row = tokens[:first] + [None] * room + tokens[last:]
  return row, slice(first, first + room)


def policy(run, **fields):
  """Returns how a recorded run fills its gap."""
  if run["fixed"]:
    return lambda objective: Unmasking(
      objective=objective,
      steps=run["max_gen_len"],
      score=SCORES[run["alg"]],
      filters=(Banned((CASE.config["expand_id"],)),),
      processors=BEST,
    )
  return lambda objective: Resizing(
    objective=objective,
    steps=run["steps"],
    start=run["min_gen_len"],
    score=SCORES[run["alg"]],
    ends=run["pad_eos_to_right"],
    deletes=run["delete_eos_token"],
    processors=BEST,
    **fields,
  )


def followed(i, start):
  """Returns how sure a recorded run was of each token of its gap."""
  arrays, masks = CASE.arrays, [None] * start
  proposals = arrays[f"run{i}_proposal"], arrays[f"run{i}_confidence"]
  for token, sure in zip(*proposals, strict=True):
    left = [slot for slot, known in enumerate(masks) if known is None]
    best = int(np.argmax(sure[: len(left)]))
    slot = left[best]
    if token[best] == CASE.config["expand_id"]:
      masks.insert(slot, None)
    elif token[best] == CASE.config["eos_id"]:
      del masks[slot]
    else:
      masks[slot] = sure[best]
  return masks


RUNS = range(len(CASE.config["runs"]))


@pytest.mark.parametrize("i", [quick.long(i) for i in RUNS])
def test_every_canvas_of_a_gap(i):
  run, arrays = CASE.config["runs"][i], CASE.arrays
  (tokens,) = published.prompts(arrays[f"run{i}_input"])
  row, gap = template(run, tokens)
  got = published.run(
    "dreamon", [row], objective=objective(), policy=policy(run)
  )
  fixed = len(row) - run["max_gen_len"]
  history = published.history(got, 0)
  canvases, window = arrays[f"run{i}_canvas"], arrays[f"run{i}_window"]
  if run["fixed"]:  # whose last row is the call that finds no mask
    np.testing.assert_array_equal(history, canvases)
    return
  assert len(history) == len(canvases) + 1
  for ours, want, seen in zip(history, canvases, window, strict=False):
    live = gap.start + int(seen) - fixed
    ours = np.concatenate([ours[:live], ours[gap.stop :]])
    np.testing.assert_array_equal(ours, want[:seen])
  length = int(arrays[f"run{i}_length"])
  output = arrays[f"run{i}_output"]
  answer = history[-1][gap]
  np.testing.assert_array_equal(
    answer[:length], output[gap.start : gap.start + length]
  )
  if run["alg"] == "maskgit_plus":  # whose confidence is a probability
    sure = np.array(followed(i, run["min_gen_len"]))
    # How likely a token was goes with it, wherever it is pushed. (Theirs might
    # have drawn the mask, which is as good as impossible.)
    ours = np.exp(got.log_prob[0][gap][:length])
    np.testing.assert_allclose(ours, sure, rtol=0.05)
  # Room that is not used holds what ends a text, and is no text.
  end = CASE.config["eos_id"]
  assert (answer[length:] == end).all()
  if run["delete_eos_token"]:
    suffix = tokens[run["prefix"] + run["min_gen_len"] :]
    want = [*output[: gap.start + length], *suffix]
    assert text_ids(got.tokens[0], row, (end,)) == want


@pytest.fixture(scope="module")
def gaps():
  """Returns what samples rows of several gaps, and their templates."""
  begin, end = CASE.config["hf_config"]["bos_token_id"], CASE.config["eos_id"]
  rows = [
    [begin, 3, *[None] * 6, 9, 7, *[None] * 5, 21, end],
    [begin, 8, 14, *[None] * 12, 5],
    [begin, *[None] * 3, 17, 6, 40, *[None] * 9],
  ]
  word = objective()
  sampler = Sampler(
    policy=Resizing(objective=word, steps=40, start=3, top=2), length=18
  )
  model = published.model("dreamon")
  options = [RowOptions(temperature=1.3, seed=s) for s in range(len(rows))]

  def sample(keep):
    requests = build(
      [rows[i] for i in keep],
      objective=word,
      length=18,
      request=keep,
      options=stack(
        [options[i] for i in keep], defaults=RowOptions(), objective=word
      ),
    )
    return published.quick(
      sampler, model.denoiser, model.params, Process(), None, requests,
      trace=True,
    )  # fmt: skip

  return sample, rows


@pytest.mark.all
def test_gaps_grow_apart_and_rows_are_their_own(gaps):
  sample, rows = gaps
  together = sample(range(3))
  mask, expand = CASE.config["mask_id"], CASE.config["expand_id"]
  for b, row in enumerate(rows):
    free = np.array([token is None for token in row])
    tokens = together.tokens[b][: len(row)]
    given = np.array([token or 0 for token in row])
    np.testing.assert_array_equal(tokens[~free], given[~free])
    assert mask not in tokens and expand not in tokens
  for b in range(3):
    alone = sample([b])
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[b])


@pytest.mark.parametrize(
  "fields",
  [{"start": 0}, {"score": "luck"}, {"objective": "plain"}],
  ids=str,
)
def test_what_cannot_be_resized_is_refused(fields):
  word = objective()
  plain = published.replace(word, expand_id=None)
  if "objective" in fields:
    fields = {"objective": plain}
  with pytest.raises(ValueError, match=r"start|score|expand_id"):
    Resizing(**({"objective": word, "steps": 8} | fields))
  with pytest.raises(ValueError, match="seen whole"):
    Sampler(policy=Resizing(objective=word, steps=8), length=8, block_length=4)
  with pytest.raises(ValueError, match="the vocabulary"):
    published.replace(word, expand_id=word.vocab_size)
