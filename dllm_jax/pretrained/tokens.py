"""Special tokens of a published folder: its config's and its tokenizer's.

They come from files that are written apart. A mask that they disagree about
spoils every sample, and is an error; another end or pad token may be meant
(chat models end a turn with another token than a text), and is a warning. What a
text begins with is the tokenizer's own business, and no config is asked.
"""

import dataclasses
import warnings

from dllm_jax.core.paths import Path
from dllm_jax.data.huggingface import has_tokenizer, HuggingFace, huggingface
from dllm_jax.data.images.texts import joined
from dllm_jax.data.numbers import Numbers
from dllm_jax.data.tokenizer import Tokenizer
from dllm_jax.pretrained import files
from dllm_jax.pretrained.families import Family, has_mask, Ids
from dllm_jax.pretrained.fields import Fields

_FIELDS = {
  "mask": ("mask_token_id", "mask_index"),
  "end": ("eos_token_id",),
  "pad": ("pad_token_id",),
}


def read(
  folder: Path, family: Family, fields: Fields, vocab_size: int
) -> HuggingFace | None:
  """Returns the tokenizer of a folder, None if it has none.

  With image tokens behind those of text, where the family has them.

  Raises:
    ValueError: the network has no rows for image tokens.
  """
  if not has_tokenizer(folder):
    return None
  text = huggingface(str(folder))
  if family.codes is None:
    return text
  codes, number = family.codes(fields)
  made = joined(text, codes=codes, tokens=number)
  if made.images.stop > vocab_size:
    raise ValueError(
      f"{fields.path}: {vocab_size} rows have no room for {codes} image tokens"
      f" from {made.images.offset} on, the length of the tokenizer; mend"
      " codebook_size, or fetch the tokenizer again"
    )
  return made


def hint(tokenizer: HuggingFace | None) -> Ids:
  """Returns the special tokens that a tokenizer names."""
  if tokenizer is None:
    return Ids(None)
  named = tokenizer.mask_id <= tokenizer.last_id
  return Ids(
    tokenizer.mask_id if named else None,
    tokenizer.eos_id,
    tokenizer.pad_id,
    tokenizer.bos_id,
  )


def ids(
  family: Family,
  fields: Fields,
  vocab_size: int,
  hint: Ids,
  *,
  mask_id: int | None = None,
) -> Ids:
  """Returns the special tokens: the config's, the tokenizer's, the published.

  Families without a mask among their tokens have the last id for one, and so
  have folders in which nothing names a mask that fits.

  Args:
    family: the family.
    fields: the config.
    vocab_size: the network's tokens.
    hint: what the tokenizer says.
    mask_id: the mask that the caller knows, or None.

  Raises:
    ValueError: one is not in the vocabulary, the end is the mask, or the
      tokenizer names another mask than the caller or the config.
  """
  mask = _mask(fields, hint, mask_id)

  def pick(role: str) -> int | None:
    value = _stated(fields, role)
    if value:
      return value[0]
    published = getattr(family.ids, role)
    for one in (getattr(hint, role), published):
      if one is not None and one < vocab_size:
        return one
    return None

  if mask is None:
    mask = pick("mask")
  if not has_mask(family, fields):  # the mask is no token: one past them
    return Ids(vocab_size, pick("end"), pick("pad"), hint.begin)
  if mask is None:
    mask = vocab_size - 1
  if not isinstance(mask, int) or not 0 <= mask < vocab_size:
    raise ValueError(
      f"{fields.path}: the vocabulary of {vocab_size} tokens is smaller than"
      f" the mask id {mask}; mend vocab_size or mask_token_id"
    )
  found = Ids(mask, pick("end"), pick("pad"), hint.begin)
  _check(found, fields, vocab_size)
  return found


def _mask(fields: Fields, hint: Ids, given: int | None) -> int | None:
  """Returns the mask that the caller or the config names, if one does.

  Warns where both do and they differ.
  """
  stated = _stated(fields, "mask")
  found, where = (stated[0] if stated else None), f"{fields.path} says"
  if given is not None:
    if found not in (None, given):
      warnings.warn(
        f"{fields.path} names the mask {found}, but the mask {given} was asked"
        " for, which is used: leave --mask_id out unless the folder is wrong",
        stacklevel=4,
      )
    found, where = given, "the mask that was asked for is"
  if None not in (found, hint.mask) and found != hint.mask:
    raise ValueError(
      f"{fields.path.parent / 'tokenizer.json'} has the mask {hint.mask}, but"
      f" {where} {found}; mend one of them"
    )
  return found


def ends(
  tokenizer: HuggingFace | None, ids: Ids, vocab_size: int, fields: Fields
) -> tuple[int, ...]:
  """Returns all that ends a row: of `generation_config.json`, else the config's.

  And what the chat template ends an answer with.

  Args:
    tokenizer: the folder's, or None.
    ids: the model's special tokens.
    vocab_size: the network's tokens.
    fields: the config.

  Raises:
    ValueError: one is no token of the model.
  """
  path = fields.path.parent / "generation_config.json"
  own = Fields(files.read_json(path) if path.is_file() else {}, path)
  found = _stated(own, "end") or _stated(fields, "end")
  for one in found:
    if not 0 <= one < vocab_size:
      raise ValueError(
        f"{path if _stated(own, 'end') else fields.path}: the vocabulary of"
        f" {vocab_size} tokens lacks the end id {one}; mend eos_token_id"
      )
  turn = None if tokenizer is None else tokenizer.turn_end_id
  listed = [ids.end, *found, turn]
  some = dict.fromkeys(one for one in listed if one not in (None, ids.mask))
  return tuple(some)


def _stated(fields: Fields, role: str) -> list[int]:
  """Returns the ids that a config states: none, one, or several."""
  value = fields.get(*_FIELDS[role], default=[])
  values = value if isinstance(value, list) else [value]
  for one in values:
    if isinstance(one, bool) or not isinstance(one, int):
      raise ValueError(
        f"{fields.path}: {_FIELDS[role][0]} must be a token id, not {one!r}"
      )
  # Old LLaMA configs write -1 for a token that there is not.
  return [one for one in values if one != -1]


def _check(found: Ids, fields: Fields, vocab_size: int) -> None:
  """Raises ValueError for ids that no text of the model can have."""
  for role in ("end", "pad"):
    one = getattr(found, role)
    if one is not None and not 0 <= one < vocab_size:
      raise ValueError(
        f"{fields.path}: the vocabulary of {vocab_size} tokens lacks the"
        f" {role} id {one}; mend vocab_size or {_FIELDS[role][0]}"
      )
  if found.end == found.mask:
    raise ValueError(
      f"{fields.path}: token {found.mask} is both the mask and the end of a"
      " text; mend mask_token_id or eos_token_id"
    )


def fit(
  tokenizer: HuggingFace | None, ids: Ids, vocab_size: int, fields: Fields
) -> Tokenizer:
  """Returns a tokenizer with the model's own special tokens.

  Args:
    tokenizer: the folder's; None for ids in decimal.
    ids: the model's special tokens.
    vocab_size: the network's tokens.
    fields: the config.

  Raises:
    ValueError: it has more tokens than the network.
  """
  roles = dict(
    pad_id=ids.pad,
    eos_id=ids.end,
    end_ids=ends(tokenizer, ids, vocab_size, fields),
  )
  if tokenizer is None:
    size = max(vocab_size, ids.mask + 1)
    return Numbers(vocab_size=size, mask_id=ids.mask, **roles)
  where = f"{fields.path.parent / 'tokenizer.json'}"
  if tokenizer.last_id >= vocab_size:
    raise ValueError(
      f"{where} has tokens up to {tokenizer.last_id}, but {fields.path} gives"
      f" {vocab_size}; they belong to different models"
    )
  theirs = hint(tokenizer)
  for role in ("end", "pad"):
    stated, other = _stated(fields, role), getattr(theirs, role)
    if other is not None and stated and other not in stated:
      warnings.warn(
        f"{where} has the {role} token {other}, but {fields.path} says"
        f" {stated[0]}, which is used",
        stacklevel=3,
      )
  return dataclasses.replace(
    tokenizer, mask_id=ids.mask, size=vocab_size, **roles
  )
