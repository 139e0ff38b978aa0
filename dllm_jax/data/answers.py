"""Prompts with their answers, as rows to fine-tune on.

    prompt  a b c | answer  d e     length 8, eos $
    tokens  a b c d e $ $ $
    counts  . . . 1 1 1 1 1         `Batch.loss_mask`

What counts may be corrupted: a prompt is never masked, and the end-of-text that
fills a row belongs to its answer (arXiv:2502.09992, sec. 2.3), so that a model
learns where to stop. With `normalisation="sequence"` an objective divides each
row's loss by what counts in it.
"""

from collections.abc import Sequence

import numpy as np

from dllm_jax.core.types import Batch


def answer_batch(
  pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
  *,
  length: int,
  eos_id: int,
) -> Batch:
  """Returns a batch of `(prompt ids, answer ids)`, a row each.

  Args:
    pairs: what is given and what is to be learned.
    length: tokens of a row.
    eos_id: the end-of-text token.

  Raises:
    ValueError: a pair leaves no room for one end-of-text token.
  """
  tokens = np.full((len(pairs), length), eos_id, np.int32)
  given = np.zeros(len(pairs), np.int32)
  for row, (prompt, answer) in enumerate(pairs):
    ids = [*prompt, *answer]
    if len(ids) >= length:
      raise ValueError(
        f"pair {row} has {len(ids)} tokens; rows of {length} hold at most "
        f"{length - 1} and an end-of-text: shorten it or raise length"
      )
    tokens[row, : len(ids)], given[row] = ids, len(prompt)
  slots = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
  return Batch(
    tokens=tokens,
    loss_mask=slots >= given[:, None],
    segment_ids=np.ones_like(tokens),
    positions=slots,
  )
