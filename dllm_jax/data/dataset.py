"""What a config says of its data: the section `data`."""

from collections.abc import Sequence
import dataclasses
import typing
from typing import Literal

from dllm_jax.data import packing as packing_lib
from dllm_jax.data import source
from dllm_jax.data.images.pictures import Fit

Format = Literal[
  "text",
  "messages",
  "conversations",
  "prompt_completion",
  "instruction",
  "question_answer",
  "preferences",
  "images",
  "pixels",
]
Supervise = Literal["all", "last"]
TooLong = Literal["drop", "left", "cut"]
_CHOICES = {
  "image_fit": Fit,
  "format": Format,
  "supervise": Supervise,
  "too_long": TooLong,
}
# What a part of a mixture is made of.
_PART = [[str, w, *rest] for w in (int, float) for rest in ([], [str])]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
  """What to train on.

  Attributes:
    path: the name of a bundled text ("shakespeare"); a file, a directory or a
      glob, here or in a bucket, of any form in docs/data.md; a directory that
      `prepare` made; or "random" for random tokens, to measure speed.
    mixture: several corpora in place of `path`: (path, weight) or (path,
      weight, text_field) of each. Weights are shares of the rows, in any unit.
    tokenizer: "char", "byte", "bpe:N" for N tokens of byte pairs learned from
      the training text, the mask included, or the path of a tokenizer.json;
      None: that of prepared data, "char" for text; token files need the one
      that made them. "numbers:N" for N ids without a text.
    mask_token: the mask among the tokens of a tokenizer.json; None: a new id.
    length: tokens a row.
    packing: "slices" cuts everything as one text; "packed" keeps documents
      apart, several a row. Prepared data has its own.
    held_out: the fraction that is held out; see `source.split`. Prepared data
      has its own.
    held_out_path: text to hold out instead, beside all of `path` in training.
    text_field: the field or column of the text; `a.b` is field b of a.
    document_separator: what stands between documents of a text file; None: each
      file is one text.
    virtual_shards: into how many streams text packed on the fly is dealt,
      reduced to its largest divisor in common with the batch size. A multiple
      of the number of processes.
    in_memory_bytes: files of documents larger than this in all are packed on
      the fly, of conversations are refused. "slices" of running text are always
      held in memory.
    format: the form of conversations (docs/finetuning.md), or "text" for a field
      of text; None: known from the fields of the records. "images": pictures with
      texts, as tokens; "pixels": their pixels, to train an image tokenizer.
    template: a file with the chat template of conversations; None: that of the
      tokenizer.
    supervise: which answers of a conversation count.
    too_long: what becomes of conversations longer than a row: "drop" leaves them
      out, "left" leaves out the beginning of the prompt, "cut" the end.
    skip_bad: whether conversations that cannot be trained on are left out and
      counted; if not, the first one is an error.
    image_tokenizer: what turns pictures into tokens, for "images": a folder in
      `showlab/magvitv2`'s layout, or the run that trained one on "pixels".
    image_size: pixels of a picture's side, for "images" and "pixels"; 0: of rows
      of pixels, as many as `length` says.
    image_fit: how a picture becomes a square: its middle ("crop"), pressed into
      one ("squash"), or with white around it ("pad").
    question: what is asked of a picture that has a caption.
  """

  path: str = "shakespeare"
  mixture: tuple[tuple[str, float] | tuple[str, float, str], ...] = ()
  tokenizer: str | None = None
  mask_token: str | None = None
  length: int = 128
  packing: packing_lib.Packing = "slices"
  held_out: float = 0.1
  held_out_path: str | None = None
  text_field: str = "text"
  document_separator: str | None = None
  virtual_shards: int = 64
  in_memory_bytes: int = 2**28
  format: Format | None = None
  template: str | None = None
  supervise: Supervise = "all"
  too_long: TooLong = "drop"
  skip_bad: bool = False
  image_tokenizer: str | None = None
  image_size: int = 0
  image_fit: Fit = "crop"
  question: str = "What is this?"

  def __post_init__(self):
    packing_lib.check(self.packing, self.length, self.held_out)
    if self.image_size < 0:
      raise ValueError(f"image_size must be at least 0, not {self.image_size}")
    if self.virtual_shards < 1:
      raise ValueError(
        f"virtual_shards is {self.virtual_shards}; at least one is needed"
      )
    for name, legal in _CHOICES.items():
      value = getattr(self, name)
      if value is not None and value not in typing.get_args(legal):
        raise ValueError(
          f"data.{name} {value!r} is unknown; legal: "
          + ", ".join(typing.get_args(legal))
        )
    for part in self.mixture:
      if (
        not isinstance(part, Sequence)
        or [type(v) for v in part] not in _PART
        or part[1] <= 0
      ):
        raise ValueError(
          f"mixture has {part!r}; a part is (path, weight) or (path, weight, "
          "text_field), the weight above 0"
        )

  @property
  def parts(self) -> tuple["Dataset", ...]:
    """The corpora of the mixture, or this one alone."""
    return tuple(
      dataclasses.replace(
        self,
        path=path,
        mixture=(),
        text_field=field[0] if field else self.text_field,
      )
      for path, _, *field in self.mixture
    ) or (self,)

  @property
  def held_out_of_path(self) -> float:
    """The fraction of `path` itself that is held out."""
    return 0.0 if self.held_out_path else self.held_out

  @property
  def form(self) -> source.Format:
    """How documents lie in the files."""
    return source.Format(
      text_field=self.text_field, document_separator=self.document_separator
    )
