"""A sentence with given words in it: four constraints, and a quarter of the reward for each that is kept.

    Write one sentence of at most 12 words with the words "farmer", "ladder" and "market".

Three constraints are the words. The fourth is the form: one sentence of no fewer than six and no more than the given
number of words, which begins with a capital, ends with `.`, `!` or `?`, and does not just list the words. So an empty
answer earns nothing, and a list of the words does not earn all. Whether a sentence makes sense is not judged.
"""

import re
from functools import cache
from itertools import pairwise, product

from trainer.tasks.base import Problem, SamplingDefaults, Task, no_vote
from trainer.tasks.splits import SPLITS, drawn

PEOPLE = (
    "farmer", "doctor", "teacher", "baker", "singer", "soldier", "painter", "sailor", "child", "queen", "nurse",
    "fisherman", "judge", "dancer", "builder", "traveler",
)  # fmt: skip
THINGS = (
    "ladder", "lantern", "letter", "candle", "hammer", "blanket", "bottle", "basket", "mirror", "pencil", "spoon",
    "violin", "clock", "apple", "whistle", "umbrella", "map", "key", "coat", "drum", "kite", "rope", "coin", "lamp",
)  # fmt: skip
PLACES = (
    "market", "river", "garden", "bridge", "kitchen", "train", "island", "forest", "tower", "village", "school",
    "beach", "library", "hospital", "mountain", "church", "station", "harbor", "castle", "museum",
)  # fmt: skip
LEAST = 6
MOST = (10, 12, 14)
"""Words that a sentence has: so many at least, and one of these at most."""

EXAMPLE = (("dog", "ball", "fence"), 12, "The dog jumped over the fence to catch its ball.")

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_ONE_SENTENCE = re.compile(r"[^\W\d_][^.!?\n]*[.!?]")


def question(words: tuple[str, ...], most: int) -> str:
    """What a problem asks for."""
    *others, last = (f'"{word}"' for word in words)
    return f"Write one sentence of at most {most} words with the words {', '.join(others)} and {last}."


def reward(words: tuple[str, ...], most: int, text: str) -> float:
    """The share of constraints that a completion keeps: each word, and the form.

    Args:
        words: what the sentence is to have in it, in lower case.
        most: words that it may have.
        text: the completion.
    """
    found = [word.lower() for word in _WORD.findall(text)]
    kept = [word in found for word in words]
    kept.append(_has_form(text.strip(), found, words, most))
    return sum(kept) / len(kept)


def _has_form(text: str, found: list[str], words: tuple[str, ...], most: int) -> bool:
    is_listed = any(a in words and b in words for a, b in pairwise(found))
    is_sentence = _ONE_SENTENCE.fullmatch(text) is not None and text[0].isupper()
    return LEAST <= len(found) <= most and is_sentence and not is_listed


@cache
def _drawn() -> dict[str, list[tuple[str, str, str]]]:
    return drawn(list(product(PEOPLE, THINGS, PLACES)), "sentence")


def _problems(split: str) -> list[Problem]:
    words, most, sentence = EXAMPLE
    shown = [{"role": "user", "content": question(words, most)}, {"role": "assistant", "content": sentence}]
    return [
        Problem(
            id="+".join(words),
            messages=[*shown, {"role": "user", "content": question(words, most)}],
            data={"words": list(words), "most": most},
        )
        for i, words in enumerate(_drawn()[split])
        for most in (MOST[i % len(MOST)],)
    ]


def _reward(problem: Problem, text: str) -> float:
    return reward(tuple(problem.data["words"]), problem.data["most"], text)


TASK = Task(
    name="sentence",
    problems=_problems,
    splits=SPLITS,
    sampling=SamplingDefaults(max_tokens=40, stop=("\n",)),
    reward=_reward,
    vote=no_vote,
)
