#!/usr/bin/env bash
# transformers 5 ignores add_bos_token where a tokenizer.json stands beside it.
#
# A published folder of LLaMA's tokenizer class has two files that say what stands
# before a text: the post-processor in tokenizer.json, and add_bos_token (and
# add_eos_token) in tokenizer_config.json. transformers 4.57.6 heeds the flags and
# replaces the post-processor by what they say. transformers 5.24.0 drops both
# flags before it builds the tokenizer, whenever there is a tokenizer.json; with
# the same folder a prompt loses its <s>, in silence, and `add_bos_token` reads
# False afterwards. Whoever relied on the flag (folders whose tokenizer.json was
# written without a post-processor) gets other ids, and other log-likelihoods,
# from the same files.
#
# Seen on Python 3.11, first id of the same text: 4.57.6: [1], which is <s>;
# 5.24.0: [3], the first of the text itself.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"

for version in 4.57.6 5.24.0; do
  python3 -m venv "env-$version"
  "env-$version/bin/pip" install --quiet "transformers==$version" jinja2 2>/dev/null
done

cat > make.py <<'PY'
import json, os
import tokenizers
from tokenizers import models, pre_tokenizers

os.makedirs("llama", exist_ok=True)
words = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "▁", "▁a", "▁b"])}
merges = []
made = tokenizers.Tokenizer(models.BPE(words, merges, unk_token="<unk>"))
made.pre_tokenizer = pre_tokenizers.Metaspace()
made.add_special_tokens(["<unk>", "<s>", "</s>"])
made.save("llama/tokenizer.json")
with open("llama/tokenizer_config.json", "w") as file:
  json.dump({
    "tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>",
    "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True,
    "added_tokens_decoder": {},
  }, file)
PY
cat > show.py <<'PY'
from transformers import AutoTokenizer
print(AutoTokenizer.from_pretrained("llama")("a")["input_ids"][:1])
PY
"env-5.24.0/bin/python" make.py
four="$("env-4.57.6/bin/python" show.py 2>/dev/null | tail -1)"
five="$("env-5.24.0/bin/python" show.py 2>/dev/null | tail -1)"
echo "4.57.6 begins with $four, 5.24.0 with $five (<s> is 1)"
[ "$four" = "[1]" ] && [ "$five" != "[1]" ] || { echo "this has changed"; exit 1; }
