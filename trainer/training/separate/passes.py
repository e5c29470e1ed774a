"""The batches that this process runs of a step."""

from collections.abc import Sequence
from dataclasses import dataclass

from accelerate import Accelerator

from qsharp_core.critic.model import Critic
from trainer.training.plan import batch_of
from trainer.training.rollouts import Indexed, Rollouts
from trainer.training.rows import WORTHWHILE, padded_passes
from trainer.training.separate.batches import Batch, padded, tree
from trainer.training.separate.batching import TREE_NODES, plan_epoch, share, tokens_of, tree_passes
from trainer.training.separate.scorer import understands_trees
from trainer.training.settings import TrainSettings


@dataclass(frozen=True)
class Passes:
    """How steps are run.

    Attributes:
        trees: whether rollouts that share a prefix run as a tree.
        max_tokens: the most tokens (or nodes) of a pass.
        process, processes: the number of this process, from 0, and of all processes.
        level: whether all processes run as many batches, some of them without weight, as a sharded critic needs.
    """

    trees: bool
    max_tokens: int
    process: int = 0
    processes: int = 1
    level: bool = False

    def cut(self, indices: Sequence[int], rollouts: Indexed) -> list[list[int]]:
        """The passes of a step, those of all processes."""
        if self.trees:
            return tree_passes(indices, rollouts, min(self.max_tokens, TREE_NODES))
        return padded_passes(indices, {i: rollouts[i].length for i in indices}, self.max_tokens)

    def batches(self, indices: Sequence[int], rollouts: Indexed) -> list[Batch]:
        """This process's batches of a step. There is at least one; it has no weight if there is nothing to do."""
        rollouts = {i: rollouts[i] for i in indices}  # read once
        shares = share(self.cut(indices, rollouts), self.processes)
        # A tree of one rollout is a row, which needs no mask of its own.
        ours = [tree(p, rollouts) if self.trees and len(p) > 1 else padded(p, rollouts) for p in shares[self.process]]
        wanted = max(map(len, shares)) if self.level else 1
        return ours + [padded(indices[:1], rollouts).without_weight()] * (wanted - len(ours))


def saving(steps: Sequence[list[int]], rollouts: Rollouts, max_tokens: int) -> float:
    """The fraction of the tokens that is left to run in trees, estimated on some steps."""
    nodes = tokens = 0
    cut = Passes(True, max_tokens)
    for indices in steps[:4]:
        held = rollouts.held(indices)
        tokens += sum(r.length for r in held.values())
        nodes += sum(tree(p, held).input_ids.numel() for p in cut.cut(indices, held))
    return nodes / tokens


def passes_of(settings: TrainSettings, accelerator: Accelerator, critic: Critic, rollouts: Rollouts) -> Passes:
    """How a critic's steps are run: as trees if its backbone obeys their mask and they save enough, else as rows."""
    batch = batch_of(settings, tokens_of(rollouts))
    max_tokens = max(batch // settings.grad_accumulation, 1)
    trees = settings.share_prefixes
    if trees:
        plan = plan_epoch(rollouts, batch, True, settings.seed, 0)
        trees = saving(plan, rollouts, max_tokens) <= WORTHWHILE
    trees = trees and understands_trees(critic, rollouts, accelerator.device)
    return Passes(trees, max_tokens, accelerator.process_index, accelerator.num_processes)
