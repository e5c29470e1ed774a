"""Sequences of tokens merged where they begin alike: the one tree that training and weighing are built on.

Every distinct prefix is a node: a token after its ancestors. Nodes are in the order of a depth-first walk, so a node's
ancestors come before it, and its descendants follow it without gaps. Any stretch of that order can be run as one pass
of a model, with the ancestors of its first node in front.

Shapes: N nodes of a tree, S nodes of a pass.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int32]
KEY = 16
"""Bytes of a prefix's digest: collisions of random 128-bit numbers do not happen."""
NO_NODE = -1
"""The parent of a sequence's first token."""


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """The prefix tree of some sequences.

    Attributes:
        tokens_N: each node's own token, int32.
        parents_N: each node's parent, int32; `NO_NODE` for a sequence's first token.
        depths_N: the number of each node's ancestors, int32.
        paths: for each sequence, in the order given, the nodes of its tokens, int32.
    """

    tokens_N: NDArray[np.int32]
    parents_N: NDArray[np.int32]
    depths_N: NDArray[np.int32]
    paths: list[NDArray[np.int32]]

    def __len__(self) -> int:
        return len(self.tokens_N)

    @cached_property
    def keys_N(self) -> NDArray[np.uint8]:
        """A digest of each node's token and all tokens before it, `[N, KEY]`."""
        keys: list[bytes] = []
        for token, parent in zip(self.tokens_N.astype("<i4"), self.parents_N.tolist(), strict=True):
            before = b"" if parent == NO_NODE else keys[parent]
            keys.append(hashlib.blake2b(before + token.tobytes(), digest_size=KEY).digest())
        return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY)


def merge(sequences: Sequence[TokenIds]) -> PrefixTree:
    """The prefix tree of all sequences together; at least one of them has a token."""
    tokens: list[NDArray[np.int32]] = []
    parents: list[NDArray[np.int32]] = []
    depths: list[NDArray[np.int32]] = []
    paths: list[NDArray[np.int32]] = [np.empty(0, np.int32)] * len(sequences)
    size = 0
    before, path = np.empty(0, np.int32), np.empty(0, np.int32)
    for i in sorted(range(len(sequences)), key=lambda i: (sort_key(sequences[i]), i)):
        sequence = sequences[i]
        common = shared_prefix(before, sequence)
        chain = np.arange(size, size + len(sequence) - common, dtype=np.int32)
        path = np.concatenate([path[:common], chain])
        if len(chain):
            tokens.append(sequence[common:])
            parents.append(
                np.concatenate([path[common - 1 : common] if common else [NO_NODE], chain[:-1]]).astype("i4")
            )
            depths.append(np.arange(common, len(sequence), dtype=np.int32))
            size += len(chain)
        paths[i] = path
        before = sequence
    return PrefixTree(np.concatenate(tokens), np.concatenate(parents), np.concatenate(depths), paths)


def sort_key(sequence: TokenIds) -> bytes:
    """A key that sorts sequences by their tokens, so that those with a common prefix are neighbours."""
    return sequence.astype(">i4").tobytes()


def shared_prefix(a: TokenIds, b: TokenIds) -> int:
    """The number of tokens that two sequences begin with alike."""
    length = min(len(a), len(b))
    differ = np.nonzero(a[:length] != b[:length])[0]
    return int(differ[0]) if len(differ) else length


def ancestors(tree: PrefixTree, node: int) -> NDArray[np.int64]:
    """A node's ancestors, the farthest first."""
    above = []
    while (node := int(tree.parents_N[node])) != NO_NODE:
        above.append(node)
    return np.array(above[::-1], dtype=np.int64)


def visible(tree: PrefixTree, nodes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of a pass's nodes each node sees, `[S, S]`: its ancestors and itself.

    Args:
        nodes: `[S]`, ascending. Ancestors that are not among them are not seen.
    """
    parents = tree.parents_N[nodes]
    above = np.searchsorted(nodes, parents)  # where a node's parent is, if it is there
    known = (parents != NO_NODE) & (nodes[np.minimum(above, len(nodes) - 1)] == parents)
    seen = np.zeros((len(nodes), len(nodes)), dtype=bool)
    # Chains: runs of nodes each of which follows the one before.
    starts = np.nonzero(~known | (above != np.arange(len(nodes)) - 1))[0]
    for start, end in zip(starts, [*starts[1:], len(nodes)], strict=True):
        if known[start]:
            seen[start:end] = seen[above[start]]
        seen[start:end, start:end] = np.tri(end - start, dtype=bool)
    return seen
