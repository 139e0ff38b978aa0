"""What tokens do to the states of an automaton of bytes, all of them at once."""

from collections.abc import Sequence
import dataclasses
import functools

import numpy as np

_MANY_BYTES = 64
"""Bytes that leave a state where it is, from which on its loops are worth it."""


@dataclasses.dataclass(frozen=True)
class Tree:
  """Tokens by their bytes: node 0 is the empty text, children come in a row.

  Attributes:
    tokens: how many there are.
    parent: of each node.
    first: the first child of each node.
    count: how many it has.
    byte: what leads to each node.
    holder: tokens, sorted by the node that they end at.
    begins: where those of each node begin among them, and one more.
  """

  tokens: int
  parent: np.ndarray
  first: np.ndarray
  count: np.ndarray
  byte: np.ndarray
  holder: np.ndarray
  begins: np.ndarray


@functools.lru_cache(maxsize=2)
def tree_of(tokens: tuple[bytes, ...]) -> Tree:
  """Returns the tree of what tokens write; those that write nothing are not in it."""
  ids = np.array([i for i, t in enumerate(tokens) if t], np.int64)
  lengths = np.array([len(tokens[i]) for i in ids], np.int64)
  flat = np.frombuffer(b"".join(tokens[i] for i in ids), np.uint8)
  begins = np.cumsum(lengths) - lengths
  node = np.zeros(len(ids), np.int64)
  first, count, byte = [np.zeros(1, np.int64)], [], [np.zeros(1, np.uint8)]
  parents = [np.zeros(1, np.int64)]
  at, nodes, level = np.arange(len(ids)), 1, 1
  end = np.zeros(len(ids), np.int64)
  depth = 0
  while level:
    at = at[lengths[at] > depth]
    key = node[at] * 256 + flat[begins[at] + depth]
    known, inverse = np.unique(key, return_inverse=True)
    parent = known // 256
    low = nodes - level
    have = np.bincount(parent - low, minlength=level)[:level]
    count.append(have)
    first[-1] = nodes + np.cumsum(have) - have
    byte.append((known % 256).astype(np.uint8))
    parents.append(parent)
    node[at] = nodes + inverse
    end[at] = node[at]
    level = len(known)
    first.append(np.zeros(level, np.int64))
    nodes += level
    depth += 1
  order = np.argsort(end, kind="stable")
  return Tree(
    tokens=len(tokens),
    parent=np.concatenate(parents),
    first=np.concatenate(first),
    count=np.concatenate([*count, np.zeros(0, np.int64)]),
    byte=np.concatenate(byte),
    holder=ids[order],
    begins=np.searchsorted(end[order], np.arange(nodes + 1)),
  )


def _spread(first: np.ndarray, count: np.ndarray):
  """Returns (which, where) of runs of so many from each first on."""
  which = np.repeat(np.arange(len(count)), count)
  behind = np.repeat(np.cumsum(count) - count, count)
  return which, np.repeat(first, count) + np.arange(len(which)) - behind


def loops_of(
  table: np.ndarray, tree: Tree
) -> list[tuple[np.ndarray, np.ndarray]]:
  """Returns (states, tokens that lead from each of them to itself) of some states.

  Most tokens leave the inside of a string where it is, byte for byte: they are
  found once for all strings of a schema, and not walked.
  """
  stays = table == np.arange(len(table))[:, None]
  kinds, of = np.unique(stays, axis=0, return_inverse=True)
  found = []
  for i in np.flatnonzero(kinds.sum(axis=1) >= _MANY_BYTES):
    inside = np.ones(len(tree.byte), bool)
    for nodes in _levels(tree):
      inside[nodes] = inside[tree.parent[nodes]] & kinds[i][tree.byte[nodes]]
    tokens = np.zeros(tree.tokens, bool)
    counts = np.diff(tree.begins)
    tokens[tree.holder[np.repeat(inside, counts)]] = True
    found.append((np.flatnonzero(of.reshape(-1) == i), tokens))
  return found


def _levels(tree: Tree):
  """Yields the nodes of each depth, from 1 on."""
  start, stop = 1, 1 + int(tree.count[0])
  while start < stop:
    yield np.arange(start, stop)
    start, stop = stop, stop + int(tree.count[start:stop].sum())


def walked(
  table: np.ndarray,
  tree: Tree,
  loops: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns all (from, token, to), those of loops left out.

  Args:
    table: the states behind each byte, -1 for none.
    tree: the tokens.
    loops: what `loops_of` found.
  """
  rest, parts = np.ones(len(table), bool), []
  for states, stays in loops:
    rest[states] = False
    ends = np.repeat(np.arange(len(tree.byte)), np.diff(tree.begins))
    open_ = np.zeros(len(tree.byte), bool)
    open_[ends[~stays[tree.holder]]] = True
    for nodes in reversed(list(_levels(tree))):
      open_[tree.parent[nodes[open_[nodes]]]] = True
    src, token, dst = _walk(table, tree, states, open_)
    keep = ~stays[token]
    parts.append((src[keep], token[keep], dst[keep]))
  parts.append(_walk(table, tree, np.flatnonzero(rest), None))
  return tuple(np.concatenate(p) for p in zip(*parts, strict=True))


def _walk(table, tree, states, open_):
  """Returns all (from, token, to) with a way through the bytes of the token.

  Args:
    table: the states behind each byte.
    tree: the tokens.
    states: where ways begin.
    open_: nodes that may be come by; None for all.
  """
  src = states.astype(np.int32)
  at, node = src, np.zeros(len(src), np.int64)
  none = np.zeros(0, np.int32)
  found = [(none, none, none)]
  while len(src):
    which, node = _spread(tree.first[node], tree.count[node])
    if open_ is not None:
      some = np.flatnonzero(open_[node])
      which, node = which[some], node[some]
    to = table[at[which], tree.byte[node]]
    live = np.flatnonzero(to >= 0)
    src, at, node = src[which[live]], to[live], node[live]
    held = tree.begins[node + 1] - tree.begins[node]
    which, where = _spread(tree.begins[node], held)
    found.append((src[which], tree.holder[where].astype(np.int32), at[which]))
  return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))
