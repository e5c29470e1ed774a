"""The Bellman residual: 0 for exact critics, and what it should be for others."""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from qsharp_core import policy
from qsharp_core.residual import Step, bellman_residuals
from qsharp_core.wire.guidance import Tail
from trainer.tasks.tree_mdp import Node

ETAS = (0.05, 0.3, 2.0)
LEAST, MOST = -1.0, 2.0
Q = Callable[[Node], float]


def tree(dice: random.Random, name: str = "r", chance: float = 1.0, depth: int = 4) -> Node:
    """Four ways on at every node, rewards in `LEAST … MOST`."""
    if depth == 0:
        return Node(name, chance, reward=dice.uniform(LEAST, MOST))
    weights = [dice.random() + 0.05 for _ in range(4)]
    children = (tree(dice, f"{name}{i}", weight / sum(weights), depth - 1) for i, weight in enumerate(weights))
    return Node(name, chance, children=tuple(children))


def guided(
    node: Node, q: Q, eta: float, candidates: int, tail: Tail, min_prob: float
) -> tuple[float, list[float], list[float]]:
    """A node's value, and `ln ref` and `ln pi` of its children, by the functions that the server runs."""
    logits = torch.tensor([[math.log(child.chance) for child in node.children]], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    found = policy.select_candidates(logits, None, policy.least_log_ref([candidates], [min_prob], candidates))
    tilts = torch.tensor([[(q(child) - MOST) / eta for child in node.children]], dtype=torch.float64)
    keep, tail_tilt = torch.tensor([tail == Tail.KEEP]), policy.tail_tilt(tail, eta, (LEAST, MOST)) * one
    step = policy.guide(found, tilts.gather(1, found.ids_RK), eta * one, keep, tail_tilt, MOST * one)
    pairs = [policy.token_logprobs(found, step, torch.tensor([y])) for y in range(len(node.children))]
    return step.value_R.item(), [ref.item() for ref, _ in pairs], [pi.item() for _, pi in pairs]


def completions(
    node: Node, q: Q, eta: float, candidates: int = 4, tail: Tail = Tail.FLOOR, min_prob: float = 0.0
) -> Iterator[list[tuple[Node, Step]]]:
    """Every way from a node to a leaf: the token drawn at each step, and what is reported of it."""
    if not node.children:
        yield []
        return
    value, ref, pi = guided(node, q, eta, candidates, tail, min_prob)
    for child, below_ref, below_pi in zip(node.children, ref, pi, strict=True):
        if below_pi > -math.inf:
            for rest in completions(child, q, eta, candidates, tail, min_prob):
                yield [(child, Step(value, below_ref, below_pi)), *rest]


def residuals(way: list[tuple[Node, Step]], eta: float, tail: Tail = Tail.FLOOR) -> list[float]:
    return bellman_residuals([step for _, step in way], eta, tail, LEAST)


@pytest.mark.parametrize("eta", ETAS)
def test_an_exact_critic_agrees_with_itself(eta: float) -> None:
    for way in completions(tree(random.Random(1)), lambda node: node.optimal_q(eta), eta):
        found = residuals(way, eta)
        assert len(found) == 3
        assert max(map(abs, found)) < 1e-12


@pytest.mark.parametrize("eta", ETAS)
def test_one_that_errs_is_told_how_much_it_disagrees(eta: float) -> None:
    dice = random.Random(2)
    root = tree(dice)
    wrong = {node.name: node.optimal_q(eta) + dice.gauss(0, 0.1) for node in root.nodes()}
    everything = []
    for way in completions(root, lambda node: wrong[node.name], eta):
        wanted = [
            eta * math.log(sum(child.chance * math.exp(wrong[child.name] / eta) for child in node.children))
            - wrong[node.name]
            for node, _ in way[:-1]
        ]
        assert residuals(way, eta) == pytest.approx(wanted, abs=1e-12)
        everything += wanted
    assert sum(map(abs, everything)) / len(everything) > 0.05


def stretched(node: Node, chance: float) -> Node:
    """The same tree with a node between each and its children, which goes on to them with probability `chance`.

    Else it ends with the least reward. Children are equally likely, so that all of them are candidates.
    """
    if not node.children:
        return replace(node, chance=0.25)
    below = Node(f"{node.name}-", chance, children=tuple(stretched(child, chance) for child in node.children))
    end = Node(f"{node.name}!", 1 - chance, reward=LEAST)
    return Node(node.name, 0.25, children=(below, end) if chance < 1 else (below,))


@pytest.mark.parametrize("chance", [1.0, 0.95, 0.85])
@pytest.mark.parametrize("eta", ETAS)
def test_certain_tokens_between_do_not_matter(eta: float, chance: float) -> None:
    """Nobody asks at a step whose other token is less likely than `min_prob`; what is less than certain is news."""
    root = stretched(tree(random.Random(5), depth=3), chance)
    count = 0
    for way in completions(root, lambda node: node.optimal_q(eta), eta, min_prob=0.2):
        asked = [not math.isnan(step.value) for _, step in way]
        assert asked == [i % 2 == 1 for i in range(len(way))]
        found = residuals(way, eta)
        # All of a token's worth is in what follows the certain one, less what the other end of the step takes away.
        assert all(-1e-12 < delta < -eta * math.log(chance) + 1e-12 for delta in found)
        count += len(found)
    assert (count > 100) == (chance > 0.9) == (count > 0)


def test_it_is_a_difference_of_what_is_reported() -> None:
    steps = [Step(0.5, -1.0, -0.8), Step(0.6, -2.0, -2.5), Step(0.3, -0.1, -0.2)]
    wanted = [0.6 - 0.5 - 0.1 * 0.2, 0.3 - 0.6 + 0.1 * 0.5]
    assert bellman_residuals(steps, 0.1, Tail.FLOOR, 0.0) == pytest.approx(wanted, abs=1e-15)


def test_controlled_decodings_tilt_has_no_such_law() -> None:
    """`E[z]` of a mixture is the mean of the means, and `eta ln E exp` of them is more."""
    eta = 0.3
    found = [d for way in completions(tree(random.Random(3)), Node.mean, eta) for d in residuals(way, eta)]
    assert min(found) > -1e-12
    assert sum(found) / len(found) > 0.05


@pytest.mark.parametrize("tail", [Tail.FLOOR, Tail.KEEP])
@pytest.mark.parametrize("eta", [1e-3, 0.3, 1e5])
def test_tokens_from_the_tail_are_left_out(eta: float, tail: Tail) -> None:
    """What the critic has not said is not held against it; of `DROP`, none is ever drawn."""
    root = tree(random.Random(4))
    dropped = 0
    for way in completions(root, lambda node: node.optimal_q(eta), eta, 2, tail):
        before = [root, *(node for node, _ in way)]
        of_candidates = [
            sum(other.chance > node.chance for other in parent.children) < 2
            for parent, (node, _) in zip(before[:-1], way[:-1], strict=False)
        ]
        assert len(residuals(way, eta, tail)) == sum(of_candidates)
        dropped += len(of_candidates) - sum(of_candidates)
    assert dropped > 50
