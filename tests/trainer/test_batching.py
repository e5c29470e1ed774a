import numpy as np
import pytest

from trainer.training.prefix_tree import shared_prefix
from trainer.training.rollouts import LabelledRollout, SamplingPolicy, kept
from trainer.training.rows import MAX_PADDING, padded_passes
from trainer.training.separate.batching import plan_epoch, share, tree_passes

VOCAB = 50


def rollouts(n: int, longest: int = 400, prompts: int = 12) -> list[LabelledRollout]:
    """Lengths spread over two orders of magnitude."""
    dice = np.random.default_rng(0)
    heads = [dice.integers(0, VOCAB, dice.integers(3, 30)).astype(np.int32) for _ in range(prompts)]
    made = []
    for i in range(n):
        completion = dice.integers(0, 3, int(np.exp(dice.uniform(0, np.log(longest))))).astype(np.int32)
        p = i % prompts
        made.append(LabelledRollout(str(i), heads[p], completion, 0, 1.0, SamplingPolicy(), str(p)))
    return made


@pytest.mark.parametrize("together", [False, True])
def test_an_epoch_has_every_rollout_once_in_steps_of_the_budget(together: bool) -> None:
    data = rollouts(300)
    steps = plan_epoch(kept(data), 2000, together, seed=0, epoch=0)
    assert sorted(i for s in steps for i in s) == list(range(300))
    sizes = [sum(data[i].length for i in s) for s in steps]
    assert max(sizes) <= 2000
    assert np.mean(sizes) > 1300
    assert steps == plan_epoch(kept(data), 2000, together, seed=0, epoch=0)
    assert steps != plan_epoch(kept(data), 2000, together, seed=0, epoch=1)
    assert steps != plan_epoch(kept(data), 2000, together, seed=1, epoch=0)
    # A rollout longer than the budget is a step of its own.
    assert max(len(s) for s in plan_epoch(kept(data), 1, together, 0, 0)) == 1


def test_prompts_stay_together_where_they_fit() -> None:
    data = rollouts(60, longest=20)
    steps = plan_epoch(kept(data), 400, True, seed=0, epoch=0)
    for prompt in {r.group for r in data}:
        assert sum(any(data[i].group == prompt for i in s) for s in steps) == 1


@pytest.mark.parametrize("budget", [300, 2000, 100_000])
def test_padding_is_under_a_tenth_whatever_the_lengths(budget: int) -> None:
    data = rollouts(400)
    lengths = {i: r.length for i, r in enumerate(data)}
    padded = tokens = 0
    for step in plan_epoch(kept(data), 4000, False, seed=0, epoch=0):
        passes = padded_passes(step, lengths, budget)
        assert sorted(i for p in passes for i in p) == sorted(step)
        for p in passes:
            area = max(lengths[i] for i in p) * len(p)
            assert area <= budget or len(p) == 1
            assert 1 - sum(lengths[i] for i in p) / area <= MAX_PADDING < 0.1
            padded, tokens = padded + area, tokens + sum(lengths[i] for i in p)
    assert 1 - tokens / padded < 0.1


def test_trees_are_cut_by_their_number_of_distinct_prefixes() -> None:
    data = rollouts(200, longest=40)
    passes = tree_passes(range(200), data, 300)
    assert sorted(i for p in passes for i in p) == list(range(200))
    for p in passes:
        distinct = {tuple(data[i].token_ids[:k]) for i in p for k in range(1, data[i].length + 1)}
        assert len(distinct) <= 300 or len(p) == 1
    assert len(passes) < sum(r.length for r in data) / 300  # they did share


def test_shared_prefixes() -> None:
    a = np.array([1, 2, 3], dtype=np.int32)
    assert shared_prefix(a, a) == 3
    assert shared_prefix(a, a[:2]) == 2
    assert shared_prefix(a, np.array([1, 3, 3], dtype=np.int32)) == 1
    assert shared_prefix(a, a[:0]) == 0


@pytest.mark.parametrize(
    ("passes", "processes"), [([[1, 2, 3]], 2), ([[1], [2, 3], [4]], 2), ([[7]], 3), ([[1, 2]], 1)]
)
def test_every_rollout_goes_to_one_process(passes: list[list[int]], processes: int) -> None:
    shares = share(passes, processes)
    assert len(shares) == processes
    dealt = [i for s in shares for p in s for i in p]
    assert sorted(dealt) == sorted(i for p in passes for i in p)
    assert sum(not s for s in shares) == max(processes - len(dealt), 0)
