"""Where further rollouts leave those that are there: at tokens that the reference is unsure of.

Guidance asks the critic for all of the reference's top candidates, most of which the reference's own samples hardly
ever take. A branch takes one of them on purpose and lets the reference go on: its reward is a label of every prefix
that contains the token.
"""

import math
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LISTED = 20
"""How many of the likeliest tokens the server is asked for: vLLM's own limit, unless it was started with another."""
TOP = 8
"""How many of them a branch may take."""


Listed = Mapping[int, float]
"""Log-probabilities of the likeliest tokens at a place, the likeliest first, `LISTED` of them at the most."""


@dataclass(frozen=True, slots=True)
class Place:
    """A token of a completion, and what else the reference might have drawn there.

    Attributes:
        entropy: of the reference's next token there, in nats, over the tokens that were listed.
        candidates: its `TOP` likeliest tokens, the likeliest first.
    """

    entropy: float
    candidates: tuple[int, ...]


def asked_with(chat: bool) -> dict[str, Any]:
    """Fields of a request whose response is to list the likeliest tokens at each place."""
    listing = {"logprobs": True, "top_logprobs": LISTED} if chat else {"logprobs": LISTED}
    return listing | {"return_tokens_as_token_ids": True}


def listed_in_choice(choice: Mapping[str, Any]) -> list[Listed]:
    """What a choice of a response to `asked_with` lists, at each token of the completion."""
    logprobs = choice["logprobs"]
    if "content" in logprobs:  # of a chat
        pairs = [[(one["token"], one["logprob"]) for one in place["top_logprobs"]] for place in logprobs["content"]]
    else:
        pairs = [[*place.items()] for place in logprobs["top_logprobs"]]
    return [_likeliest((int(token.removeprefix("token_id:")), value) for token, value in place) for place in pairs]


def listed_in_prompt(prompt_logprobs: Sequence[Mapping[str, Mapping[str, Any]] | None], start: int) -> list[Listed]:
    """What `prompt_logprobs` of a response list, at each token of a prompt from `start` on."""
    return [_likeliest((int(t), e["logprob"]) for t, e in (place or {}).items()) for place in prompt_logprobs[start:]]


def _likeliest(pairs: Iterable[tuple[int, float]]) -> Listed:
    """The token that was drawn is listed besides, whatever its rank."""
    return dict(sorted(pairs, key=lambda pair: -pair[1])[:LISTED])


def place_of(listed: Listed, temperature: float) -> Place:
    """The place, of a reference that draws at this temperature."""
    # Beyond those listed there is little, or so much that the place is unsure all the same.
    weights = [math.exp(value / temperature) for value in listed.values()]
    total = sum(weights)
    entropy = -sum(w / total * math.log(w / total) for w in weights if w > 0)
    return Place(entropy, tuple(listed)[:TOP])


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
    able = [token for token in places[at].candidates if token not in endings]
    return (at, dice.choice(able)) if able else None
