"""One answer as it comes: text when it is final, and no more kept than that."""

import types

from dllm_jax.data.tokenizer import Bytes
from dllm_jax.serving.http.answer import Answer
from dllm_jax.serving.http.wishes import Wish, Wishes
from dllm_jax.serving.requests import Committed, Draft, Finished, Request, Usage

MODEL = types.SimpleNamespace(tokenizer=Bytes())


class Ticket:
  cancelled = 0

  def cancel(self):
    self.cancelled += 1


def answer(slots: int, **fields) -> tuple[Answer, Ticket, list]:
  told, ticket = [], Ticket()
  wish = Wish(request=Request(template=(None,) * slots), last=slots - 1)
  wishes = Wishes(answers=[wish], **fields)
  made = Answer(wish, wishes, MODEL, lambda: told.append(1))
  made.holds(ticket)
  return made, ticket, told


def committed(text: bytes, at: int = 0) -> Committed:
  slots = tuple(range(at, at + len(text)))
  return Committed(
    slots=slots,
    tokens=tuple(text),
    log_probs=(-0.25,) * len(text),
    tops=((),) * len(text),
  )


def finished(reason: str, tokens: int) -> Finished:
  usage = Usage(prompt=0, completion=tokens, calls=3)
  return Finished(reason=reason, usage=usage)


def test_text_is_there_as_soon_as_it_is_final():
  made, _, told = answer(8, logprobs=0)
  pieces = []
  for at, part in ((0, b"ab"), (2, b"\xc3"), (3, b"\xa9d")):
    made.hear(committed(part, at))
    pieces.append(made.take())
  assert [piece and piece.text for piece in pieces] == ["ab", None, "éd"]
  assert [t.offset for p in pieces if p for t in p.tokens] == [0, 1, 2, 2, 3]
  assert len(told) == 3
  made.hear(finished("length", 5))
  last = made.take()
  assert (last.text, last.finish, made.tokens) == ("", "length", 5)
  assert made.take() is None and made.over


def test_who_reads_late_gets_one_piece_and_the_newest_draft():
  made, _, _ = answer(200)
  for call in range(1, 101):
    made.hear(committed(b"ab", 2 * call - 2))
    draft = Draft(call=call, tokens=(None,), log_probs=(None,))
    made.hear(draft)
  piece = made.take()
  assert piece.text == "ab" * 100 and piece.draft is draft
  assert made.take() is None


def test_a_stop_frees_the_slot_at_once_and_what_comes_after_is_not_heard():
  made, ticket, _ = answer(16, stops=["b\nU"], logprobs=0)
  made.hear(committed(b"aab\n"))
  first = made.take()
  assert first.text == "aa" and not ticket.cancelled
  made.hear(committed(b"User", 4))
  assert ticket.cancelled
  made.hear(committed(b"more", 8))
  made.hear(finished("cancelled", 12))
  last = made.take()
  assert (last.text, last.finish) == ("", "stop")
  assert made.tokens == 5 and len(first.tokens) == 2 and not last.tokens


def test_a_row_that_is_cancelled_has_failed():
  made, ticket, _ = answer(4)
  made.cancel()
  made.hear(finished("cancelled", 0))
  assert made.take().finish == "failed" and ticket.cancelled == 1
  made.cancel()  # it is over
  assert ticket.cancelled == 1
