"""Published words back to text."""

import pytest

from dllm_jax.evaluation.likelihood.detokenize import RULES


@pytest.mark.parametrize(
  "name, published, text, words",
  [
    (
      "ptb",
      " it 's a loss of $ N N N million for the banks ' <unk> \n he does n't \n",
      " it's a loss of $1 1 1 million for the banks' ?\nhe doesn't \n",
      18 + 2,
    ),
    (
      "wikitext",
      " = = Title = = \n It cost 1 @,@ 000 , or 3 @.@ 5 % ( \" half \" ) : more . \n",
      ' == Title ==\nIt cost 1,000, or 3.5 % ("half"): more.\n',
      24 + 2,
    ),
    (
      "lm1b",
      "He 's in \" New York \" , see http : / / x.org ( now ) ? It costs $ 5 .",
      "He's in \"New York\", see http://x.org (now)? It costs $5.",
      23,
    ),
    ("lambada", " “ Yes , ” she said ", '\n" Yes , " she said', 6),
    ("none", " as it is . \n", " as it is . \n", 4),
  ],
)
def test_rules(name, published, text, words):
  rules = RULES[name]
  assert rules.text(published) == text
  assert rules.words(published) == words
