"""The rollouts that branches leave, with what else the reference might have drawn at each of their tokens."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from trainer.rollouts.branching import LISTED, Listed, Place, listed_in_choice, listed_in_prompt, place_of
from trainer.rollouts.client import ServerClient, StoredCompletion
from trainer.rollouts.parameters import SamplingParameters

PARENTS_KEPT = 20_000
"""The most rollouts whose tokens' alternatives are in memory."""


@dataclass(frozen=True)
class BranchParent:
    """A rollout that branches leave: token ids of prompt and completion, and a place for each token it may leave at."""

    prompt: list[int]
    completion: list[int]
    places: list[Place]


class BranchParents:
    """Reads the rollouts that branches leave.

    Args:
        client: of the server that sampled and stored them.
        model: the name that the server serves the reference under.
        sampling: how the rollouts were sampled.
    """

    def __init__(self, client: ServerClient, model: str, sampling: SamplingParameters) -> None:
        self._client = client
        self._model = model
        self._sampling = sampling
        # By rollout that was sampled now, until the first branch leaves it.
        self._places: dict[str, list[Place]] = {}
        self._parents: dict[str, asyncio.Task[BranchParent]] = {}
        # Whether a completion ends with a token: one did, or the token's text holds a stop string.
        self._ends: dict[int, bool] = {}

    def ending_tokens(self) -> list[int]:
        """Tokens that end a completion, as far as they are known: a branch must not take one of them."""
        return [token for token, ends in self._ends.items() if ends]

    def note(self, completion: StoredCompletion) -> None:
        """Keeps what else might have been drawn for a completion, if its request asked for that."""
        choice = completion.choice
        if choice is not None and choice.get("logprobs") and len(self._places) < PARENTS_KEPT:
            self._places[completion.rollout] = self._places_of(listed_in_choice(choice))

    async def read(self, rollout_id: str) -> BranchParent:
        """A rollout; asked for once, however many branches leave it at the same time.

        Raises:
            RequestError
        """
        reading = self._parents.get(rollout_id)
        if reading is None:
            if len(self._parents) >= PARENTS_KEPT:
                self._parents = {name: task for name, task in self._parents.items() if not task.done()}
            reading = self._parents[rollout_id] = asyncio.ensure_future(self._fetch(rollout_id))
        try:
            return await reading
        except Exception:
            self._parents.pop(rollout_id, None)  # the next one tries again
            raise

    async def _fetch(self, rollout_id: str) -> BranchParent:
        rollout = await self._client.get(f"/v1/rollouts/{rollout_id}")
        prompt, completion = rollout["prompt_token_ids"], rollout["completion_token_ids"]
        if rollout["finish_reason"] == "stop" and completion:
            self._ends[completion[-1]] = True
        places = self._places.pop(rollout_id, None)
        if places is None:
            places = await self._look_up(prompt, completion)
        # After the last token that fits there is nothing to draw.
        places = places[: self._sampling.max_tokens - 1]
        if self._sampling.stop:
            await asyncio.gather(*map(self._read_token, {token for place in places for token in place.candidates}))
        return BranchParent(prompt, completion, places)

    async def _look_up(self, prompt: list[int], completion: list[int]) -> list[Place]:
        """Asks the server for the alternatives in a completion that an earlier run sampled."""
        body = {
            **self._sampling.fields(),
            "model": self._model,
            "prompt": [*prompt, *completion],
            "max_tokens": 1,
            "prompt_logprobs": LISTED,
            "seed": 0,
            "eta": None,
        }
        (choice,) = (await self._client.post("/v1/completions", body))["choices"]
        return self._places_of(listed_in_prompt(choice["prompt_logprobs"], len(prompt)))

    def _places_of(self, listed: Iterable[Listed]) -> list[Place]:
        return [place_of(one, self._sampling.temperature or 1.0) for one in listed]

    async def _read_token(self, token: int) -> None:
        """Finds out whether a token's text holds a stop string."""
        if token not in self._ends:
            answer = await self._client.post("/detokenize", {"model": self._model, "tokens": [token]})
            self._ends[token] = any(string in answer["prompt"] for string in self._sampling.stop)
