"""Rollouts merged where they agree: every distinct prefix is a node, a token after its ancestors.

Nodes are in the order of a depth-first walk, so a node's ancestors come before it and its descendants behind it,
without gaps. Any stretch of the order can then be run as one pass, with the ancestors of its first node in front.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.training.batching import shared_prefix
from trainer.training.data import Rollout

KEY = 16
"""Bytes of a prefix's digest: collisions of random 128-bit numbers do not happen."""
NO_NODE = -1


@dataclass(frozen=True, eq=False)
class Prefixes:
    """The prefix tree of rollouts, N nodes.

    Attributes:
        tokens_N: int32.
        parents_N: int32; `NO_NODE` before a sequence's first token.
        depths_N: int32, from 0.
        keys_N: `[N, KEY]` uint8, a digest of the token and all before it.
        labelled: of each rollout, in the order given, the nodes of its valid positions.
    """

    tokens_N: NDArray[np.int32]
    parents_N: NDArray[np.int32]
    depths_N: NDArray[np.int32]
    keys_N: NDArray[np.uint8]
    labelled: list[NDArray[np.int32]]

    def __len__(self) -> int:
        return len(self.tokens_N)


def merge(rollouts: Sequence[Rollout]) -> Prefixes:
    """The prefix tree of all rollouts together."""
    order = sorted(range(len(rollouts)), key=lambda i: (rollouts[i].order, i))
    tokens: list[NDArray[np.int32]] = []
    parents: list[NDArray[np.int32]] = []
    depths: list[NDArray[np.int32]] = []
    keys: list[bytes] = []
    labelled: list[NDArray[np.int32]] = [np.empty(0, np.int32)] * len(rollouts)
    size = 0
    before, path = np.empty(0, np.int32), np.empty(0, np.int32)
    for i in order:
        sequence = rollouts[i].token_ids
        common = shared_prefix(before, sequence)
        chain = np.arange(size, size + len(sequence) - common, dtype=np.int32)
        path = np.concatenate([path[:common], chain])
        if len(chain):
            tokens.append(sequence[common:])
            parents.append(
                np.concatenate([path[common - 1 : common] if common else [NO_NODE], chain[:-1]]).astype("i4")
            )
            depths.append(np.arange(common, len(sequence), dtype=np.int32))
            keys += _chained(keys[path[common - 1]] if common else b"", sequence[common:])
            size += len(chain)
        labelled[i] = path[len(rollouts[i].prompt) + rollouts[i].first_valid :]
        before = sequence
    return Prefixes(
        np.concatenate(tokens),
        np.concatenate(parents),
        np.concatenate(depths),
        np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY),
        labelled,
    )


def _chained(key: bytes, tokens: NDArray[np.int32]) -> Iterator[bytes]:
    """The digest after each token: of the digest before and the token."""
    for token in tokens.astype("<i4"):
        key = hashlib.blake2b(key + token.tobytes(), digest_size=KEY).digest()
        yield key


def ancestors(tree: Prefixes, node: int) -> NDArray[np.int64]:
    """A node's ancestors, the farthest first."""
    found = []
    while (node := int(tree.parents_N[node])) != NO_NODE:
        found.append(node)
    return np.array(found[::-1], dtype=np.int64)


def needed(tree: Prefixes, read: NDArray[np.int64]) -> NDArray[np.int64]:
    """The nodes to run so that `read` can be read: these and their ancestors, ascending."""
    wanted = np.zeros(len(tree), dtype=bool)
    wanted[read] = True
    # Ancestors come before: one walk from the end marks all of them.
    for node in range(len(tree) - 1, -1, -1):
        if wanted[node] and (parent := tree.parents_N[node]) != NO_NODE:
            wanted[parent] = True
    return np.nonzero(wanted)[0]


def common_chain(tree: Prefixes, nodes: NDArray[np.int64]) -> int:
    """How many of the first nodes are ancestors of all others: what every pass would begin with.

    Args:
        nodes: as `needed` gives them. At least one is left.
    """
    parents = tree.parents_N[nodes]
    places = np.where(parents == NO_NODE, NO_NODE, np.searchsorted(nodes, parents))
    highest = np.minimum.accumulate(places[::-1])[::-1]  # where anything from here on hangs
    length = 0
    while length < len(nodes) - 1 and places[length] == length - 1 and highest[length + 1] >= length:
        length += 1
    return length


@dataclass(frozen=True, eq=False)
class Pass:
    """Nodes run together: `nodes[old:]` are new, those before are ancestors that were run before and are run again.

    Attributes:
        nodes: ascending, closed under ancestors but for the common chain.
        old: how many of them an earlier pass has read already.
    """

    nodes: NDArray[np.int64]
    old: int

    def partings(self, tree: Prefixes) -> int:
        """How many nodes do not follow the one before."""
        return int((tree.parents_N[self.nodes[1:]] != self.nodes[:-1]).sum())


def cut(tree: Prefixes, nodes: NDArray[np.int64], chain: int, size: int) -> Iterator[Pass]:
    """Cuts `nodes[chain:]` into passes of about `size` nodes; one whose ancestors alone are more takes as many again.

    Args:
        nodes: as `needed` gives them.
        chain: how many of the first are run apart, before all passes.
    """
    apart = set(nodes[:chain].tolist())
    at = chain
    while at < len(nodes):
        above = np.array([a for a in ancestors(tree, int(nodes[at])) if a not in apart], dtype=np.int64)
        end = at + max(size - len(above), len(above), 1)
        yield Pass(np.concatenate([above, nodes[at:end]]), len(above))
        at = end


def visible(tree: Prefixes, nodes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of a pass's nodes each sees: its ancestors and itself, `[S, S]`."""
    place = {int(node): i for i, node in enumerate(nodes)}
    seen = np.eye(len(nodes), dtype=bool)
    for i, node in enumerate(nodes):
        above = place.get(int(tree.parents_N[node]))
        if above is not None:
            seen[i] |= seen[above]
    return seen
