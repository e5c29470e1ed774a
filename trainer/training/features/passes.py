"""Which passes the reference is run in, over the nodes of a prefix tree."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.training.prefix_tree import NO_NODE, PrefixTree, ancestors


def needed(tree: PrefixTree, read: NDArray[np.int64]) -> NDArray[np.int64]:
    """The nodes that must be run so that the nodes `read` can be read: these and their ancestors, ascending."""
    wanted = np.zeros(len(tree), dtype=bool)
    wanted[read] = True
    # Ancestors come before: one walk from the end marks all of them.
    for node in range(len(tree) - 1, -1, -1):
        if wanted[node] and (parent := tree.parents_N[node]) != NO_NODE:
            wanted[parent] = True
    return np.nonzero(wanted)[0]


def tokens_of_paths(tree: PrefixTree, nodes: NDArray[np.int64]) -> int:
    """The number of tokens that rows would have: one for each node that is no other's ancestor.

    Args:
        nodes: as `needed` returns them.
    """
    ends = np.isin(nodes, tree.parents_N[nodes], invert=True)
    return int((tree.depths_N[nodes[ends]] + 1).sum())


def common_chain(tree: PrefixTree, nodes: NDArray[np.int64]) -> int:
    """The number of first nodes that are ancestors of all others, which every pass would begin with.

    Args:
        nodes: as `needed` returns them. At least one node is not counted.
    """
    parents = tree.parents_N[nodes]
    places = np.where(parents == NO_NODE, NO_NODE, np.searchsorted(nodes, parents))
    highest = np.minimum.accumulate(places[::-1])[::-1]  # where anything from here on hangs
    length = 0
    while length < len(nodes) - 1 and places[length] == length - 1 and highest[length + 1] >= length:
        length += 1
    return length


@dataclass(frozen=True, eq=False)
class TreePass:
    """Nodes that are run together.

    Attributes:
        nodes: ascending. With a node its ancestors are among them, except those of the common chain.
        old: how many of the first nodes are ancestors that an earlier pass has run and read already.
    """

    nodes: NDArray[np.int64]
    old: int

    def partings(self, tree: PrefixTree) -> int:
        """The number of nodes whose parent is not the node before them."""
        return int((tree.parents_N[self.nodes[1:]] != self.nodes[:-1]).sum())


def cut(tree: PrefixTree, nodes: NDArray[np.int64], chain: int, size: int) -> Iterator[TreePass]:
    """Cuts `nodes[chain:]` into passes of about `size` nodes, where few ancestors have to be run again.

    A pass whose ancestors are more than half of `size` may be larger: it may take as many new nodes as it has
    ancestors. Of the new nodes that a pass may take it takes at least half, and ends where the next pass has the fewest
    ancestors to run again for each of them.

    Args:
        nodes: as `needed` returns them.
        chain: the number of first nodes that are run by themselves, before all passes.
        size: nodes of a pass, ancestors included.
    """
    apart = set(nodes[:chain].tolist())
    again = tree.depths_N[nodes] - chain  # what a pass that begins at a node runs once more
    at = chain
    while at < len(nodes):
        above = np.array([a for a in ancestors(tree, int(nodes[at])) if a not in apart], dtype=np.int64)
        most = max(size - len(above), len(above), 1)
        end = min(at + most, len(nodes))
        if end < len(nodes):
            new = np.arange(most, (most - 1) // 2, -1)  # the most first: of equally good ends the last
            end = at + int(new[(again[at + new] / new).argmin()])
        yield TreePass(np.concatenate([above, nodes[at:end]]), len(above))
        at = end
