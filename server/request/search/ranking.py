"""Which of several completions are the best: pure functions on texts and estimates."""

from collections.abc import Sequence

from qsharp_core.answers import VOTES, VoteName
from qsharp_core.wire.search import Best


def with_mean(estimates: Sequence[float | None]) -> list[float]:
    """The estimates, with the mean of the others where there is none; zeros if there are none at all."""
    known = [estimate for estimate in estimates if estimate is not None]
    mean = sum(known) / len(known) if known else 0.0
    return [mean if estimate is None else estimate for estimate in estimates]


def ranked(
    by: Best,
    texts: Sequence[str],
    estimates: Sequence[float | None],
    *,
    vote: VoteName = "number",
    reward_range: tuple[float, float] = (0.0, 1.0),
    weights: Sequence[float] | None = None,
) -> list[int]:
    """Indices of completions, the best first; of equal ones the earlier.

    `majority` and `weighted` put completions of the answer with the most weight first, then those of the second, and so
    on; those that give no answer come last. Within an answer the greater estimate comes first.

    Args:
        by: what the best are. With `weighted` a vote weighs what the estimate is as a share of the reward's range.
        texts: the completions.
        estimates: the reward that the critic expects of each; None if it was never asked.
        vote: which part of a text is its answer.
        reward_range: the least and the greatest reward that the critic knows.
        weights: of the votes, besides; None: all weigh the same.
    """
    values = with_mean(estimates)
    if by == "value":
        return sorted(range(len(texts)), key=lambda i: -values[i])
    answers = [VOTES[vote](text) for text in texts]
    weight_of: dict[str | None, float] = {}
    for answer, value, weight in zip(answers, values, weights or [1.0] * len(texts), strict=True):
        weight_of[answer] = weight_of.get(answer, 0.0) + weight * (
            _share(value, reward_range) if by == "weighted" else 1
        )
    weight_of[None] = -1.0
    first = {answer: answers.index(answer) for answer in answers}
    return sorted(range(len(texts)), key=lambda i: (-weight_of[answers[i]], first[answers[i]], -values[i]))


def _share(value: float, reward_range: tuple[float, float]) -> float:
    low, high = reward_range
    return min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 1.0
