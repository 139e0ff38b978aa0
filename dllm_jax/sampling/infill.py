"""Infill templates: text with spans to be written, `"To be [MASK*8] not"`."""

import re

from dllm_jax.data.tokenizer import Tokenizer

_OPEN = re.compile(r"\[MASK")
_SPAN = re.compile(r"\[MASK(?:\*([0-9]+))?\]")


def parse(template: str, tokenizer: Tokenizer) -> list[int | None]:
  """Returns token ids, with None at each slot of a mask span.

  `[MASK]` is one slot and `[MASK*n]` is n of them, counted in tokens. The text
  around spans, spaces included, gets the ids that it has in the whole.

  Args:
    template: text with at least one span.
    tokenizer: text to tokens.

  Raises:
    ValueError: a span is malformed or empty, or there is none.
  """
  parts: list[str | int] = []
  at = 0
  while (found := _OPEN.search(template, at)) is not None:
    span = _SPAN.match(template, found.start())
    if span is None:
      raise ValueError(
        f"malformed mask span {template[found.start() :][:16]!r}: write [MASK] "
        "for one token or [MASK*8] for eight"
      )
    count = 1 if span[1] is None else int(span[1])
    if count < 1:
      raise ValueError(f"empty mask span {span[0]}: ask for at least one token")
    parts += [template[at : found.start()], count]
    at = span.end()
  if not parts:
    raise ValueError(
      f"the template {template[:40]!r} has no mask span: write [MASK*8] where "
      "eight tokens are wanted"
    )
  return tokenizer.encode_spans([*parts, template[at:]])
