r"""From a language and a tokenizer to a deterministic automaton over tokens.

`outlines-core` makes the automaton of single bytes. What a token does is what
its bytes do one after another, found for all states and tokens at once by
walking the tree of tokens; its own index of tokens, which is a Python dictionary
of each state and token, would have millions of entries. Tokens that no state
tells apart are one class; the sets of classes that lead from a state to another
are few, and shared by many such pairs.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import hashlib
import json
import os

import numpy as np

from dllm_jax.core import files, paths
from dllm_jax.data.tokenizer import Tokenizer
from dllm_jax.sampling.constraints.language import Language, NEEDED
from dllm_jax.sampling.constraints.monoid import hashes, maps_of
from dllm_jax.sampling.constraints.spelling import spelling

_VERSION = 1  # of what is kept on disk
MOST_STATES = 32_768
"""States of a language, at most."""


@dataclasses.dataclass(frozen=True, eq=False)
class Automaton:
  """What tokens do, in numbers; state 0 is the first.

  Attributes:
    classes: the class of each token, `[V]`; 0 is that of tokens with no place in
      the language.
    members: pairs (set, class) in order, `[N, 2]`: which classes a set has.
    arcs: triples (from, set, to), `[A, 3]`: from a state each token leads to one
      state at most, by the one arc whose set has its class.
    accepting: states in which a text may end, `[S]`.
    ended: the state behind an end of text, or -1: its tokens lead to it from each
      state that accepts, and from itself.
    name: what messages call the language.
  """

  classes: np.ndarray
  members: np.ndarray
  arcs: np.ndarray
  accepting: np.ndarray
  ended: int = -1
  name: str = "the language"

  @property
  def states(self) -> int:
    """The number of states."""
    return len(self.accepting)

  @property
  def sets(self) -> int:
    """The number of sets of classes."""
    return int(self.members[:, 0].max(initial=-1)) + 1

  @property
  def kinds(self) -> int:
    """The number of classes, that of no place included."""
    return int(self.members[:, 1].max(initial=0)) + 1

  @functools.cached_property
  def end_ids(self) -> tuple[int, ...]:
    """The tokens that end a text."""
    last = self.classes == self.kinds - 1
    return tuple(np.flatnonzero(last).tolist()) if self.ended >= 0 else ()

  @functools.cached_property
  def shortest(self) -> int:
    """Tokens of the shortest text, its end left out."""
    reached, count = np.zeros(self.states, bool), 0
    reached[0] = True
    while not (reached & self.accepting).any():
      reached[self.arcs[reached[self.arcs[:, 0]], 2]] = True
      count += 1
    return count


def automaton_of(language: Language, tokenizer: Tokenizer) -> Automaton:
  """Returns the automaton of a language over a tokenizer's tokens.

  Kept under `~/.cache/dllm_jax`, or where `XDG_CACHE_HOME` says.

  Raises:
    ValueError: the expression is illegal or has too many states, or the tokens
      cannot write any of its texts.
  """
  key = hashlib.sha256(
    json.dumps([_VERSION, language.pattern, _fingerprint(tokenizer)]).encode()
  ).hexdigest()
  root = paths.place(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
  file = root / "dllm_jax" / "languages" / key[:32] / "arrays.npz"
  if (known := _read(file)) is not None:
    return dataclasses.replace(known, name=language.name)
  made = compiled(
    language.pattern,
    spelling(tokenizer).written(),
    tokenizer.end_ids,
    name=language.name,
  )
  _write(file, made)
  return made


@functools.lru_cache(maxsize=4)
def _fingerprint(tokenizer: Tokenizer) -> str:
  text = tokenizer.to_json() + str(tokenizer.end_ids)
  return hashlib.sha256(text.encode()).hexdigest()


_ARRAYS = ("classes", "members", "arcs", "accepting", "ended")


def _read(file: paths.Path) -> Automaton | None:
  try:
    with file.open("rb") as opened, np.load(opened) as arrays:
      fields = {name: arrays[name] for name in _ARRAYS}
  except (OSError, ValueError, KeyError, EOFError):
    return None
  return Automaton(**fields | {"ended": int(fields["ended"])})


def _write(file: paths.Path, made: Automaton) -> None:
  """Keeps an automaton, if there is a place for it."""
  try:
    with files.new_folder(file.parent) as folder:
      part = folder / "arrays.npz"
      with part.open("wb") as opened:
        np.savez(opened, **{name: getattr(made, name) for name in _ARRAYS})
  except OSError:
    return


def compiled(
  pattern: str,
  tokens: Sequence[bytes],
  end_ids: Sequence[int] = (),
  *,
  name: str = "the language",
) -> Automaton:
  """Returns the automaton of an expression over tokens of some bytes each.

  Args:
    pattern: the expression.
    tokens: what each token writes; nothing, if it has no place in a text.
    end_ids: tokens that end a text.
    name: what messages call the language.

  Raises:
    ValueError: as of `automaton`.
  """
  table, accepting = _bytes(pattern, name)
  kind, *ways = maps_of(table, tokens)
  of, src, dst, accepting = _trimmed(*ways, accepting)
  if not len(accepting):
    raise ValueError(
      f"this tokenizer's tokens cannot write any text of {name}: it has"
      " characters that they lack"
    )
  classes, first = _classes(of, src, dst, kind)
  some = np.isin(of, first)  # one map of each class speaks for all
  made = _arcs(src[some], classes[of[some]], dst[some])
  classes = np.append(classes, 0).astype(np.int32)[kind]  # -1 is no map
  return _with_end(classes, *made, accepting, end_ids, name)


def _bytes(pattern: str, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns (next state of each state and byte, -1 for none; who accepts).

  The first state is 0. The library's index (0.2.14) leaves out ways from a text
  that matches to one that does not yet, "ab" to "aba" of (ab)+: a zero byte is
  put behind every text, so that none matches before its end.
  """
  try:
    import outlines_core  # noqa: PLC0415  Of an extra.
  except ImportError:
    raise ValueError(NEEDED) from None
  single = outlines_core.Vocabulary(256, {bytes([i]): [i] for i in range(256)})
  try:
    index = outlines_core.Index(rf"(?:{pattern})\x00", single)
  except ValueError as error:
    said = " ".join(str(error).split())
    raise ValueError(
      f"{name} is no regular expression that can be followed ({said[:160]}):"
      " look-around, back-references, \\b and anchors inside are not supported"
    ) from None
  arrows: Mapping[int, Mapping[int, int]] = index.get_transitions()
  start, final = index.get_initial_state(), index.get_final_states()
  names = [start, *sorted(set(arrows) - {start})]
  if len(names) > MOST_STATES:
    raise ValueError(
      f"{name} has {len(names)} states, more than {MOST_STATES}: make it smaller"
    )
  number = {state: i for i, state in enumerate(names)}
  table = np.full((len(names), 256), -1, np.int32)
  for state, out in arrows.items():
    for byte, to in out.items():
      if 0 < byte < 256 and to in number:
        table[number[state], byte] = number[to]
  ends = [number[s] for s, out in arrows.items() if out.get(0) in final]
  accepting = np.zeros(len(table), bool)
  accepting[ends] = True
  return table, accepting


def _trimmed(of, src, dst, accepting):
  """Returns what lies between the first state and one that accepts.

  States are numbered anew; none is left where there is no way.
  """
  pairs = np.unique(src * len(accepting) + dst)
  tail, head = pairs // len(accepting), pairs % len(accepting)
  here = np.zeros(len(accepting), bool)
  here[0] = True
  reached = _closure(here, tail, head)
  useful = _closure(accepting, head, tail) & reached
  number = np.cumsum(useful) - 1
  if not useful[0]:
    return of, src, dst, accepting[:0]
  keep = useful[src] & useful[dst]
  return of[keep], number[src[keep]], number[dst[keep]], accepting[useful]


def _closure(start, tail, head):
  """Returns what can be reached along arrows."""
  reached, count = start.copy(), -1
  while count < (count := int(reached.sum())):
    reached[head[reached[tail]]] = True
  return reached


def _classes(of, src, dst, kind):
  """Returns the class of each map, and a map of each class from 1 on."""
  marks = hashes(of, int(kind.max()) + 1, src, dst)
  known, first, inverse = np.unique(
    marks, return_index=True, return_inverse=True
  )
  if known[:1].all():  # each map has a place
    return inverse + 1, first
  return inverse, first[1:]


def _arcs(src, kind, dst):
  """Returns members and arcs of single (from, class, to)."""
  base = max(src.max(initial=0), dst.max(initial=0)) + 1
  ways, pair = np.unique(src * base + dst, return_inverse=True)
  mark = hashes(pair, len(ways), kind)
  _, first, inverse = np.unique(mark, return_index=True, return_inverse=True)
  arcs = np.stack([ways // base, inverse, ways % base], 1)
  number = np.full(len(ways), -1)
  number[first] = np.arange(len(first))
  of = number[pair]
  some = of >= 0
  members = np.unique(np.stack([of[some], kind[some]], 1), axis=0)
  return members.astype(np.int32), arcs.astype(np.int32)


def _with_end(classes, members, arcs, accepting, end_ids, name) -> Automaton:
  """Returns the automaton with a state behind the end of text."""
  if not len(end_ids):
    return Automaton(classes, members, arcs, accepting, name=name)
  classes = classes.copy()
  kind, group = classes.max() + 1, members[:, 0].max(initial=-1) + 1
  classes[list(end_ids)] = kind
  state = len(accepting)
  froms = np.append(np.flatnonzero(accepting), state)
  more = np.stack([
    froms, np.full_like(froms, group), np.full_like(froms, state)
  ], 1)  # fmt: skip
  return Automaton(
    classes.astype(np.int32),
    np.concatenate([members, [[group, kind]]]).astype(np.int32),
    np.concatenate([arcs, more]).astype(np.int32),
    np.append(accepting, True),
    ended=state,
    name=name,
  )
