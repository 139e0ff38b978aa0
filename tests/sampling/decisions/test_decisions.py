"""Decisions beside enumeration: labels of one token and of many, and trust."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.types import Process
from dllm_jax.data.tokenizer import characters
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.parallel import make_mesh
from dllm_jax.sampling.decisions.answers import (
  Answer,
  Calibration,
  calibration_error,
  fitted,
)
from dllm_jax.sampling.decisions.layout import laid_out, Layout, Question
from dllm_jax.sampling.decisions.reader import Reader
from tests import toys

TOKENIZER = characters(["ABCDQ0123456789:[];()? \nabcdefghijklmnopqrstuvwxyz"])


def test_questions_and_labels_are_on_one_canvas():
  questions = [
    Question(instructions="is it red?"),
    Question(instructions="which?", labels=("a", "bc"), hints=("one", "")),
  ]
  made = laid_out("the sea", questions, TOKENIZER)
  text = TOKENIZER.decode(
    [TOKENIZER.mask_id if t is None else t for t in made.row], mask="_"
  )
  assert text == (
    "the sea\n\nQ1: is it red? [yes; no]\nA1:____\nQ2: which? [a (one); bc]\nA2:"
    "___\n"
  )
  assert [made.row[slot] for slot in made.slots] == [None, None]
  spelled = [TOKENIZER.decode(label) for label in made.labels[1]]
  assert spelled == [" a", " bc"]


def test_a_label_that_begins_another_has_its_end():
  question = Question(instructions="x", labels=("no", "none"))
  labels = laid_out("", [question], TOKENIZER).labels[0]
  assert [TOKENIZER.decode(label) for label in labels] == [" no\n", " none\n"]


@pytest.mark.parametrize(
  "fields, named",
  [
    ({"instructions": " "}, "instructions"),
    ({"instructions": "x", "labels": ("a",)}, "2 to 255"),
    ({"instructions": "x", "labels": ("a", "a")}, "differ"),
    ({"instructions": "x", "labels": ("a", "b"), "hints": ("c",)}, "descrip"),
  ],
)
def test_questions_that_cannot_be_are_told(fields, named):
  with pytest.raises(ValueError, match=named):
    Question(**fields)


def test_labels_have_the_law_of_the_network():
  """Of a network that knows a joint law: by the chain rule, from the left."""
  sequences, p = toys.joint(4, tokens=3, length=8)
  objective = MDLM(vocab_size=4, mask_id=3)
  mesh = make_mesh({"data": 1}, jax.devices()[:1])
  reader = Reader(objective, _padded(sequences, p), mesh=mesh, rows=4)
  labels = ((0, 1), (0, 2), (2, 2))
  row = (1, None, None, 0, None, 2, 1, 0)
  layout = Layout(row=row, slots=(1, 4), labels=(labels, ((0,), (1,))))
  found = reader(jnp.array(p, jnp.float32), Process(), [layout] * 3)

  for answer in found:
    exact = [np.log(_at(sequences, p, {1: a, 2: b})) for a, b in labels]
    np.testing.assert_allclose(answer[0], exact, atol=1e-4)
    exact = [np.log(_at(sequences, p, {4: t})) for t in (0, 1)]
    np.testing.assert_allclose(answer[1], exact, atol=1e-4)


def _at(sequences, p, more):
  """Returns the probability of some tokens given those of the row above."""
  known = {0: 1, 3: 0, 5: 2, 6: 1, 7: 0}
  of = lambda at: p[
    np.all([sequences[:, i] == t for i, t in at.items()], axis=0)
  ].sum()
  return of(known | more) / of(known)


def _padded(sequences, p):
  """Returns the network of a law on canvases that are longer than its texts."""
  length = sequences.shape[1]
  inner = toys.tabular(3, length, mask_id=3)

  def apply(params, inputs, cache):
    short = inputs.replace(
      latent=inputs.latent[:, :length],
      segment_ids=inputs.segment_ids[:, :length],
    )
    out, cache = inner.apply(params, short, cache)
    more = inputs.latent.shape[1] - length
    hidden = jnp.pad(out.hidden, ((0, 0), (0, more), (0, 0)))
    return out.replace(hidden=hidden), cache

  return inner._replace(apply=apply)


def test_a_temperature_is_found_and_what_is_sure_is_right():
  rng = np.random.default_rng(0)
  truth, rows = [], []
  for _ in range(1600):
    logits = rng.normal(size=3) * 2
    p = np.exp(logits) / np.exp(logits).sum()
    truth.append(int(rng.choice(3, p=p)))
    rows.append(3.0 * np.log(p))  # three times too sure
  made = fitted(rows[:800], truth[:800])
  assert abs(made.temperature - 3.0) < 0.4
  of = lambda c: [c.answer(row) for row in rows[800:]]
  raw, spread = calibration_error(of(Calibration()), truth[800:])
  good, _ = calibration_error(of(made), truth[800:])
  assert raw > 0.15 and good < 0.07 and 0 < spread < 0.04


def test_an_answer_says_its_mass():
  answer = Calibration().answer(np.log([0.1, 0.3]))
  assert answer.best == 1
  np.testing.assert_allclose(answer.probabilities, [0.25, 0.75])
  np.testing.assert_allclose([answer.mass, answer.confidence], [0.4, 0.3])
  assert Answer(probabilities=(0.5, 0.0, 0.5), mass=1.0).mean == 1.0
  with pytest.raises(ValueError, match="temperature"):
    Calibration(temperature=0.0)
