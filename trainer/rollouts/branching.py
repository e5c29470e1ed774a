"""Where a branch leaves another rollout: at a token that the reference is unsure of. Pure functions.

Guidance asks the critic about all of the reference's top candidates, most of which the reference's own samples hardly
ever take. A branch takes one of them on purpose and lets the reference go on. The branch's reward labels every prefix
that contains that token.
"""

import math
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LISTED = 20
"""How many of the likeliest tokens the server is asked for: vLLM's default limit."""
TOP = 8
"""How many of the likeliest tokens a branch may choose from."""
Listed = Mapping[int, float]
"""Log-probabilities in nats of the likeliest tokens at one place, the likeliest first; `LISTED` tokens at most."""


@dataclass(frozen=True, slots=True)
class Place:
    """A token of a completion, and what else the reference might have drawn there.

    Attributes:
        entropy: entropy of the reference's next token, in nats, over the tokens that were listed.
        candidates: the `TOP` likeliest tokens, the likeliest first.
    """

    entropy: float
    candidates: tuple[int, ...]


def with_alternatives(chat: bool) -> dict[str, Any]:
    """Fields of a request whose response is to list the likeliest tokens at each place of the completion."""
    listing = {"logprobs": True, "top_logprobs": LISTED} if chat else {"logprobs": LISTED}
    return listing | {"return_tokens_as_token_ids": True}


def listed_in_choice(choice: Mapping[str, Any]) -> list[Listed]:
    """What a response to `with_alternatives` lists in one of its choices, at each token of the completion."""
    logprobs = choice["logprobs"]
    if "content" in logprobs:  # of a chat
        pairs = [[(one["token"], one["logprob"]) for one in place["top_logprobs"]] for place in logprobs["content"]]
    else:
        pairs = [[*place.items()] for place in logprobs["top_logprobs"]]
    return [_likeliest((int(token.removeprefix("token_id:")), value) for token, value in place) for place in pairs]


def listed_in_prompt(prompt_logprobs: Sequence[Mapping[str, Mapping[str, Any]] | None], start: int) -> list[Listed]:
    """What a response's `prompt_logprobs` list, at each token of the prompt from position `start` on."""
    return [_likeliest((int(t), e["logprob"]) for t, e in (place or {}).items()) for place in prompt_logprobs[start:]]


def _likeliest(pairs: Iterable[tuple[int, float]]) -> Listed:
    """The `LISTED` likeliest of some tokens: vLLM lists the token that was drawn besides, whatever its rank."""
    return dict(sorted(pairs, key=lambda pair: -pair[1])[:LISTED])


def place_of(listed: Listed, temperature: float) -> Place:
    """The place that a listing describes, for a reference that draws at this temperature."""
    # Beyond those listed there is little, or so much that the place is unsure all the same.
    weights = [math.exp(value / temperature) for value in listed.values()]
    total = sum(weights)
    entropy = -sum(w / total * math.log(w / total) for w in weights if w > 0)
    return Place(entropy, tuple(listed)[:TOP])


def branch(places: Sequence[Place], endings: Collection[int], dice: random.Random) -> tuple[int, int] | None:
    """Draws where a branch leaves: a place in proportion to its entropy, and one of its candidates uniformly.

    Args:
        places: one for each token of the completion.
        endings: tokens that end a completion; they are not drawn, because nothing follows them.

    Returns:
        The place's index and the token; None if the reference is sure of every token, or all candidates are endings.
    """
    if not any(place.entropy > 0 for place in places):
        return None
    (at,) = dice.choices(range(len(places)), [place.entropy for place in places])
    able = [token for token in places[at].candidates if token not in endings]
    return (at, dice.choice(able)) if able else None
