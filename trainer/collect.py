"""Rollouts for the trainer, sampled and stored by a running server.

Round 0 is unguided. Later rounds roll in and roll out (Algorithm 1 of the paper): a guided completion is stored, cut
after `c` of its tokens, and an unguided continuation of those tokens is stored as its roll-out. The token at the cut
is the guided policy's and all that follow are the reference's, so the roll-out's labels are valid from there on.

Branches (`branching`) are further rollouts of the reference, each of which begins as one of round 0 does, up to a
token that the reference is unsure of, takes another one of its likeliest tokens there, and goes on from it. That token
was forced and all that follow are the reference's, so here, too, labels are valid from it on.

`c` is uniform over 1 … length − 1. Not the length itself: after the last token there is nothing to go on with, the
completion has ended or has no tokens left to sample.

*Nothing is done twice.* A piece of work has a key, a hash of what it is; its seed and its cut derive from the key, and
its rollout carries the key in its metadata. The journal (`--state`) holds the keys of what was begun and of what is
done. What was begun and not done may be in the store, so the store is asked for that key before anything is sampled.
Without a journal, or after the machine was started anew, whatever the store has of the same work counts as done.
"""

import asyncio
import hashlib
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qsharp_core.errors import QSharpError
from qsharp_core.wire.metadata import CUT, FORCED, ITEM, PARENT, PROBLEM, ROUND, RUN, SAMPLE, SPLIT, TASK
from trainer.branching import LISTED, Place, asked_with, branch, listed_in_choice, listed_in_prompt, place_of
from trainer.client import PassingError, RefusedError, Sampled, ServerClient, each
from trainer.journal import Journal, boot
from trainer.tasks.base import Problem, Task

PARENTS_KEPT = 20_000  # whose tokens' alternatives are in memory
# So many failures with no success between them are not the items' own.
FAILURES_IN_A_ROW = 16
# Statuses that say that nothing else will succeed either.
HOPELESS = (401, 403, 404, 405, 409)


class CollectError(QSharpError):
    """The collection cannot go on, or has ended with items that failed."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The policy: of the reference, and of the guided roll-in before `eta` tilts it."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()

    def fields(self) -> dict[str, Any]:
        """Of a request; all of them, so that no default of the server's changes the policy."""
        return {**asdict(self), "stop": list(self.stop) or None}


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How completions are guided; `critic` is an exact version."""

    eta: float
    critic: str
    method: str = "qsharp"
    candidates: int | None = None
    min_prob: float | None = None
    tail: str | None = None

    def fields(self) -> dict[str, Any]:
        """Of a request."""
        given = {name: value for name, value in asdict(self).items() if name != "eta" and value is not None}
        return {"eta": self.eta, "guidance": given}


@dataclass(frozen=True, kw_only=True)
class Collection:
    """What is to be collected.

    Attributes:
        samples: rollouts of each problem.
        branches: further ones of each problem, which leave these.
        guidance: None is unguided.
        roll_in: guided completions are cut and continued by the reference.
        round: a label, kept with every rollout.
        limit: only the first so many problems.
        seed: another one makes other rollouts of the same problems.
    """

    task: str
    split: str
    model: str
    samples: int
    sampling: Sampling = Sampling()
    guidance: Guidance | None = None
    roll_in: bool = False
    round: int = 0
    limit: int | None = None
    seed: int = 0
    branches: int = 0

    @property
    def identity(self) -> dict[str, Any]:
        """What makes it this collection; with more samples, branches or problems it is the same, and goes on."""
        fields = asdict(self)
        del fields["samples"], fields["branches"], fields["limit"]
        return {"format": 1, "command": "collect", **fields}

    @property
    def run(self) -> str:
        """Its name in the rollouts' metadata."""
        return digest(self.identity)[:16]


@dataclass
class Collected:
    """What a run of the command did; `made` are rollouts sampled now, `found` were in the store.

    `too_short` completions could not be cut; `no_way_out` is of branches: the reference was sure of all that it said.
    """

    run: str
    wanted: int
    made: int = 0
    found: int = 0
    before: int = 0
    too_short: int = 0
    no_way_out: int = 0
    tokens: int = 0
    retries: int = 0
    seconds: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """A rollout to be made; `parents` are the keys of those that a branch may leave."""

    key: str
    problem: Problem
    sample: int
    parents: tuple[str, ...] = ()


def digest(value: Any) -> str:
    """Of JSON's data, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def seed_of(key: str) -> int:
    """A seed that vLLM takes, the same for the same key."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:12], 16)


def cut_of(key: str, length: int) -> int:
    """After how many of `length` tokens a guided completion is cut: uniform over 1 … length − 1."""
    return random.Random(seed_of(f"{key}/cut")).randint(1, length - 1)


def items_of(collection: Collection, problems: Sequence[Problem]) -> Iterator[Item]:
    """All items: one sample of every problem, then the next, so that what a kill leaves is spread over problems."""
    run, asked = collection.run, [(problem, digest(problem.request())) for problem in problems[: collection.limit]]

    def key(problem: Problem, content: str, *which: int | str) -> str:
        return digest([run, problem.id, content, *which])[:32]

    for sample in range(collection.samples):
        for problem, content in asked:
            yield Item(key(problem, content, sample), problem, sample)
    for sample in range(collection.branches):
        for problem, content in asked:
            parents = tuple(key(problem, content, n) for n in range(collection.samples))
            yield Item(key(problem, content, "branch", sample), problem, sample, parents)


async def collect(client: ServerClient, task: Task, collection: Collection, state: Path, concurrency: int) -> Collected:
    """Makes what is missing.

    Raises:
        CollectError: too many failures in a row.
        ServerError, JournalError, TaskError
    """
    problems = task.of_split(collection.split)
    items = list(items_of(collection, problems))
    result = Collected(run=collection.run, wanted=len(items))
    started = time.monotonic()
    with Journal(state, collection.identity) as journal:
        collector = _Collector(client, collection, journal, result)
        adopted = next((entry["adopted"] for entry in reversed(journal.entries) if "adopted" in entry), None)
        if adopted is None or adopted != boot():
            await collector.adopt()
        todo = [item for item in items if not collector.is_done(item)]
        result.before = len(items) - len(todo)
        with tqdm(total=len(items), initial=result.before, unit="rollout", desc="collect", smoothing=0.05) as bar:

            async def one(item: Item) -> None:
                await collector.make(item)
                bar.update()
                bar.set_postfix(collector.figures(time.monotonic() - started), refresh=False)

            await each([item for item in todo if not item.parents], one, concurrency)
            await each([item for item in todo if item.parents], one, concurrency)
    result.retries = client.retries
    result.seconds = time.monotonic() - started
    return result


def checked(result: Collected) -> Collected:
    """The same, if nothing failed.

    Raises:
        CollectError: something did.
    """
    if result.failed:
        raise CollectError(
            f"{len(result.failed)} of {result.wanted} items failed, and the same command tries them again; the first: "
            f"{next(iter(result.failed.values()))}"
        )
    return result


@dataclass(frozen=True)
class _Parent:
    """A rollout that branches leave."""

    prompt: list[int]
    completion: list[int]
    places: list[Place]


class _Collector:
    def __init__(self, client: ServerClient, collection: Collection, journal: Journal, result: Collected) -> None:
        self._client = client
        self._collection = collection
        self._journal = journal
        self._result = result
        self._failures = 0
        # Of rollouts sampled now, until the first branch leaves them.
        self._places: dict[str, list[Place]] = {}
        self._parents: dict[str, asyncio.Task[_Parent]] = {}
        # Whether completions end with a token: they did, or its text holds a stop string.
        self._ends: dict[int, bool] = {}
        # By key: the rollout, or None where a completion was too short to be cut.
        self._done: dict[str, str | None] = {}
        self._begun: set[str] = set()
        for entry in journal.entries:
            if "begun" in entry:
                self._begun.add(entry["begun"])
            elif "done" in entry:
                self._done[entry["done"]] = entry["rollout"]

    def is_done(self, item: Item) -> bool:
        return self._last_key(item) in self._done

    async def adopt(self) -> None:
        """A journal that is new, or may have lost its end: what the store has of this collection is done."""
        async for page in self._client.pages({f"metadata.{RUN}": self._collection.run}):
            for rollout in page:
                key = rollout["metadata"].get(ITEM)
                if key is not None and key not in self._done:
                    self._finish(key, rollout["id"])
        self._journal.add({"adopted": boot()})

    async def make(self, item: Item) -> None:
        """One rollout, with its roll-in if that is wanted; what fails is noted, and tried again by the next run."""
        try:
            await self._make(item)
        except (RefusedError, PassingError) as error:
            # A server that stays away is no failure of the item; a 500 that comes every time is.
            gone = not error.counted if isinstance(error, PassingError) else error.status in HOPELESS
            self._failures += 1
            if gone or self._failures >= FAILURES_IN_A_ROW:
                raise
            self._result.failed[item.key] = f"problem {item.problem.id}, sample {item.sample}: {error}"
        else:
            self._failures = 0

    def figures(self, seconds: float) -> dict[str, Any]:
        """For the progress bar."""
        shown = {"tokens/s": f"{self._result.tokens / max(seconds, 1e-9):.0f}"}
        extra = {"failed": len(self._result.failed), "retries": self._client.retries}
        return {**shown, **{name: value for name, value in extra.items() if value}}

    def _last_key(self, item: Item) -> str:
        return f"{item.key}:out" if self._collection.roll_in else item.key

    async def _make(self, item: Item) -> None:
        if item.parents:
            await self._branch(item)
            return
        collection = self._collection
        route, asking = item.problem.request()
        body = {**asking, **collection.sampling.fields(), "eta": None}
        if collection.guidance is not None:
            body |= collection.guidance.fields()
        if not collection.roll_in:
            if collection.branches:
                body |= asked_with(chat=route != "/v1/completions")
            await self._sampled(item, item.key, route, body, {})
            return
        parent_id = await self._sampled(item, f"{item.key}:in", route, body, {})
        parent = await self._client.get(f"/v1/rollouts/{parent_id}")
        tokens, out = parent["completion_token_ids"], self._last_key(item)
        if len(tokens) < 2:
            self._finish(out, None)
            self._result.too_short += 1
            return
        cut = cut_of(item.key, len(tokens))
        body = {
            **collection.sampling.fields(),
            "prompt": [*parent["prompt_token_ids"], *tokens[:cut]],
            "max_tokens": collection.sampling.max_tokens - cut,
            "eta": None,
        }
        await self._sampled(item, out, "/v1/completions", body, {PARENT: parent_id, CUT: str(cut)})

    async def _branch(self, item: Item) -> None:
        dice = random.Random(seed_of(f"{item.key}/branch"))
        parent_id = self._done.get(dice.choice(item.parents))
        if parent_id is None:
            raise RefusedError("the rollout that this one was to leave failed", 424, None, {})
        parent = await self._read(parent_id)
        found = branch(parent.places, [token for token, ends in self._ends.items() if ends], dice)
        if found is None:
            self._finish(item.key, None)
            self._result.no_way_out += 1
            return
        at, token = found
        sampling = self._collection.sampling
        body = {
            **sampling.fields(),
            "prompt": [*parent.prompt, *parent.completion[:at], token],
            "max_tokens": sampling.max_tokens - at - 1,
            "eta": None,
        }
        about = {PARENT: parent_id, CUT: str(at + 1), FORCED: str(token)}
        await self._sampled(item, item.key, "/v1/completions", body, about)

    async def _read(self, rollout_id: str) -> _Parent:
        """A rollout that may be left; asked for once, however many branches leave it at the same time."""
        reading = self._parents.get(rollout_id)
        if reading is None:
            if len(self._parents) >= PARENTS_KEPT:
                self._parents = {name: task for name, task in self._parents.items() if not task.done()}
            reading = self._parents[rollout_id] = asyncio.ensure_future(self._ask(rollout_id))
        try:
            return await reading
        except Exception:
            self._parents.pop(rollout_id, None)  # the next one tries again
            raise

    async def _ask(self, rollout_id: str) -> _Parent:
        """A rollout, with what else the reference might have drawn at each of its tokens."""
        rollout = await self._client.get(f"/v1/rollouts/{rollout_id}")
        prompt, completion = rollout["prompt_token_ids"], rollout["completion_token_ids"]
        if rollout["finish_reason"] == "stop" and completion:
            self._ends[completion[-1]] = True
        places = self._places.pop(rollout_id, None)
        if places is None:
            places = await self._places_of(prompt, completion)
        # After the last token that fits there is nothing to draw.
        places = places[: self._collection.sampling.max_tokens - 1]
        if self._collection.sampling.stop:
            await asyncio.gather(*map(self._read_token, {token for place in places for token in place.candidates}))
        return _Parent(prompt, completion, places)

    def _note_places(self, sampled: Sampled) -> None:
        """Keeps what else might have been drawn, if the request asked for it."""
        if sampled.choice is not None and sampled.choice.get("logprobs") and len(self._places) < PARENTS_KEPT:
            temperature = self._collection.sampling.temperature or 1.0
            self._places[sampled.rollout] = [place_of(one, temperature) for one in listed_in_choice(sampled.choice)]

    async def _places_of(self, prompt: list[int], completion: list[int]) -> list[Place]:
        """Of a completion that an earlier run sampled."""
        sampling = self._collection.sampling
        asked = {
            **sampling.fields(),
            "model": self._collection.model,
            "prompt": [*prompt, *completion],
            "max_tokens": 1,
            "prompt_logprobs": LISTED,
            "seed": 0,
            "eta": None,
        }
        (choice,) = (await self._client.post("/v1/completions", asked))["choices"]
        listed = listed_in_prompt(choice["prompt_logprobs"], len(prompt))
        return [place_of(one, sampling.temperature or 1.0) for one in listed]

    async def _read_token(self, token: int) -> None:
        """Finds out whether a token's text holds a stop string."""
        if token not in self._ends:
            answer = await self._client.post("/detokenize", {"model": self._collection.model, "tokens": [token]})
            self._ends[token] = any(string in answer["prompt"] for string in self._collection.sampling.stop)

    async def _sampled(self, item: Item, key: str, route: str, body: dict[str, Any], metadata: dict[str, str]) -> str:
        """The rollout of one request: known, found in the store, or made now."""
        known = self._done.get(key)
        if known is not None:
            return known
        if key in self._begun and (found := await self._client.find(key)) is not None:
            self._result.found += 1
            self._finish(key, found)
            return found
        self._begun.add(key)
        self._journal.add({"begun": key})
        sampled = await self._client.sample(
            route,
            {
                **body,
                "model": self._collection.model,
                "seed": seed_of(key),
                "store": True,
                "metadata": {**self._metadata(item), ITEM: key, **metadata},
            },
        )
        if sampled.tokens is None:
            self._result.found += 1
        else:
            self._result.made += 1
            self._result.tokens += sampled.tokens
            self._note_places(sampled)
        self._finish(key, sampled.rollout)
        return sampled.rollout

    def _metadata(self, item: Item) -> dict[str, str]:
        collection = self._collection
        return {
            RUN: collection.run,
            TASK: collection.task,
            SPLIT: collection.split,
            PROBLEM: item.problem.id,
            SAMPLE: f"branch-{item.sample}" if item.parents else str(item.sample),
            ROUND: str(collection.round),
        }

    def _finish(self, key: str, rollout: str | None) -> None:
        self._done[key] = rollout
        self._journal.add({"done": key, "rollout": rollout})
