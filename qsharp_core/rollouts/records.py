"""What a rollout is, and which of its positions may be trained on.

`Z(x, y)` is the return of rollouts of the *reference* policy. So the reward labels a position of a completion only if
every token after that position was drawn from the reference. `first_valid_position` says from where on that holds; the
trainer never trains on earlier positions.
"""

import math
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from qsharp_core.errors import RolloutError
from qsharp_core.rollouts.text import DEEPEST, is_deeper
from qsharp_core.wire.guidance import ETA_RANGE

UNNAMED = "default"  # owns what is stored by a server without named keys, and what was stored before there were owners
LARGEST = 1e9  # of rewards, values and KL: sums of very many of them are still exact to many digits, and finite
LATEST = 1e11  # seconds since the epoch
Route = Literal["completion", "chat"]
TOKEN_LIMIT = 2**31  # token ids are stored as int32


@dataclass(frozen=True, slots=True)
class Reward:
    """One reward in a rollout's history.

    Attributes:
        source: who or what judged, in the giver's words.
        created: when, in seconds since the epoch.
        given_by: the holder of the key that it was given with; None where it was given before this was noted.
    """

    reward: float
    source: str | None
    created: float
    given_by: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The sampling parameters of a completion, as vLLM applied them.

    Attributes:
        top_k: 0 is all tokens.
        other: every other parameter that changes the distribution of tokens or ends the completion, where it differs
            from vLLM's default (penalties, biases, structured output, `stop`, `max_tokens`, …), as JSON's data.
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
        owner: the holder of the key that it was sampled with.
        request_id: the response's id; choices of one response share it and `created`.
        choice: the choice's index in its response.
        route: which of OpenAI's routes it came from.
        created: seconds since the epoch.
        prompt_token_ids, completion_token_ids: what the model read and wrote, stop token included.
        prompt_text, completion_text: the same as text; a prompt of token ids may have none.
        messages: the request's messages (chat).
        response: the rest of a chat's response: the `choice` as the client got it, the `request`'s fields
            that OpenAI shows with it, `created` and `system_fingerprint`. Imported rollouts may lack any of them.
        eta, method, critic, guidance: what guided the completion; None if nothing did. `critic` is `name@version`,
            `guidance` has the other options (`candidates`, `min_prob`, `tail`).
        first_valid_position: the first position of the completion that may be trained on, from 0; None: there is none.
        parent_id, cut: the rollout that this one continues, and how many of the completion's tokens are the parent's;
            None for a rollout of its own. The last of these tokens differs from the parent's where another token was
            forced there.
        kl: KL divergence from the reference in nats, summed over the tokens sampled for this rollout.
        value: `V` at the first step at which the critic was asked, in units of reward; None if it never was.
        reward: the present reward; None before one is given.
        rewards: all rewards that were given, oldest first.
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
    owner: str = UNNAMED
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
        """Checks what must hold for every rollout, wherever it comes from.

        Raises:
            RolloutError: names the field.
        """
        length = len(self.completion_token_ids)
        for name in ("prompt_token_ids", "completion_token_ids"):
            ids = getattr(self, name)
            if ids and not (min(ids) >= 0 and max(ids) < TOKEN_LIMIT):
                raise self._wrong(name, f"token ids from 0 to {TOKEN_LIMIT - 1}")
        for name in ("id", "owner"):
            if not (text := getattr(self, name)) or not text.isprintable():
                raise self._wrong(name, "printable text")
        if self.choice < 0:
            raise self._wrong("choice", "at least 0")
        if self.route not in get_args(Route):
            raise self._wrong("route", " or ".join(get_args(Route)))
        self._check_numbers()
        self.check_forms()
        for name in ("messages", "response", "guidance", "metadata"):
            if is_deeper(getattr(self, name), DEEPEST):
                raise self._wrong(name, f"nested at most {DEEPEST} deep")
        if is_deeper(self.sampling.other, DEEPEST):
            raise self._wrong("sampling", f"nested at most {DEEPEST} deep")
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

    def check_forms(self) -> None:
        """Checks the form of what is stored as JSON, which answers about a rollout rely on.

        Raises:
            RolloutError: names the field.
        """
        if not (isinstance(self.metadata, Mapping) and all(isinstance(v, str) for v in self.metadata.values())):
            raise self._wrong("metadata", "an object with strings as values")
        if self.messages is not None and not (
            isinstance(self.messages, list | tuple) and all(isinstance(message, Mapping) for message in self.messages)
        ):
            raise self._wrong("messages", "a list of objects")
        if not isinstance(self.guidance, Mapping | None):
            raise self._wrong("guidance", "an object")
        if not isinstance(self.sampling.other, Mapping):
            raise self._wrong("sampling", "an object")
        if self.response is None:
            return
        if not isinstance(self.response, Mapping):
            raise self._wrong("response", "an object")
        if not all(isinstance(self.response.get(part, {}), Mapping) for part in ("choice", "request")):
            raise self._wrong("response", "an object whose choice and request are objects")
        if not isinstance(self.response.get("created", 0), int):
            raise self._wrong("response", "an object with a whole number as created")

    def judged_by(self, givers: Collection[str] | None, source: str | None = None) -> "Rollout":
        """The rollout as if it had no rewards but those of these givers, and of this source; its reward is the last.

        Args:
            givers: None is anybody.
            source: None is any.
        """
        rewards = tuple(
            entry
            for entry in self.rewards
            if (givers is None or entry.given_by in givers) and source in (None, entry.source)
        )
        return replace(self, rewards=rewards, reward=rewards[-1].reward if rewards else None)

    def _check_numbers(self) -> None:
        if not 0 <= self.created <= LATEST:
            raise self._wrong("created", f"from 0 to {LATEST:g}")
        for name in ("kl", "value", "reward"):
            if (value := getattr(self, name)) is not None and not abs(value) <= LARGEST:
                raise self._wrong(name, f"from {-LARGEST:g} to {LARGEST:g}")
        if self.eta is not None and not ETA_RANGE[0] <= self.eta <= ETA_RANGE[1]:
            raise self._wrong("eta", f"from {ETA_RANGE[0]:g} to {ETA_RANGE[1]:g}")
        if not all(abs(entry.reward) <= LARGEST and 0 <= entry.created <= LATEST for entry in self.rewards):
            raise self._wrong("rewards", f"of {-LARGEST:g} to {LARGEST:g}, created from 0 to {LATEST:g}")
        law = self.sampling
        if not all(math.isfinite(value) for value in (law.temperature, law.top_p, law.min_p)):
            raise self._wrong("sampling", "finite")

    def _wrong(self, name: str, accepted: str) -> RolloutError:
        return RolloutError(f"rollout {self.id!r}: {name} must be {accepted}; got {getattr(self, name)!r:.100}", name)


def new_id() -> str:
    """An id that no other rollout has."""
    return f"rol_{secrets.token_hex(16)}"


def first_valid_position(*, guided: bool, length: int, cut: int | None, finish_reason: str | None) -> int | None:
    """The first position that the reward labels: every token after it was drawn from the reference.

    Args:
        guided: whether a critic guided the completion throughout.
        length: tokens of the whole completion, including those of the parent.
        cut: how many of them are the parent's (the last one may have been forced instead); None without a parent.
        finish_reason: why the completion ended. One that was aborted has no label: the reference did not end it.

    Returns:
        The position, counted from 0; None if the reward labels no position.
    """
    if guided or length == 0 or finish_reason in ("abort", "error"):
        return None
    # The last token before the cut is the guided policy's, or was forced; all that follow were drawn from ref.
    return 0 if cut is None else cut - 1
