"""A tokenizer of words w0 to w60 with chat tokens, and conversations in it."""

import json

import tokenizers
from tokenizers import models, pre_tokenizers

from dllm_jax.data.huggingface import huggingface

SPECIAL = ["<t>", "<user>", "<assistant>", "<system>", "</t>", "<eos>", "<m>"]
WORDS = 61
TURN, USER, ASSISTANT, SYSTEM, END, EOS, MASK = range(WORDS, WORDS + 7)
# Each word is a token; a space lies between words and is none.
TEMPLATE = (
  "{% for m in messages %}<t><{{ m['role'] }}>{{ m['content'] }}</t>"
  "{% endfor %}{% if add_generation_prompt %}<t><assistant>{% endif %}"
)
MARKED = (
  "{% for m in messages %}<t><{{ m['role'] }}>{% if m['role'] == 'assistant' %}"
  "{% generation %}{{ m['content'] }}{% endgeneration %}</t>{% else %}"
  "{{ m['content'] }}</t>{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}<t><assistant>{% endif %}"
)


def tokenizer(folder, template=TEMPLATE, *, words=WORDS, **config):
  """Returns the tokenizer, of files in a folder."""
  words = {f"w{i}": i for i in range(words)}
  made = tokenizers.Tokenizer(models.WordLevel(words, unk_token="w0"))
  made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  made.add_special_tokens(SPECIAL)
  folder.mkdir(exist_ok=True)
  made.save(str(folder / "tokenizer.json"))
  named = {"eos_token": "<eos>", "pad_token": "<eos>", "mask_token": "<m>"}
  if template is not None:
    named["chat_template"] = template
  (folder / "tokenizer_config.json").write_text(json.dumps(named | config))
  return huggingface(str(folder))


def said(*texts, first="user"):
  """Returns messages of the user and the assistant in turn."""
  roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
  return [
    {"role": roles[i % 2], "content": text} for i, text in enumerate(texts)
  ]


def write(path, rows):
  """Writes rows as JSON lines; returns the path as text."""
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def words(ids):
  """Returns ids as text, for messages of tests."""
  return " ".join(f"w{i}" for i in ids)
