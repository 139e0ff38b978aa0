r"""How good texts are, in figures that belong together.

Each alone is easy to game: a repeated word has the best generative perplexity,
random words the best entropy. Pure functions of token ids, texts and features.
"""

from collections.abc import Sequence
import math
import re

from jaxtyping import Float
import numpy as np
from scipy import stats

_FRONTIER = 25
_SCALE = 5.0
_KEPT = 0.9
_WORD = re.compile(r"[^\W\d_](?:[^\W\d_]|')*")


def unigram_entropy(tokens: Sequence[int]) -> float:
  """Returns the entropy of the tokens of one text, bits."""
  counts = np.unique(tokens, return_counts=True)[1]
  return float(stats.entropy(counts, base=2))


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
  """Returns the share of different n-grams among all (arXiv:1510.03055)."""
  grams = [
    tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)
  ]
  return len(set(grams)) / len(grams) if grams else 0.0


def words(text: str) -> list[str]:
  """Returns the words of a text, in lower case: runs of letters, with their '."""
  return _WORD.findall(text.lower())


def word_share(texts: Sequence[str], known: str) -> float:
  """Returns the share of the words of texts that a known text has, 0 to 1."""
  found, vocabulary = words(" \n".join(texts)), set(words(known))
  return sum(w in vocabulary for w in found) / len(found) if found else 0.0


def self_bleu(texts: Sequence[Sequence[int]], *, most: int = 50) -> list[float]:
  """Returns the BLEU-4 of each text against the others, 0 to 100.

  arXiv:1802.01886, over token ids, with exponential smoothing. High: they
  repeat each other.

  Args:
    texts: token ids.
    most: how many of the texts are compared with all others.
  """
  from sacrebleu.metrics import BLEU

  bleu = BLEU(tokenize="none", effective_order=True, smooth_method="exp")
  lines = [" ".join(map(str, text)) for text in texts]
  return [
    bleu.sentence_score(lines[i], lines[:i] + lines[i + 1 :]).score
    for i in range(min(most, len(lines)))
  ]


def mauve(
  p_features: Float[np.ndarray, "N D"],
  q_features: Float[np.ndarray, "M D"],
  *,
  clusters: int = 0,
  seed: int = 0,
) -> float:
  r"""Returns MAUVE, the area under the divergence frontier (arXiv:2102.01454).

  Features of both, reduced by principal components that hold 90 % of the
  variance and set to length 1, are quantised by k-means to histograms P and Q;
  with R_l = l P + (1 - l) Q the frontier is
  (exp(-c KL(Q | R_l)), exp(-c KL(P | R_l))), c = 5.

  Args:
    p_features: of human texts.
    q_features: of the model's.
    clusters: k; 0 for a tenth of the smaller set, at least 2, the paper's.
    seed: of k-means.
  """
  from sklearn.cluster import KMeans
  from sklearn.decomposition import PCA
  from sklearn.preprocessing import normalize

  both = np.concatenate([p_features, q_features]).astype(np.float64)
  least = min(len(p_features), len(q_features))
  clusters = clusters or max(2, least // 10)
  if np.ptp(both, axis=0).max() > 0:
    both = PCA(n_components=_KEPT, svd_solver="full").fit_transform(both)
    both = normalize(both)
  labels = KMeans(clusters, n_init=5, random_state=seed).fit_predict(both)
  count = lambda x: np.bincount(x, minlength=clusters) / len(x)
  p, q = count(labels[: len(p_features)]), count(labels[len(p_features) :])
  points = [(0.0, 1.0)]
  for share in np.linspace(1e-6, 1.0 - 1e-6, _FRONTIER):
    r = share * p + (1.0 - share) * q
    points.append((
      math.exp(-_SCALE * stats.entropy(q, r)),
      math.exp(-_SCALE * stats.entropy(p, r)),
    ))
  x, y = np.array(sorted([*points, (1.0, 0.0)], key=lambda z: (z[0], -z[1]))).T
  return float(np.trapezoid(y, x))
