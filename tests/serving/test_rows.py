"""What the host makes of a row, and where a request goes: by hand, no network."""

import math

import numpy as np
import pytest

from dllm_jax.sampling.policies.guidance import Guidance
from dllm_jax.serving.admission import Admission, Place
from dllm_jax.serving.rows import Row
from tests.sampling.small import LENGTH, MASK
from tests.sampling.test_invariance import exact

END, NOT_YET = 9, MASK


def row(canvas, **fields):
  return Row(canvas, before=0, ends=(END,), mask_id=MASK, **fields)


def seen(row, tokens, final, calls=1, tops=None):
  """What a row tells of a canvas; `final` as "x" where slots stay."""
  tokens = np.array(tokens)
  stays = np.array([mark == "x" for mark in final])
  sure = -np.arange(len(tokens), dtype=np.float32)
  return row.committed(tokens, stays, sure, tops, calls)


def test_a_row_is_told_from_the_left_as_far_as_it_is_final():
  asked = row([1, 2, None, None, 5, None])
  assert seen(asked, [1, 2, MASK, 7, 5, MASK], "xx.xx.") is None
  told = seen(asked, [1, 2, 6, 7, 5, MASK], "xxxxx.", calls=2)
  assert (told.slots, told.tokens) == ((2, 3, 4), (6, 7, 5))
  assert told.log_probs == (-2.0, -3.0, None)
  assert not asked.over
  told = seen(asked, [1, 2, 6, 7, 5, 8], "xxxxxx", calls=3)
  assert told.tokens == (8,) and asked.over and not asked.ended
  usage = asked.usage
  assert (usage.prompt, usage.completion, usage.calls) == (3, 3, 3)


def test_a_row_is_over_at_its_end_but_for_what_was_given():
  asked = row([1, None, None, None, 5])
  told = seen(asked, [1, 6, END, MASK, 5], "xxx.x")
  assert (told.slots, told.tokens) == ((1, 4), (6, 5))
  assert asked.over and asked.ended and asked.usage.completion == 1
  given = row([END, None])
  assert seen(given, [END, 3], "xx").tokens == (3,) and not given.ended


def test_slots_before_a_template_do_not_count():
  asked = Row([0, 1, 2, None], before=1, ends=(), mask_id=MASK, cached=2)
  assert seen(asked, [0, 1, 2, 4], "xxxx").slots == (2,)
  assert (asked.usage.prompt, asked.usage.cached) == (2, 1)


def test_the_likeliest_tokens_leave_out_what_cannot_be():
  ids = np.array([[0, 0], [3, 4]])
  sure = np.array([[0.0, 0.0], [-0.5, -math.inf]])
  told = seen(row([1, None]), [1, 3], "xx", tops=(ids, sure))
  assert told.tops == (((3, -0.5),),)


def test_a_draft_shows_masks_and_tells_nothing_of_what_was_given():
  asked = row([1, None, 5, None])
  draft = asked.draft(np.array([1, MASK, 5, 7]), np.array([0, 0, 0, -0.25]))
  assert draft.tokens == (None, 5, 7)
  assert draft.log_probs == (None, None, -0.25)


def admission(name="threshold", **fields):
  spec = exact(name, "block", **fields)
  return Admission(spec, rows=3, widths=(8, 16, LENGTH))


PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, None, None]


def test_a_prefix_is_found_in_whole_blocks_wherever_it_is():
  known = admission()
  assert known.place(PROMPT, [0, 1, 2]) == Place(row=0, source=0, width=8)
  # Row 0 runs: its blocks go to another row, all that the prompt fills.
  assert known.place(PROMPT, [1, 2]) == Place(row=1, source=0, start=8)
  other = [*PROMPT[:5], 17, 17, 17, 17, None]
  assert known.place(other, [2]) == Place(row=2, source=0, start=4, width=8)
  known.keeps(0, range(1, 13))  # what was written counts as well
  longer = [*range(1, 13), 2, None]
  assert known.place(longer, [0]) == Place(row=0, source=0, start=12)
  known.keeps(0, ())  # it failed
  known.keeps(1, ())
  assert known.place(PROMPT, [0, 1]).start == 4


def test_a_row_that_was_given_away_long_ago_is_given_away_first():
  known = admission()
  for first in (1, 2, 3):
    known.place([first] * 4 + [None], [0, 1, 2])
  assert known.place([7] * 4 + [None], [0, 1, 2]).row == 0
  assert known.place([3] * 4 + [None], [0, 1, 2]) == Place(
    row=2, source=2, start=4
  )


def test_what_is_put_into_a_cache_ends_in_it():
  known = admission()
  long = [5] * 12 + [None]
  known.place(long, [0])
  place = known.place([5] * 12 + [6] * 10 + [None], [1])
  assert place == Place(row=1, source=0, start=12, width=8)
  wide = known.place([5] * 4 + [7] * 17 + [None], [2])
  assert wide.width == 16 and wide.start + wide.width <= LENGTH + 4
  assert wide.start <= 4


def test_the_next_token_is_not_in_an_autoregressive_cache():
  known = admission("autoregressive")
  assert known.place([0, 3, 4, None], [0]) == Place(row=0, source=0, width=8)
  assert known.place([0, 3, 4, None], [1]) == Place(row=1, source=0, start=2)


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_guided_rows_share_nothing(scale):
  known = admission(guidance=Guidance(scale=scale))
  known.place(PROMPT, [0])
  assert known.place(PROMPT, [1]).start == (0 if scale else 8)
