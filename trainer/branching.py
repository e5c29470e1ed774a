"""Where further rollouts leave those that are there: at tokens that the reference is unsure of.

Guidance asks the critic for all of the reference's top candidates, most of which the reference's own samples hardly
ever take. A branch takes one of them on purpose and lets the reference go on: its reward is a label of every prefix
that contains the token.
"""

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LISTED = 20
"""How many of the likeliest tokens the server is asked for: vLLM's own limit, unless it was started with another."""
TOP = 8
"""How many of them a branch may take."""


@dataclass(frozen=True, slots=True)
class Place:
    """A token of a completion, and what else the reference might have drawn there.

    Attributes:
        entropy: of the reference's next token there, in nats, over the tokens that were listed.
        candidates: its `TOP` likeliest tokens, the likeliest first.
        endings: those of them whose text holds a string that ends completions.
    """

    entropy: float
    candidates: tuple[int, ...]
    endings: frozenset[int]


def places_of(
    listed: Sequence[Mapping[str, Mapping[str, Any]] | None], start: int, temperature: float, stop: Collection[str]
) -> list[Place]:
    """From the `prompt_logprobs` of a request whose prompt is a prompt and its completion.

    Args:
        start: tokens of the prompt.
        temperature: at which the reference draws.
        stop: strings that end completions.
    """
    places = []
    for entries in listed[start:]:
        assert entries is not None
        ranked = sorted((e["rank"], int(token), e) for token, e in entries.items() if e["rank"] <= LISTED)
        # Beyond those listed there is little, or so much that the place is unsure all the same.
        weights = [math.exp(e["logprob"] / temperature) for _, _, e in ranked]
        total = sum(weights)
        entropy = -sum(w / total * math.log(w / total) for w in weights if w > 0)
        top = ranked[:TOP]
        ending = (token for _, token, e in top if any(one in (e.get("decoded_token") or "") for one in stop))
        places.append(Place(entropy, tuple(token for _, token, _ in top), frozenset(ending)))
    return places


def branch(places: Sequence[Place], endings: Collection[int], dice: random.Random) -> tuple[int, int] | None:
    """A place, drawn in proportion to the entropy, and one of its candidates, drawn uniformly.

    Args:
        endings: tokens that end a completion: after them there is nothing to draw.

    Returns:
        The index of the place and the token; None where the reference is sure of everything, or would end.
    """
    if not any(place.entropy > 0 for place in places):
        return None
    (at,) = dice.choices(range(len(places)), [place.entropy for place in places])
    able = [token for token in places[at].candidates if token not in places[at].endings and token not in endings]
    return (at, dice.choice(able)) if able else None
