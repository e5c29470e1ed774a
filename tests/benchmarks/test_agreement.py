"""The tests of homogeneity of `benchmarks.unguided_agreement`: their size, their power, and a run on a real store."""

import asyncio
from argparse import Namespace
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.unguided_agreement import RAW, Rewards, chi_square_p, measure, permutation_p, table
from tests.support import fake_server


def drawn(seed: int, shift: float, problems: int = 60, samples: int = 8) -> dict[str, Rewards]:
    """Four ways; the last one has another accuracy. Problems differ much in difficulty."""
    dice = np.random.default_rng(seed)
    chance = dice.beta(0.5, 0.5, problems)[:, None]

    def way(more: float) -> Rewards:
        return (dice.random((problems, samples)) < np.clip(chance + more, 0, 1)).astype(float)

    return {"a": way(0), "b": way(0), "c": way(0), "d": way(shift)}


def test_p_values_of_ways_that_do_not_differ_are_uniform() -> None:
    found = np.array([permutation_p(drawn(seed, 0.0), permutations=200) for seed in range(60)])
    assert 0.35 < found.mean() < 0.65
    assert (found < 0.1).mean() < 0.25
    # As if samples were independent it is too careful: problems' difficulty is no chance between ways.
    assert np.mean([chi_square_p(drawn(seed, 0.0)) for seed in range(60)]) > found.mean()


def test_a_way_that_differs_is_found() -> None:
    found = [permutation_p(drawn(seed, -0.1), permutations=200) for seed in range(10)]
    assert max(found) < 0.05
    always = {"a": np.ones((3, 2)), "b": np.ones((3, 2))}
    assert (permutation_p(always, 20), chi_square_p(always)) == (1.0, 1.0)


def test_all_ways_ask_the_same_of_a_server(tmp_path: Path) -> None:
    """This one answers by the seed, and needs it; requests without one are the engine's matter."""
    with fake_server.running(f"sqlite:///{tmp_path / 'rollouts.db'}") as fake:
        args = Namespace(
            task="sums", prompts=None, verifier="task", split="held_out", problems=12, samples=48, max_tokens=None,
            seed=0, concurrency=8, url=fake.url, api_key=None, serve=[],
        )  # fmt: skip
        ways = asyncio.run(measure(args, tmp_path, Console(quiet=True)))
        stored = len(fake.stored())
    assert len(ways) == 2 + len(RAW)
    assert {rewards.shape for rewards in ways.values()} == {(12, 4)}
    assert stored == 2 * 48  # two ways store
    bodies = [body for body in fake.seen if body.get("n") == 4]
    assert len(bodies) == 4 * 12  # evaluate, loop, with n, with all
    assert all(body.get("eta") is None for body in fake.seen)
    assert permutation_p(ways, 500) > 0.001
    assert table(ways).row_count == len(ways)
