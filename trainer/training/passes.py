"""From a step's rollouts to this process's batches."""

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.training.batches import Batch, padded, tree
from trainer.training.batching import TREE_NODES, padded_passes, share, tree_passes
from trainer.training.data import Rollout


@dataclass(frozen=True)
class Passes:
    """How steps are run.

    Attributes:
        trees: whether rollouts share their prefixes.
        max_tokens: tokens (or nodes) of a pass.
        process, processes: which of how many this is.
    """

    trees: bool
    max_tokens: int
    process: int = 0
    processes: int = 1

    def cut(self, indices: Sequence[int], rollouts: Sequence[Rollout]) -> list[list[int]]:
        """A step's passes, of all processes."""
        if self.trees:
            return tree_passes(indices, rollouts, min(self.max_tokens, TREE_NODES))
        return padded_passes(indices, {i: rollouts[i].length for i in indices}, self.max_tokens)

    def batches(self, indices: Sequence[int], rollouts: Sequence[Rollout]) -> list[Batch]:
        """This process's batches of a step: at least one, without weight if there is nothing to do."""
        ours = share(self.cut(indices, rollouts), self.processes)[self.process]
        if not ours:
            return [padded(indices[:1], rollouts).without_weight()]
        # A tree of one rollout is a row, which needs no mask of its own.
        return [tree(p, rollouts) if self.trees and len(p) > 1 else padded(p, rollouts) for p in ours]


def saving(steps: Sequence[list[int]], rollouts: Sequence[Rollout], max_tokens: int) -> float:
    """The part of the tokens that trees leave to run, estimated on some steps."""
    nodes = tokens = 0
    cut = Passes(True, max_tokens)
    for indices in steps[:4]:
        tokens += sum(rollouts[i].length for i in indices)
        nodes += sum(tree(p, rollouts).input_ids.numel() for p in cut.cut(indices, rollouts))
    return nodes / tokens
