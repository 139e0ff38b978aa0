"""Traces in the terminal, in a notebook, as pictures."""

import io
import re

import jax
import numpy as np
import pytest

from dllm_jax.core.types import Process
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.sampling.policies.unmasking import Unmasking
from dllm_jax.sampling.program import Sampler
from dllm_jax.sampling.requests import build
from dllm_jax.sampling.traces import terminal, write
from dllm_jax.sampling.traces.trace import Event, Film, films
from tests import toys
from tests.sampling import published

OBJECTIVE = MDLM(vocab_size=27, mask_id=26)


def decode(ids):
  return "".join("abcdefghijklmnopqrstuvwxyz"[i] for i in ids)


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture(scope="module")
def trace():
  denoiser = toys.mixer(27, 8)
  requests = build([[3, 4, *[None] * 8]], objective=OBJECTIVE, length=10)
  spec = Sampler(policy=Unmasking(objective=OBJECTIVE, steps=4), length=10)
  params = jax.jit(denoiser.init)(jax.random.key(0), None)
  args = params, Process(), jax.random.key(1), requests
  return published.quick(spec, denoiser, *args, trace=True).trace


def test_screens_go_from_masks_to_the_text(trace):
  (film,) = films(trace)
  shown = list(terminal.screens(film, decode, colour=False))
  assert len(shown) == 5
  bodies = [screen.split("\n\n")[1].strip() for screen in shown]
  assert bodies[0] == "de" + "·" * 8
  assert bodies[-1] == decode(np.asarray(trace.frames.tokens)[-1, 0])
  assert [body.count("·") for body in bodies] == [8, 6, 4, 2, 0]


def test_what_is_hidden_is_not_on_the_screen(trace):
  (film,) = films(trace)
  first, *_, last = terminal.screens(film, decode)
  plain = lambda screen: re.sub(r"\x1b\[[0-9;]*m", "", screen).split("\n\n")[1]
  assert plain(first).rstrip() == "de"
  assert len(plain(first)) == len(plain(last))


def film_of(*tokens, later=()):
  """Returns a film of one step that writes tokens, and one that rewrites."""
  steps = [enumerate(tokens), later]
  events = lambda step: tuple(
    Event(slot=slot, token=token, confidence=0.5) for slot, token in step
  )
  blank = (None,) * len(tokens)
  return Film(
    initial=blank,
    fixed=(False,) * len(tokens),
    steps=tuple(events(step) for step in steps),
  )


def test_tokens_neither_break_a_line_nor_steer_the_terminal():
  texts = ["ab", "\n", "\x1b[2J", "c\td"]
  film = film_of(1, 2, 3, 0, later=[(0, 0), (1, 0), (3, 1)])
  _, first, last = terminal.screens(
    film, lambda ids: texts[ids[0]], columns=9, colour=False
  )
  body = lambda screen: screen.split("\n\n")[1]
  # Each in the room of what stands there last.
  assert body(first) == "↵ \ufffd[c\ufffdda\n"
  assert body(last) == "ababc\ufffdd↵\n"


def test_wide_characters_take_two_columns_and_what_is_cut_is_said():
  film = film_of(*range(5))
  *_, last = terminal.screens(
    film, lambda ids: "日本語ab"[ids[0]], columns=5, lines=1, colour=False
  )
  assert last == "step 2 of 2, the first 2 of 5 tokens\n\n日本\n"


def test_play_animates_a_terminal_and_prints_to_a_file(trace):
  live, plain = Terminal(), io.StringIO()
  terminal.play(trace, decode, seconds=0.0, out=live)
  terminal.play(trace, decode, out=plain)
  assert live.getvalue().count("\x1b[H") == 5
  assert "\x1b" not in plain.getvalue()
  assert "step 0 of 4" in plain.getvalue()
  assert "step 4 of 4" in plain.getvalue()
  with pytest.raises(ValueError, match="sample must lie in"):
    terminal.play(trace, decode, sample=1, out=plain)


def test_the_widget_holds_the_page(trace):
  text = terminal.Widget(trace, decode)._repr_html_()
  assert text.startswith("<iframe srcdoc=") and "<script" not in text


@pytest.mark.parametrize("kind", ["html", "svg", "png", "gif"])
def test_every_form_is_written(trace, tmp_path, kind):
  path = tmp_path / f"trace.{kind}"
  if kind in ("png", "gif"):
    image = pytest.importorskip("PIL.Image")
  write.trace(path, trace, decode)
  assert path.stat().st_size > 500
  if kind == "gif":
    assert image.open(path).n_frames == 5
  if kind == "png":
    picture = np.asarray(image.open(path).convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 5
  with pytest.raises(ValueError, match=".html, .svg, .png, .gif"):
    write.trace(tmp_path / "trace.mp4", trace, decode)
