"""A tree whose every `Q*` is known, as a task: the tabular check of the whole method.

In the paper's Figure 4 the left branch earns 0.1 for sure and the right one 1 with probability 0.05. Controlled
Decoding, which goes by expected rewards, turns left however small `eta` is; the optimal policy turns right.

`trainer.experiments.tree_mdp` makes a language model of the tree, in which every node is a token.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from trainer.tasks.base import Problem, SamplingDefaults, Task

END = "<end>"
"""The text of the token that follows a leaf."""


@dataclass(frozen=True)
class Node:
    """A node of a tree; a leaf has a reward and no children.

    Attributes:
        name: the node's token, unique in the tree.
        chance: probability that the reference goes here from the node's parent.
    """

    name: str
    chance: float = 1.0
    reward: float | None = None
    children: tuple["Node", ...] = ()

    def __post_init__(self) -> None:
        assert (self.reward is None) == bool(self.children), self.name
        assert not self.children or math.isclose(sum(c.chance for c in self.children), 1.0), self.name

    def nodes(self) -> Iterator["Node"]:
        """Yields this node and all nodes below it, parents first."""
        yield self
        for child in self.children:
            yield from child.nodes()

    def outcomes(self) -> dict[float, float]:
        """The law of the reward that the reference earns from this node on: probabilities by reward."""
        if self.reward is not None:
            return {self.reward: 1.0}
        law: dict[float, float] = {}
        for child in self.children:
            for reward, p in child.outcomes().items():
                law[reward] = law.get(reward, 0.0) + child.chance * p
        return law

    def optimal_q(self, eta: float) -> float:
        """The optimal soft value `Q* = eta ln E[exp(z / eta)]` (Theorem 2.2), in units of reward."""
        law = self.outcomes()
        best = max(law)
        return best + eta * math.log(sum(p * math.exp((z - best) / eta) for z, p in law.items()))

    def mean(self) -> float:
        """The expected reward of the reference from this node on: what Controlled Decoding goes by."""
        return sum(z * p for z, p in self.outcomes().items())


@dataclass(frozen=True)
class Guided:
    """What a policy achieves from a node on: expected reward, and KL divergence to the reference in nats."""

    value: float
    kl: float


def guided(node: Node, eta: float, method: str) -> Guided:
    """What the exactly guided policy `pi(child) ∝ chance · exp(A)` achieves.

    Args:
        method: `qsharp` has `A = Q* / eta`, `cd` has `A = E[z] / eta`.
    """
    if node.reward is not None:
        return Guided(node.reward, 0.0)
    tilts = [(child.optimal_q(eta) if method == "qsharp" else child.mean()) / eta for child in node.children]
    highest = max(tilts)
    weights = [child.chance * math.exp(tilt - highest) for child, tilt in zip(node.children, tilts, strict=True)]
    law = [weight / sum(weights) for weight in weights]
    below = [guided(child, eta, method) for child in node.children]
    step = sum(p * math.log(p / child.chance) for p, child in zip(law, node.children, strict=True) if p > 0)
    return Guided(
        sum(p * one.value for p, one in zip(law, below, strict=True)),
        step + sum(p * one.kl for p, one in zip(law, below, strict=True)),
    )


FIGURE_4 = Node(
    "root",
    children=(
        Node("left", 0.5, children=(Node("sure", 1.0, reward=0.1),)),
        Node("right", 0.5, children=(Node("win", 0.05, reward=1.0), Node("lose", 0.95, reward=0.0))),
    ),
)


def _reward(_: Problem, text: str) -> float | None:
    """The reward of the last node that a completion names; None if that is no leaf."""
    leaves = {node.name: node.reward for node in FIGURE_4.nodes() if node.reward is not None}
    words = text.replace(END, "").split()
    return leaves.get(words[-1]) if words else None


TASK = Task(
    name="tree_mdp",
    splits=("train",),
    problems=lambda _: [Problem(id="figure-4", prompt=FIGURE_4.name)],
    sampling=SamplingDefaults(max_tokens=4),
    reward=_reward,
)
