"""Byte pairs: how text is cut into words, and merges learned from a text.

Every byte has a token, so that any text is encoded and comes back as it was. The
pairs that are most frequent inside words become tokens of their own, one after
another. A function of the text and the size alone.
"""

from collections.abc import Iterable, Iterator

# How Qwen 2 and its descendants cut text into words.
QWEN_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The same, but that the end of a line is never one word with punctuation before
# it: "ROMEO:" as a prompt is then cut as it is in the text.
_WORDS = QWEN_WORDS.replace(r"]+[\r\n]*", "]+")
EXPRESSIONS = (QWEN_WORDS, _WORDS)
_BYTES = 256
_ENOUGH_CHARACTERS = 2**26
_PIECE_CHARACTERS = 2**20  # that are learned from at once


def byte_level(model, words: str | None):
  """Returns a tokenizer of bytes over a model of the tokenizers package.

  Args:
    model: the merges.
    words: the expression that cuts words, None for GPT-2's own.
  """
  import tokenizers  # noqa: PLC0415  Slow to import; most uses do without.
  from tokenizers import decoders, pre_tokenizers  # noqa: PLC0415

  made = tokenizers.Tokenizer(model)
  level = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=words is None
  )
  if words is not None:
    split = pre_tokenizers.Split(tokenizers.Regex(words), "isolated")
    level = pre_tokenizers.Sequence([split, level])
  made.pre_tokenizer, made.decoder = level, decoders.ByteLevel()
  return made


def learn(texts: Iterable[str], size: int, *, path: str = "the text") -> str:
  """Returns the tokenizer.json of byte pairs learned from texts.

  Args:
    texts: the texts.
    size: the number of tokens, at least one for each byte.
    path: where the texts are from, for messages.

  Raises:
    ValueError: the texts have no pairs for so many.
  """
  from tokenizers import models, pre_tokenizers, trainers  # noqa: PLC0415

  made = byte_level(models.BPE(), _WORDS)
  trainer = trainers.BpeTrainer(
    vocab_size=size,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  made.train_from_iterator(
    (p for text in texts for p in _pieces(text)), trainer
  )
  found = made.get_vocab_size()
  if found == _BYTES < size:
    raise ValueError(
      f"{path} is too short to learn byte pairs from; give more text, or use "
      "tokenizer 'byte'"
    )
  if found < size:
    raise ValueError(
      f"{path} has pairs for no more than bpe:{found + 1}, not bpe:{size + 1}; "
      "lower the size, or give more text"
    )
  return made.to_str()


def beginning(texts: Iterable[str]) -> Iterator[str]:
  """Yields texts up to what is enough to learn from."""
  left = _ENOUGH_CHARACTERS
  for text in texts:
    yield text[:left]
    left -= len(text)
    if left <= 0:
      return


def _pieces(text: str) -> Iterator[str]:
  """Yields a text in pieces of bounded size, cut after a line if possible."""
  start = 0
  while start < len(text):
    stop = start + _PIECE_CHARACTERS
    if stop < len(text):
      stop = text.rfind("\n", start, stop) + 1 or stop
    yield text[start:stop]
    start = stop
