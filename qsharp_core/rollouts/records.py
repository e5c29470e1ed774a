"""What a rollout is, and which of its positions may be trained on.

`Z(x,y)` is about rollouts of the *reference* policy, so a position of a completion carries a valid label only if every
token after it was drawn from `ref`. `first_valid_position` states that per rollout; the trainer never trains before it.
"""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from qsharp_core.errors import RolloutError

Route = Literal["completion", "chat"]
TOKEN_LIMIT = 2**31  # token ids are stored as int32


@dataclass(frozen=True, slots=True)
class Reward:
    """One entry of a rollout's history of rewards; `created` in seconds since the epoch."""

    reward: float
    source: str | None
    created: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The law a completion was sampled under, as vLLM applied it.

    Attributes:
        top_k: 0 is all tokens.
        other: everything else that shapes the law or ends the completion and differs from vLLM's defaults (penalties,
            biases, structured output, `stop`, `max_tokens`, …), as JSON's data.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    other: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One stored choice of one response.

    Attributes:
        id: unique, `rol_` and hex digits where this project made it.
        request_id: the response's id; choices of one response share it and `created`.
        choice: the choice's index in its response.
        route: which of OpenAI's routes it came from.
        created: seconds since the epoch.
        prompt_token_ids, completion_token_ids: what the model read and wrote, stop token included.
        prompt_text, completion_text: the same as text; a prompt of token ids may have none.
        messages: the request's messages (chat).
        response: the choice as the client got it, and what of the response is not in other fields (chat).
        eta, method, critic, guidance: of a guided completion, else None; `critic` is `name@version`, `guidance` the
            other options (`candidates`, `min_prob`, `tail`).
        first_valid_position: the first position of the completion that may be trained on, from 0; None: there is none.
        parent_id, cut: of a roll-out: its first `cut` tokens are those of the parent, the others its own. The last of
            them is another one than the parent's where the roll-out was made to leave it there.
        kl: in nats, over the tokens sampled for this rollout.
        value: `V` at the first step at which the critic was asked, in units of reward; None if it never was.
        reward: the present one; rewards: all that were given, oldest first.
    """

    id: str
    request_id: str
    choice: int
    route: Route
    created: float
    model: str
    prompt_token_ids: Sequence[int]
    completion_token_ids: Sequence[int]
    prompt_text: str | None
    completion_text: str
    messages: Sequence[Any] | None = None
    response: Mapping[str, Any] | None = None
    sampling: Sampling = field(default_factory=Sampling)
    eta: float | None = None
    method: str | None = None
    critic: str | None = None
    guidance: Mapping[str, Any] | None = None
    first_valid_position: int | None = None
    parent_id: str | None = None
    cut: int | None = None
    kl: float = 0.0
    value: float | None = None
    finish_reason: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    reward: float | None = None
    rewards: Sequence[Reward] = ()

    def check(self) -> None:
        """What holds for every rollout, wherever it comes from.

        Raises:
            RolloutError: names the field.
        """
        length = len(self.completion_token_ids)
        for name in ("prompt_token_ids", "completion_token_ids"):
            ids = getattr(self, name)
            if ids and not (min(ids) >= 0 and max(ids) < TOKEN_LIMIT):
                raise self._wrong(name, f"token ids from 0 to {TOKEN_LIMIT - 1}")
        if not self.id or not self.id.isprintable():
            raise self._wrong("id", "printable text")
        if self.route not in get_args(Route):
            raise self._wrong("route", " or ".join(get_args(Route)))
        numbers = ("created", "kl", "value", "eta", "reward")
        for name in numbers:
            if (value := getattr(self, name)) is not None and not math.isfinite(value):
                raise self._wrong(name, "finite")
        if not all(math.isfinite(given.reward) and math.isfinite(given.created) for given in self.rewards):
            raise self._wrong("rewards", "finite")
        if (self.parent_id is None) != (self.cut is None):
            raise self._wrong("cut", "given together with parent_id")
        if self.cut is not None and not 1 <= self.cut <= length:
            raise self._wrong("cut", f"from 1 to {length}")
        first = self.first_valid_position
        if first is None:
            return
        if self.eta is not None:
            raise self._wrong("first_valid_position", "null where eta is given: the completion was guided throughout")
        if not 0 <= first < length:
            raise self._wrong("first_valid_position", f"from 0 to {length - 1}, or null")
        if self.cut is not None and first < self.cut - 1:
            raise self._wrong("first_valid_position", f"at least cut - 1 = {self.cut - 1}: tokens before were guided")

    def _wrong(self, name: str, accepted: str) -> RolloutError:
        return RolloutError(f"rollout {self.id!r}: {name} must be {accepted}; got {getattr(self, name)!r:.100}", name)


def new_id() -> str:
    """An id that no other rollout has."""
    return f"rol_{secrets.token_hex(16)}"


def first_valid_position(*, guided: bool, length: int, cut: int | None, finish_reason: str | None) -> int | None:
    """The first position whose label is valid: every token after it was drawn from `ref`, to the completion's own end.

    Args:
        guided: by a critic, throughout.
        length: tokens of the whole completion, with those of the parent.
        cut: how many of them are the parent's, or the parent's but for the last one.
        finish_reason: an aborted completion is no rollout of `ref`: something else ended it.
    """
    if guided or length == 0 or finish_reason in ("abort", "error"):
        return None
    # The last token before the cut is the guided policy's, or was forced; all that follow were drawn from ref.
    return 0 if cut is None else cut - 1
