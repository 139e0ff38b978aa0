r"""Corpora that were published as words, back to ordinary text.

The rules with which SEDD (arXiv:2310.16834) and MDLM (arXiv:2406.07524) report
zero-shot perplexities on PTB, WikiText, LM1B and LAMBADA, as tables of
replacements made one after another. Their perplexity is per token of the
restored text; the one per word divides by the words that were published.
"""

from collections.abc import Sequence
import dataclasses
import re


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
  """How a corpus is restored.

  Attributes:
    replace: `(pattern, replacement)` regular expressions, in order.
    lines: whether an end of line counts as a word, as its papers count.
    lead: what stands before a text; None to leave its white space as it is.
  """

  replace: Sequence[tuple[str, str]]
  lines: bool = False
  lead: str | None = None

  def text(self, published: str) -> str:
    """Returns the ordinary text."""
    for pattern, replacement in self.replace:
      published = re.sub(pattern, replacement, published)
    return published if self.lead is None else self.lead + published.strip()

  def words(self, published: str) -> int:
    """Returns how many words were published."""
    return len(published.split()) + (published.count("\n") if self.lines else 0)


def _literal(*pairs: tuple[str, str]) -> list[tuple[str, str]]:
  """Returns replacements of the very strings."""
  escaped = lambda text: text.replace("\\", r"\\")
  return [(re.escape(old), escaped(new)) for old, new in pairs]


def _before(marks: str) -> list[tuple[str, str]]:
  """Returns rules that take the space before some marks away."""
  return _literal(*((f" {mark} ", f"{mark} ") for mark in marks))


_WIKITEXT = (
  *_literal(("s '", "s'")),
  (r"/' [0-9]/", "/'[0-9]/"),
  *_literal((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")),
  *_before(":;.!?,"),
  (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
  (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
  (r"{\s*([^}]*?)\s*}", r"{\1}"),
  (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
  (r"'\s*([^']*?)\s*'", r"'\1'"),
  *_literal(
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
  ),
)
_PTB = (
  *_literal(
    (" 's", "'s"),
    ("s ' ", "s' "),
    (" n't", "n't"),
    (" \n ", "\n"),
    ("\\/", "/"),
  ),
  # "N N N": a replaced one lends no space to the next.
  *_literal((" N ", " 1 ")) * 10,
  *_literal(("$ 1", "$1"), ("# 1", "#1"), ("<unk>", "?")),
)
_LM1B = (
  *_literal(("http : / / ", "http://"), ("https : / / ", "https://")),
  (r" \'(\w+)", r"'\1"),
  (r" (\w+) \. ", r" \1. "),
  (r" (\w+) \.$", r" \1."),
  *_before("?"),
  (r" \?$", "?"),
  *_before("!"),
  (r" \!$", "!"),
  *_before(",:;"),
  *_literal((" / ", "/")),
  (r"\" ([^\"]+) \"", r'"\1"'),
  (r"\' ([^\']+) \'", r"'\1'"),
  (r"\( ([^\(\)]+) \)", r"(\1)"),
  (r"\[ ([^\[\]]+) \]", r"[\1]"),
  *_literal(("$ ", "$"), ("£ ", "£")),
)

RULES = {
  "none": Rules(replace=()),
  "ptb": Rules(replace=_PTB, lines=True),
  "wikitext": Rules(replace=_WIKITEXT, lines=True),
  "lm1b": Rules(replace=_LM1B),
  "lambada": Rules(replace=_literal(("“", '"'), ("”", '"')), lead="\n"),
}
