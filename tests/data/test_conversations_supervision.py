"""What counts of a conversation, by templates in the forms of published ones."""

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from dllm_jax.data import Dataset, tokenizer_json
from dllm_jax.data.conversations import examples, forms, supervision
from dllm_jax.data.conversations.forms import Conversation
from dllm_jax.data.huggingface import HuggingFace
from tests import golden_cases
from tests.data import chats
from tests.data.chats import said

CASE = golden_cases.present("chat_templates")
CHATML = (
  "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
  "<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_ALWAYS = chats.TEMPLATE.partition("{% if add_gen")[0] + "<t><assistant>"


@pytest.fixture(scope="module")
def recorded():
  return golden_cases.load(CASE[0])


def _published(recorded, name, template=None):
  given = recorded.config["templates"][name]
  definition = (golden_cases.ROOT / CASE[0] / "tokenizer.json").read_text()
  config = given["tokenizer_config"]
  named = {
    k: v
    for k, v in config.items()
    if k.endswith("_token") and isinstance(v, str)
  }
  extra = config.get("extra_special_tokens") or {}
  vocabulary = tokenizers.Tokenizer.from_str(definition).get_vocab()
  return HuggingFace(
    definition=definition,
    mask_id=max(vocabulary.values()) + 1,
    eos_id=vocabulary.get(named.get("eos_token")),
    named=named | extra,
    chat_templates={"default": template or given["template"]},
  )


def _counted(tokenizer, messages, supervise="all", **fields):
  """Returns the text of the whole, and that of what counts, run by run."""
  dataset = Dataset(length=4096, supervise=supervise)
  reading = examples.Reading(dataset, tokenizer, forms.FORMS["messages"])
  record = {"messages": messages} | fields
  _, (written,) = reading._written(record)
  (places,) = tokenizer.encode_places([written.text])
  made = reading._example(written, *places)
  tokens, counts = made.example
  # The tokens are those of the whole text.
  whole = tokenizer.encode(written.text)
  np.testing.assert_array_equal(tokens[: len(whole)], whole)
  edges = np.flatnonzero(np.diff(counts.astype(int), prepend=0, append=0))
  runs = [
    tokenizer.decode(tokens[a:b], special=True)
    for a, b in edges.reshape(-1, 2).tolist()
  ]
  return written.text, runs


TALK = said("why?", "it's the rain", "and  the garden", "naïve 漢字 week")
# What ends an answer: in three cases the template says it before the header.
ENDS = {
  "qwen2_5": "<|im_end|>\n", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>\n",
  "llada": "<|eot_id|>", "sdar": "<|im_end|>\n", "mistral": "</s>",
  "phi4": "<|im_end|>",
}  # fmt: skip


@pytest.mark.skipif(not CASE, reason="another root without the case")
@pytest.mark.parametrize("name", ENDS)
def test_published_templates(recorded, name):
  tokenizer = _published(recorded, name)
  _, runs = _counted(tokenizer, TALK)
  answers = ["it's the rain", "naïve 漢字 week"]
  assert [run.strip(" ") for run in runs] == [a + ENDS[name] for a in answers]
  _, runs = _counted(tokenizer, TALK, "last")
  assert [run.strip(" ") for run in runs] == [answers[1] + ENDS[name]]


@pytest.mark.skipif(not CASE, reason="another root without the case")
def test_another_header_than_the_one_that_is_asked_with_is_named(recorded):
  """The form of Dream's has a line more before the header it asks with."""
  tokenizer = _published(recorded, "dream")
  with pytest.raises(ValueError, match="the header that asks for message 4"):
    _counted(tokenizer, TALK, "last")


@pytest.mark.skipif(not CASE, reason="another root without the case")
def test_thoughts_that_are_dropped_are_named(recorded):
  tokenizer = _published(recorded, "qwen3")
  with pytest.raises(
    ValueError,
    match=r"message 2 \(assistant\) is written otherwise when messages 3 to 4 "
    r"follow; set data.supervise=last, or give a template with {% generation %}",
  ):
    thought = [dict(m) for m in TALK]
    thought[1]["reasoning_content"] = "because"
    _counted(tokenizer, thought)
  _, runs = _counted(tokenizer, thought, "last")
  assert len(runs) == 1 and runs[0].endswith("naïve 漢字 week<|im_end|>\n")


def test_a_template_that_always_opens_an_answer(tmp_path):
  tokenizer = chats.tokenizer(tmp_path, _ALWAYS)
  plain = chats.tokenizer(tmp_path / "other")
  talk = said("w1", "w2 w3", "w4", "w5")
  for supervise in ("all", "last"):
    found = _counted(tokenizer, talk, supervise)
    assert found == _counted(plain, talk, supervise)
    assert not found[0].endswith("<assistant>")
  bare = "{% for m in messages %} w1 {{ m['content'] }} w2 {% endfor %} w3 w4"
  with pytest.raises(ValueError, match="ends none with a special token"):
    _counted(chats.tokenizer(tmp_path / "bare", bare), talk)


def test_a_template_that_never_opens_an_answer(tmp_path):
  never = chats.TEMPLATE.partition("{% if add_gen")[0]
  _, runs = _counted(chats.tokenizer(tmp_path, never), said("w1", "w2"))
  assert runs == ["<t> <assistant> w2 </t>"]


def test_a_header_that_is_another_is_named(tmp_path):
  other = chats.TEMPLATE.replace("%}<t><assistant>", "%}<t><assistant>w9")
  tokenizer = chats.tokenizer(tmp_path, other)
  with pytest.raises(ValueError, match="asks for message 2 .*is not the one"):
    _counted(tokenizer, said("w1", "w2"))


def test_marks_of_a_template(tmp_path):
  plain = chats.tokenizer(tmp_path / "a")
  tokenizer = chats.tokenizer(tmp_path / "b", chats.MARKED)
  talk = said("w1", "w2 w3", "w4", "w5")
  for supervise in ("all", "last"):
    # The end of the turn counts, though the tag leaves it out.
    assert _counted(tokenizer, talk, supervise) == _counted(
      plain, talk, supervise
    )
  prompted = {"prompt": talk[:3], "completion": "w5"}
  found = forms.FORMS["prompt_completion"].read(prompted)
  written = supervision.Writer(tokenizer, "all")(found)
  assert [written.text[a:b] for a, b in written.spans] == ["w5"]
  silent = chats.MARKED.replace("== 'assistant'", "== 'nobody'")
  with pytest.raises(ValueError, match="marks nothing of these messages"):
    _counted(chats.tokenizer(tmp_path / "c", silent), talk)


def test_an_answer_without_an_end_gets_the_end_of_text(tmp_path):
  bare = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
  )
  _, runs = _counted(chats.tokenizer(tmp_path, bare), said("w1", "w2"))
  assert runs == ["w2 <eos>"]


def test_tools_choose_a_template_and_are_written(tmp_path):
  tokenizer = chats.tokenizer(
    tmp_path, chats.TEMPLATE + "{% if tools %}{% endif %}"
  )
  talk = Conversation(said("w1", "w2"), tools=[{"name": "w7"}])
  writer = supervision.Writer(tokenizer, "all")
  assert writer.render(talk.messages, talk, answer=False).text.startswith("<t>")
  named = {"default": chats.TEMPLATE, "tool_use": "{{ tools[0].name }}"}
  two = HuggingFace(
    definition=tokenizer.definition,
    mask_id=tokenizer.mask_id,
    chat_templates=named,
  )
  text = supervision.Writer(two, "all").render(
    talk.messages, talk, answer=False
  )
  assert text.text == "w7"


# Tokenizers of the three kinds that models have: places, and ids of the whole.


def _byte_level(trim):
  from dllm_jax.data import byte_pairs

  text = "the rain and the garden in a week, naïve and 漢字 " * 3
  made = tokenizers.Tokenizer.from_str(byte_pairs.learn([text], 280))
  made.post_processor = processors.ByteLevel(trim_offsets=trim)
  return made


def _metaspace():
  words = ["▁the", "▁rain", "▁", "the", *"?\naeinrstuvyhwï"]
  scores = [(word, -float(i)) for i, word in enumerate(["<unk>", *words])]
  made = tokenizers.Tokenizer(models.Unigram(scores, 0, byte_fallback=False))
  made.pre_tokenizer = pre_tokenizers.Metaspace(
    replacement="▁", prepend_scheme="first", split=False
  )
  made.decoder = decoders.Metaspace()
  return made


KINDS = {
  "bytes": lambda: _byte_level(False),
  "bytes, spaces trimmed": lambda: _byte_level(True),
  "sentencepiece": _metaspace,
}


# The same turns: headers that end with a space, which joins the next word, and
# contents alone marked.
_SPACED = CHATML.replace("['role'] }}\n", "['role'] }} ").replace(
  "assistant\n", "assistant "
)
_CONTENTS = CHATML.replace(
  "{{ m['content'] }}",
  "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
  "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}",
)


@pytest.mark.parametrize("template", [CHATML, _SPACED, _CONTENTS])
@pytest.mark.parametrize("kind", KINDS)
def test_places_of_tokens(kind, template):
  made = KINDS[kind]()
  made.add_special_tokens(["<|im_start|>", "<|im_end|>", "<eos>"])
  tokenizer = HuggingFace(
    definition=made.to_str(),
    mask_id=made.get_vocab_size(),
    eos_id=made.token_to_id("<eos>"),
    chat_templates={"default": template},
  )
  for answer in ["the rain", "  naïve \n", "\n\n the", "rain  "]:
    text, runs = _counted(tokenizer, said(" why? ", answer, "the", "rain"))
    assert text.count(answer)
    assert len(runs) == 2
    # A token that joins the header's end and the answer's beginning counts; the
    # line behind the end of the turn counts where the template does not mark.
    end = "" if template is _CONTENTS else "\n"
    assert runs[0].lstrip("\n ") == (answer + "<|im_end|>" + end).lstrip("\n ")
    assert runs[1].strip() == "rain<|im_end|>"
  ((ids, places),) = tokenizer_json.places(made, [text])
  assert len(ids) == len(places)
  assert (places[:, 0] <= places[:, 1]).all()
  assert (np.diff(places[:, 1]) >= 0).all()
