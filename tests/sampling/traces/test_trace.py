"""Traces, their page and their strip."""

import json
import re
from xml.etree import ElementTree

import jax
import numpy as np
import pytest

from dllm_jax.core.types import Process
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.sampling.launch import Launcher
from dllm_jax.sampling.policies.unmasking import Unmasking
from dllm_jax.sampling.program import Sampler
from dllm_jax.sampling.requests import build
from dllm_jax.sampling.traces.strip import write_strip
from dllm_jax.sampling.traces.trace import films, write_page
from tests import toys

TEXT = ["a", "\n", "</script>", "é", '"', " ", ""]
MASK = len(TEXT)
decode = lambda ids: "".join(TEXT[i] for i in ids)


@pytest.fixture(name="generation", scope="module")
def _generation():
  objective = MDLM(vocab_size=MASK + 1, mask_id=MASK)
  policy = Unmasking(objective=objective, steps=3)
  spec = Sampler(policy=policy, length=12, block_length=4)
  denoiser = toys.mixer(MASK + 1, 4)
  params = jax.jit(denoiser.init)(jax.random.key(0), None)
  requests = build(
    [[2, 0] + [None] * 10, [None, None, 3, None]],
    objective=objective,
    length=12,
  )
  launcher = Launcher(spec, denoiser, trace=True)
  return launcher(params, Process(), jax.random.key(1), requests)


@pytest.mark.all
def test_a_film_leads_from_the_request_to_the_tokens(generation):
  long, short = films(generation.trace)
  assert (len(long.steps), len(short.steps)) == (8, 3)
  assert long.initial == (2, 0) + (None,) * 10
  assert short.initial == (None, None, 3, None)
  for row, film in enumerate((long, short)):
    tokens = [event.token for event in film.canvas(len(film.steps))]
    assert tokens == np.asarray(generation.tokens)[row, : len(tokens)].tolist()
  changed = [event.slot for step in long.steps for event in step]
  assert sorted(changed) == list(range(2, 12))
  assert all(0 < e.confidence <= 1 for step in long.steps for e in step)


def test_the_page_holds_everything_itself(generation, tmp_path):
  path = tmp_path / "trace.html"
  write_page(path, generation.trace, decode, title="A <b>title</b>")
  page = path.read_text(encoding="utf-8")
  assert not re.search(r"https?:|src=|href=|@import|url\(", page)
  assert page.count("</script>") == 2  # The text's own was escaped.
  data = json.loads(
    re.search(r'type="application/json">(.*?)</script>', page, re.S)[1]
  )
  assert data["title"] == "A <b>title</b>"
  assert data["text"]["2"] == "</script>"
  film = films(generation.trace)[1]
  sample = data["samples"][1]
  assert sample["initial"] == [None, None, 3, None]
  assert sample["fixed"] == [0, 0, 1, 0]
  assert [len(step) for step in sample["steps"]] == [len(s) for s in film.steps]


def test_the_strip_is_valid_and_ends_with_the_text(generation, tmp_path):
  path = tmp_path / "strip.svg"
  write_strip(path, generation.trace, decode, panels=4, columns=6)
  svg = path.read_text(encoding="utf-8")
  root = ElementTree.fromstring(svg)
  panels = [e for e in root.iter() if e.get("class") == "panel"]
  assert len(panels) == 4
  assert "step 0 of 8" in svg and "step 8 of 8" in svg
  last = float(panels[-1].get("x"))
  inside = [e for e in root.iter() if float(e.get("x") or 0) > last]
  assert not [e for e in inside if e.get("class") == "hidden"]
  with pytest.raises(ValueError, match=r"sample must lie in \[0, 2\)"):
    write_strip(path, generation.trace, decode, sample=2)
  with pytest.raises(ValueError, match="at least 2 panels"):
    write_strip(path, generation.trace, decode, panels=1)
