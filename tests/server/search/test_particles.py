"""The law of particles on the paper's Figure 4, under a critic that is wrong inside the tree and right at leaves."""

import asyncio
import math
import random

import pytest

from qsharp_core.vllm_plugin.telemetry import Status
from server.request.search.found import estimate
from server.request.search.particles import Cloud, Extend, Particle
from server.request.telemetry import TokenReport
from trainer.tasks.tree_mdp import FIGURE_4, Node

ETA = 0.15
NAMES = [node.name for node in FIGURE_4.nodes()]
NODES = {node.name: node for node in FIGURE_4.nodes()}
# Of the leaves it is the reward, of `left` too much, of `right` far too little.
CRITIC = {"left": 0.3, "right": 0.1, "sure": 0.1, "win": 1.0, "lose": 0.0}
LEAVES = ("sure", "win", "lose")


def optimal() -> dict[str, float]:
    """`pi*`: the reference's law of leaves, tilted by their rewards."""
    mass = {
        "sure": 0.5 * math.exp(0.1 / ETA), "win": 0.5 * 0.05 * math.exp(1 / ETA), "lose": 0.5 * 0.95,
    }  # fmt: skip
    return {name: mass[name] / sum(mass.values()) for name in LEAVES}


def guided_step(node: Node, rng: random.Random) -> tuple[Node, TokenReport]:
    """A child drawn by the guided policy, and what the worker would report."""
    value = ETA * math.log(sum(child.chance * math.exp(CRITIC[child.name] / ETA) for child in node.children))
    pi = [child.chance * math.exp((CRITIC[child.name] - value) / ETA) for child in node.children]
    (i,) = rng.choices(range(len(pi)), pi)
    child = node.children[i]
    report = TokenReport(NAMES.index(child.name), Status.GUIDED, 0.0, math.log(child.chance), math.log(pi[i]), value)
    return child, report


def extender(every: int) -> Extend:
    async def extend(particle: Particle, seed: int | None) -> None:
        rng = random.Random(seed)
        for _ in range(every):
            node = NODES[NAMES[particle.tokens[-1]]] if particle.tokens else FIGURE_4
            child, report = guided_step(node, rng)
            particle.tokens.append(report.token)
            particle.reports.append(report)
            if not child.children:
                particle.finish_reason = "stop"
                return

    return extend


def law(size: int, runs: int, *, every: int = 1, below: float = 0.5) -> dict[str, float]:
    """How often each leaf is chosen."""
    counts = dict.fromkeys(LEAVES, 0)

    async def main() -> None:
        for run in range(runs):
            cloud = Cloud(size, ETA, seed=1000 * size + run)
            await cloud.run(extender(every), below)
            (i,) = cloud.draw(1)
            counts[NAMES[cloud.particles[i].tokens[-1]]] += 1

    asyncio.run(main())
    return {name: count / runs for name, count in counts.items()}


def distance(found: dict[str, float]) -> float:
    """Total variation to `pi*`."""
    wanted = optimal()
    return sum(abs(found[name] - wanted[name]) for name in LEAVES) / 2


@pytest.mark.parametrize("below", [0.5, 1.0])
@pytest.mark.parametrize("every", [1, 2])
def test_the_law_converges_to_the_optimal_one_where_plain_guidance_does_not(every: int, below: float) -> None:
    runs = 500
    # Plain guidance goes left: exp(0.3 / eta) against exp(0.1 / eta).
    left = 1 / (1 + math.exp(-0.2 / ETA))
    plain = law(1, runs, every=every, below=below)
    error = 4 * math.sqrt(0.25 / runs)
    assert plain["sure"] == pytest.approx(left, abs=error)
    assert optimal()["sure"] == pytest.approx(0.046, abs=0.001)
    distances = [distance(plain), *(distance(law(n, runs, every=every, below=below)) for n in (4, 16, 64))]
    assert distances[0] > 0.7
    assert distances[1] < distances[0] - 0.15
    assert distances[2] < distances[1] - 0.1
    assert distances[3] < 0.05, distances


@pytest.mark.parametrize("size", [1, 3, 16])
def test_the_estimate_is_unbiased(size: int) -> None:
    chances = {"sure": 0.5, "win": 0.5 * 0.05, "lose": 0.5 * 0.95}
    exact = sum(chance * math.exp((NODES[name].reward or 0.0) / ETA) for name, chance in chances.items())

    async def main() -> list[float]:
        found = []
        for seed in range(6000 // size):
            cloud = Cloud(size, ETA, seed)
            await cloud.run(extender(1), 0.9)
            assert cloud.weights.log_estimate is not None
            found.append(math.exp(cloud.weights.log_estimate))
        return found

    found = asyncio.run(main())
    mean = sum(found) / len(found)
    error = math.sqrt(sum((one - mean) ** 2 for one in found)) / len(found)
    assert mean == pytest.approx(exact, abs=4 * error)


def test_a_seed_settles_everything() -> None:
    def leaves(seed: int | None) -> list[list[int]]:
        async def main() -> list[list[int]]:
            cloud = Cloud(6, ETA, seed)
            await cloud.run(extender(1), 1.0)
            return [cloud.particles[i].tokens for i in cloud.draw(4)]

        return asyncio.run(main())

    assert leaves(5) == leaves(5)
    assert len({str(leaves(seed)) for seed in range(12)}) > 3


def test_a_fork_goes_on_by_itself() -> None:
    particle = Particle([1], [])
    fork = particle.fork()
    fork.tokens.append(2)
    assert particle.tokens == [1]


def test_the_last_prediction_is_the_estimate() -> None:
    async def main() -> Cloud:
        cloud = Cloud(8, ETA, 1)
        await cloud.run(extender(2), 0.5)
        return cloud

    for particle in asyncio.run(main()).particles:
        assert estimate(particle.reports, ETA) == pytest.approx(CRITIC[NAMES[particle.tokens[-1]]])
    assert estimate([], ETA) is None
