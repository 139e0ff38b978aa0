"""What one request, and all of them together, may take; and refusals."""

from collections.abc import Mapping
import dataclasses
import types

from dllm_jax.core import check

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """What is allowed.

  Attributes:
    body_bytes: of a request.
    body_seconds: until it has arrived.
    choices: answers to one request, its prompts times `n`.
    concurrent: requests that are answered or wait at once.
    seconds: of an answer, from the request to its last byte.
    drain_seconds: that answers have to end in, once the server is told to stop.
  """

  body_bytes: int = 2**20
  body_seconds: float = 30.0
  choices: int = 8
  concurrent: int = 256
  seconds: float = 600.0
  drain_seconds: float = 30.0

  def __post_init__(self):
    check.at_least(self, 1, "body_bytes", "choices", "concurrent")


class Refusal(Exception):  # noqa: N818  An answer, not a mistake of the server.
  """A request that is not served, in OpenAI's form.

  Attributes:
    message: what was wrong, what is legal, what to do.
    status: of HTTP.
    param: the field, or None.
    code: a word for programs, or None.
    headers: of the answer.
  """

  def __init__(
    self,
    message: str,
    *,
    status: int = 400,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] = types.MappingProxyType({}),
  ):
    super().__init__(message)
    self.message, self.status = message, status
    self.param, self.code, self.headers = param, code, headers

  def body(self) -> dict:
    """Returns the body of the answer."""
    if self.status >= 500:
      kind = "server_error"
    else:
      kind = _TYPES.get(self.status, "invalid_request_error")
    # What was sent may hold halves of characters, which JSON cannot.
    message = self.message.encode(errors="replace").decode()
    param = self.param and self.param.encode(errors="replace").decode()
    return {
      "error": {
        "message": message,
        "type": kind,
        "param": param,
        "code": self.code,
      }
    }
