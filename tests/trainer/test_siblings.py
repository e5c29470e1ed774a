"""Labels weighed by node, against the definition written out."""

import numpy as np
import pytest

from trainer.training.rollouts import LabelledRollout, SamplingPolicy, kept
from trainer.training.siblings import ONLY_WAY, weighed

PROMPT = np.array([7, 8], dtype=np.int32)


def rollout(name: str, completion: list[int], first: int = 0, prompt: np.ndarray = PROMPT) -> LabelledRollout:
    return LabelledRollout(name, prompt, np.array(completion, dtype=np.int32), first, 1.0, SamplingPolicy(), "g")


def test_nodes_count_once_and_less_where_they_are_the_only_way() -> None:
    data = [rollout("a", [1, 2, 3]), rollout("b", [1, 2, 4]), rollout("c", [1, 2, 4]), rollout("d", [1, 5])]
    found = [r.weights for r in weighed(kept(data))]
    expected = [
        [ONLY_WAY / 4, 1 / 3, 1],  # of 1: four rollouts, no sibling; of 1 2: three, beside 1 5; of 1 2 3: beside 1 2 4
        [ONLY_WAY / 4, 1 / 3, 1 / 2],
        [ONLY_WAY / 4, 1 / 3, 1 / 2],
        [ONLY_WAY / 4, 1],
    ]
    scale = 4 / sum(map(sum, expected))
    for got, wanted in zip(found, expected, strict=True):
        assert got is not None
        np.testing.assert_allclose(got, np.array(wanted) * scale)


def test_positions_without_a_label_are_nobody_s_sibling() -> None:
    guided = rollout("b", [9, 2, 3], first=1)
    found = weighed(kept([rollout("a", [1, 2, 3]), guided]))
    assert guided.valid == 2
    first, second = found[0].weights, found[1].weights
    assert first is not None
    assert second is not None
    np.testing.assert_allclose(first, 2 / 5)  # 9 was the guided policy's, so 1 stands alone, as all others do
    np.testing.assert_allclose(second, 2 / 5)
    assert float(first.sum() + second.sum()) == pytest.approx(2)


def test_other_prompts_are_other_trees() -> None:
    other = np.array([7, 9], dtype=np.int32)
    found = weighed(kept([rollout("a", [1, 2]), rollout("b", [3, 2], prompt=other)]))
    for r in found:
        assert r.weights is not None
        np.testing.assert_allclose(r.weights, 0.5)
