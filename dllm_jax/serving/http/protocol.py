"""Bodies of requests, in OpenAI's words, and what is legal in them.

Types are strict, numbers have ranges and unknown fields are errors: nothing is
accepted and ignored. What depends on the model is checked in `wishes`.
"""

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from dllm_jax.sampling.options import BIASES


def _whole(text: str) -> str:
  """Raises ValueError for what is no text: half of a character of two."""
  try:
    text.encode()
  except UnicodeEncodeError:
    raise ValueError(
      "it holds half of a surrogate pair, which is no Unicode character"
    ) from None
  return text


Text = Annotated[str, pydantic.AfterValidator(_whole)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
Probability = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Ids = Annotated[
  list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)
]
Stop = Annotated[
  str, Field(min_length=1, max_length=256), pydantic.AfterValidator(_whole)
]
Stops = Annotated[list[Stop], Field(max_length=4)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


class Body(pydantic.BaseModel):
  """A JSON object whose fields are all known."""

  model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
  """What a stream adds."""

  include_usage: bool | None = Field(
    None, description="A last chunk with `usage` and no choices."
  )


class Schema(Body):
  """A JSON schema by name."""

  name: Text | None = None
  description: Text | None = None
  # The keyword of OpenAI's, which pydantic has a method for.
  schema_: dict[str, Any] | bool = Field(True, alias="schema")
  strict: bool | None = Field(
    None, description="Every answer keeps to it, whether this says so or not."
  )


class AnyText(Body):
  """An answer of any form."""

  type: Literal["text"]


class AnyObject(Body):
  """An answer that is a JSON object."""

  type: Literal["json_object"]


class OfSchema(Body):
  """An answer that a JSON schema admits."""

  type: Literal["json_schema"]
  json_schema: Schema


ResponseFormat = Annotated[
  AnyText | AnyObject | OfSchema, Field(discriminator="type")
]
Choices = Annotated[list[Text], Field(min_length=1, max_length=1024)]


class StructuredOutputs(Body):
  """The form of an answer, as vLLM's clients ask for it; one of these."""

  json_: dict[str, Any] | bool | Text | None = Field(None, alias="json")
  regex: Text | None = None
  choice: Choices | None = None


class Common(Body):
  """What completions and chats have in common."""

  model: Text = Field(description="The name that `GET /v1/models` lists.")
  max_tokens: Count | None = Field(
    None, description="Slots to fill after the prompt, in tokens."
  )
  n: Count | None = Field(1, description="Answers to each prompt.")
  stop: Stop | Stops | None = Field(
    None,
    description="Up to 4 strings, of which the first ends the answer and is left "
    "out of it.",
  )
  seed: Seed | None = Field(
    None,
    description="Decides the draws: equal requests with equal seeds have equal "
    "answers. By default a new one each time.",
  )
  temperature: Temperature | None = Field(
    None,
    description="Divides the logits; 0 takes the best token. By default the "
    "preset's.",
  )
  top_p: Probability | None = Field(
    None, description="Draw among the fewest tokens of this probability."
  )
  top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(
    None, description="Draw among the k best tokens; 0 for all."
  )
  min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = (
    Field(None, description="Draw among tokens so probable beside the best.")
  )
  repetition_penalty: (
    Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None
  ) = Field(
    None, description="Above 1 makes tokens that stand in the row rarer."
  )
  min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(
    None, description="Tokens in which nothing ends the answer."
  )
  presence_penalty: Penalty | None = Field(
    None, description="Taken from the logit of a token that the answer has."
  )
  frequency_penalty: Penalty | None = Field(
    None, description="The same for each time that the answer has it."
  )
  logit_bias: (
    Annotated[dict[TokenId, Bias], Field(max_length=BIASES)] | None
  ) = Field(None, description="Added to logits, by token id.")
  stream: bool | None = Field(
    None, description="Send text as it becomes final, as server-sent events."
  )
  stream_options: StreamOptions | None = Field(
    None, description="Only with `stream`."
  )
  stream_drafts: bool | None = Field(
    None,
    description="Only with `stream`: send the canvas after each network call, in "
    "events named `draft`.",
  )
  preset: Text | None = Field(
    None, description="A published sampler: the server's."
  )
  steps: Count | None = Field(
    None,
    description="Network calls for each block, at most: as many as the server's, "
    "or fewer, which is quicker.",
  )
  threshold: Probability | None = Field(
    None, description="Reveal all slots at least so sure."
  )
  block_length: Count | None = Field(
    None,
    description="Slots sampled together, from left to right: the server's.",
  )
  response_format: ResponseFormat | None = Field(
    None, description="`text`, `json_object`, or `json_schema` with a schema."
  )
  structured_outputs: StructuredOutputs | None = Field(
    None, description="vLLM's: `json`, `regex` or `choice`."
  )
  guided_json: dict[str, Any] | bool | Text | None = Field(
    None, description="vLLM's older name of `structured_outputs.json`."
  )
  guided_regex: Text | None = Field(
    None, description="vLLM's older name of `structured_outputs.regex`."
  )
  guided_choice: Choices | None = Field(
    None, description="vLLM's older name of `structured_outputs.choice`."
  )


class Completion(Common):
  """`POST /v1/completions`."""

  prompt: (
    Text
    | Ids
    | Annotated[list[Text], Field(min_length=1)]
    | Annotated[list[Ids], Field(min_length=1)]
    | None
  ) = Field(
    None,
    description="Text to continue, or token ids, or a list of either; empty text "
    "for one from nothing.",
  )
  suffix: Text | None = Field(
    None, description="Text that follows what is written: infilling."
  )
  infill: Text | None = Field(
    None,
    description="Instead of a prompt, a text with gaps such as `[MASK*8]`, in "
    "tokens; the answer is the whole text.",
  )
  max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(
    None,
    description="Slots to fill after the prompt, in tokens; 0 with `echo` and "
    "`logprobs`, for those of the prompt alone.",
  )
  echo: bool | None = Field(
    None, description="Put the prompt (and the suffix) around the answer."
  )
  logprobs: Annotated[int, Field(ge=0, le=5)] | None = Field(
    None,
    description="Log-probability of each token at the call that committed it, "
    "and of so many best ones there. With `echo` those of the prompt before it, "
    "read from left to right.",
  )


class Part(Body):
  """A piece of a message."""

  type: Literal["text"]
  text: Text


class Message(Body):
  """One turn of a conversation."""

  role: Literal["system", "developer", "user", "assistant"] = Field(
    description="`developer` is what templates call system."
  )
  content: Text | Annotated[list[Part], Field(min_length=1)]

  def plain(self) -> dict[str, Any]:
    """Returns the message as chat templates read it."""
    parts = [self.content] if isinstance(self.content, str) else None
    parts = parts or [part.text for part in self.content]
    role = "system" if self.role == "developer" else self.role
    return {"role": role, "content": "".join(parts)}


class Chat(Common):
  """`POST /v1/chat/completions`."""

  messages: Annotated[list[Message], Field(min_length=1)] = Field(
    description="The conversation, written out by the model's own template."
  )
  max_completion_tokens: Count | None = Field(
    None, description="The newer name of `max_tokens`."
  )
  logprobs: bool | None = Field(
    None,
    description="Log-probability of each token at the call that committed it.",
  )
  top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
    None, description="And of so many best ones there; wants `logprobs`."
  )


class Tokenize(Body):
  """`POST /tokenize`: a prompt or messages as token ids."""

  model: Text | None = None
  prompt: Text | None = None
  messages: Annotated[list[Message], Field(min_length=1)] | None = None
  add_special_tokens: bool | None = Field(
    True, description="Whether a prompt begins with what texts begin with."
  )


class Detokenize(Body):
  """`POST /detokenize`: token ids as text."""

  model: Text | None = None
  tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field()]


class Problem(pydantic.BaseModel):
  """What was wrong."""

  message: str
  type: str
  param: str | None
  code: str | None


class Failure(pydantic.BaseModel):
  """The body of every answer whose status is not 200."""

  error: Problem
