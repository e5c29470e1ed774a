"""The tone of a review that the model goes on with: the more it praises, the more it earns.

The judge of tone is VADER, a lexicon and rules for English (Hutto and Gilbert 2014), from the package `vaderSentiment`
(MIT; `pip install vaderSentiment`). Its `compound` score of the continuation, from -1 to 1, is the reward: 0 where it
is not positive, else the nearest quarter. What is short, or says the same words again and again, earns nothing.
"""

import re
from functools import cache
from itertools import product
from typing import Any

from trainer.tasks.base import Problem, SamplingDefaults, Task, TaskError, no_vote
from trainer.tasks.splits import SPLITS, drawn

PLACES = (
    "hotel", "restaurant", "bakery", "museum", "cinema", "gym", "bookshop", "coffee shop", "campsite", "barber shop",
    "garden centre", "pizzeria", "theatre", "zoo", "swimming pool", "guest house", "tea room", "flower shop",
)  # fmt: skip
WHERE = ("by the lake", "near the station", "on Mill Street", "in the old town")
OPENINGS = (
    "Last week we tried {place} for the first time. To be honest, it was",
    "My sister had told me of {place}. What I found there was",
    "A review of {place}: I went on a rainy Tuesday, and it was",
    "We spent an hour at {place} on Sunday. All in all, it was",
    "You asked what I think of {place}. Well, to me it was",
    "Yesterday we came to {place}. The people who work there were",
    "I have been to {place} twice this year. The second time it was",
    "Nobody had told us what to expect of {place}. It turned out to be",
    "After a long week I went to {place} with my brother. We both found it",
    "Notes on {place}: the place itself was",
)
LEAST = 8
"""Words that a continuation must have."""
DISTINCT = 2 / 3
"""The least share of a continuation's words that are different ones."""
STEPS = 4

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")


def reward(text: str) -> float:
    """How much a continuation praises, in quarters from 0 to 1.

    Raises:
        TaskError: the package that judges it is missing.
    """
    words = [word.lower() for word in _WORD.findall(text)]
    if len(words) < LEAST or len(set(words)) < DISTINCT * len(words):
        return 0.0
    praise = max(0.0, _analyser().polarity_scores(text)["compound"])
    return round(STEPS * praise) / STEPS


@cache
def _analyser() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # optional
    except ImportError as error:
        raise TaskError(
            "the task tone is judged with the package vaderSentiment: pip install vaderSentiment"
        ) from error
    return SentimentIntensityAnalyzer()


@cache
def _drawn() -> dict[str, list[str]]:
    places = (f"the {place} {where}" for place, where in product(PLACES, WHERE))
    return drawn([opening.format(place=place) for place, opening in product(places, OPENINGS)], "tone")


def _problems(split: str) -> list[Problem]:
    _analyser()  # before anything is sampled that could not be judged
    return [Problem(id=f"{split}-{i}", prompt=prompt) for i, prompt in enumerate(_drawn()[split])]


def _reward(problem: Problem, text: str) -> float:
    return reward(text)


TASK = Task(
    name="tone",
    problems=_problems,
    splits=SPLITS,
    sampling=SamplingDefaults(max_tokens=32),
    reward=_reward,
    vote=no_vote,
)
