"""What single tokens are called, and the bytes of text that they stand for."""

from collections.abc import Sequence
import functools
import json
import re

from dllm_jax.data.numbers import Numbers
from dllm_jax.data.tokenizer import Bytes, Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Spelling:
  """What single tokens are called, and the bytes that they stand for.

  Args:
    tokenizer: ids to text.
  """

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    self._decoder = json.dumps(
      _definition(tokenizer).get("decoder"), ensure_ascii=False
    )
    self._byte_level = '"ByteLevel"' in self._decoder
    self._spaced = "\u2581" in self._decoder
    self._fallback = '"ByteFallback"' in self._decoder
    self._special = getattr(tokenizer, "special_ids", frozenset())

  @functools.cached_property
  def bytes_alone(self) -> frozenset[int]:
    """The tokens that are one byte, where a run of bytes is decoded as one."""
    if not self._fallback:
      return frozenset()
    vocabulary = _definition(self._tokenizer)["model"]["vocab"]
    pairs = vocabulary.items() if isinstance(vocabulary, dict) else ()
    return frozenset(i for name, i in pairs if _BYTE.fullmatch(name))

  @functools.lru_cache(maxsize=65_536)  # noqa: B019  As old as the server.
  def bytes_of(self, token: int) -> bytes:
    """Returns the bytes of a token by itself."""
    if isinstance(self._tokenizer, Bytes) and token < 256:
      return bytes([token])
    if not hasattr(self._tokenizer, "name_of"):
      return self._tokenizer.decode([token]).encode(errors="replace")
    return self._bytes(token, self._tokenizer.name_of(token) or "")

  def _bytes(self, token: int, name: str) -> bytes:
    if token in self._special:
      return name.encode()
    if self._fallback and (one := _BYTE.fullmatch(name)):
      return bytes([int(one[1], 16)])
    if self._byte_level and all(c in _byte_names() for c in name):
      return bytes(_byte_names()[c] for c in name)
    return (name.replace("\u2581", " ") if self._spaced else name).encode()

  def text_of(self, token: int) -> str:
    """Returns a token as text; bytes that are no characters become U+FFFD."""
    return self.bytes_of(token).decode(errors="replace")

  def written(self) -> Sequence[bytes]:
    """Returns the bytes that each token adds to a text; none for those of no text.

    Raises:
      ValueError: what a token adds depends on those beside it.
    """
    tokenizer = self._tokenizer
    if isinstance(tokenizer, Numbers):
      raise ValueError(
        "a language is one of texts, and this model has no tokenizer: put a"
        " tokenizer.json beside its weights"
      )
    silent = {tokenizer.mask_id, *tokenizer.end_ids, *self._special}
    silent |= {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}
    ids = range(tokenizer.vocab_size)
    if not hasattr(tokenizer, "name_of"):
      return [b"" if i in silent else self.bytes_of(i) for i in ids]
    legal = self._byte_level or self._spaced or self._fallback
    if not legal or "WordPiece" in self._decoder or tokenizer.tidies_spaces:
      raise ValueError(
        "the text of this tokenizer's tokens depends on the tokens beside them"
        " (its decoder is neither byte-level nor SentencePiece's): a language"
        " cannot be followed token by token"
      )
    name = tokenizer.name_of
    return [b"" if i in silent else self._bytes(i, name(i) or "") for i in ids]


@functools.lru_cache(maxsize=4)
def spelling(tokenizer: Tokenizer) -> Spelling:
  """Returns the spelling of a tokenizer, made once."""
  return Spelling(tokenizer)


def _definition(tokenizer: Tokenizer) -> dict:
  return json.loads(getattr(tokenizer, "definition", "{}"))


@functools.cache
def _byte_names() -> dict[str, int]:
  """Returns the characters by which byte-level vocabularies name bytes.

  Printable bytes of Latin-1 are themselves; the others are the characters from
  U+0100 on, in order (GPT-2).
  """
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  names = {chr(byte): byte for byte in printable}
  others = (byte for byte in range(256) if byte not in printable)
  return names | {chr(256 + i): byte for i, byte in enumerate(others)}
