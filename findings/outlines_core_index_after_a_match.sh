#!/usr/bin/env bash
# outlines-core's Index has no way on from a text that matches, unless at once to
# another that does.
#
# `Index(regex, vocabulary)` says which tokens may follow. Of `(ab)+` over the tokens
# "a" and "b" it accepts "ab" and offers nothing behind it but the end, though
# "abab" matches too: where a token leads from an accepting state to one that does
# not accept, the token is left out. So `[0-9]+(\.[0-9]+)?` writes "3" and never
# "3.5", and `[0-9]+(, [0-9]+)*` one number. Of `a+b` or `a+`, nothing is missing.
# A language whose texts end in a byte that stands nowhere else is whole: put one
# behind the expression and take the states before it as accepting.
#
# Seen with outlines-core 0.2.14, Python 3.11: tokens behind "ab": [] for `(ab)+`,
# and ['a'] for `(ab)+\x00`, besides the zero byte.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"

python3 -m venv env
env/bin/pip install --quiet outlines-core==0.2.14 2>/dev/null

cat >behind.py <<'PY'
import re

from outlines_core import Index, Vocabulary

TOKENS = ["a", "b", "\0"]
vocabulary = Vocabulary(3, {t: [i] for i, t in enumerate(TOKENS)})


def behind(pattern, text):
  index = Index(pattern, vocabulary)
  state = index.get_initial_state()
  for letter in text:
    state = index.get_transitions()[state][TOKENS.index(letter)]
  follow = index.get_transitions().get(state, {})
  return sorted(TOKENS[i] for i in follow if i < 3)


assert re.fullmatch("(ab)+", "abab")
found = behind("(ab)+", "ab"), behind("(ab)+\\x00", "ab")
print(found)
assert found == ([], ["\0", "a"])
PY
env/bin/python behind.py
