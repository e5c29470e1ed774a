"""Collects the rollouts of a `Collection` that are missing, through a running server that stores them.

*Nothing is done twice.* Each rollout carries its item's key in the metadata, and the journal holds the keys of what was
begun and of what is done. What was begun and is not done may be in the store, so the store is asked for that key before
anything is sampled. Without a journal, or after the machine was started anew, whatever the store has of the same
collection counts as done.
"""

import random
import time
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from qsharp_core.errors import QSharpError
from qsharp_core.wire.metadata import CONTENT, CUT, FORCED, ITEM, PARENT, PROBLEM, ROUND, RUN, SAMPLE, SPLIT, TASK
from trainer.rollouts.branch_parents import BranchParents
from trainer.rollouts.branching import branch, with_alternatives
from trainer.rollouts.client import JSONObject, ServerClient
from trainer.rollouts.collection import Collection, Item, content_of, cut_of, items_of, seed_of
from trainer.rollouts.concurrency import each
from trainer.rollouts.errors import RefusedError, TransientError
from trainer.rollouts.journal import Journal, boot
from trainer.tasks.base import Task

# So many failures with no success between them are not the items' own.
FAILURES_IN_A_ROW = 16
# Statuses that say that nothing else will succeed either.
HOPELESS = (401, 403, 404, 405, 409)


class CollectError(QSharpError):
    """The collection cannot go on, or has ended with items that failed."""


@dataclass
class Collected:
    """What one run of `collect` did.

    Attributes:
        run: the collection's name.
        wanted: items in all.
        made: completions that were sampled now.
        found: rollouts that were begun before and found in the store.
        before: items that were done before.
        too_short: guided completions that could not be cut.
        no_way_out: branches that could not be made, because the reference was sure of every token of their parent.
        tokens: sampled now.
        retries: requests that were sent again.
        failed: messages, by the key of the item.
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


async def collect(client: ServerClient, task: Task, collection: Collection, state: Path, concurrency: int) -> Collected:
    """Samples what is missing, and waits until all of it is stored.

    Raises:
        CollectError: too many failures in a row.
        RequestError, JournalError, TaskError
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
    """Returns the result if nothing failed.

    Raises:
        CollectError: something did.
    """
    if result.failed:
        raise CollectError(
            f"{len(result.failed)} of {result.wanted} items failed, and the same command tries them again; the first: "
            f"{next(iter(result.failed.values()))}"
        )
    return result


class _Collector:
    def __init__(self, client: ServerClient, collection: Collection, journal: Journal, result: Collected) -> None:
        self._client = client
        self._collection = collection
        self._journal = journal
        self._result = result
        self._failures = 0
        self._parents = BranchParents(client, collection.model, collection.sampling)
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
        """Takes what the store has of this collection as done, for a journal that is new or may have lost its end."""
        async for page in self._client.pages({f"metadata.{RUN}": self._collection.run}):
            for rollout in page:
                key = rollout["metadata"].get(ITEM)
                if key is not None and key not in self._done:
                    self._finish(key, rollout["id"])
        self._journal.add({"adopted": boot()})

    async def make(self, item: Item) -> None:
        """Makes one rollout, with its roll-in if that is wanted. A failure is noted, and the next run tries again."""
        try:
            await self._make(item)
        except (RefusedError, TransientError) as error:
            # A server that stays away is no failure of the item; a 500 that comes every time is.
            gone = not error.internal if isinstance(error, TransientError) else error.status in HOPELESS
            self._failures += 1
            if gone or self._failures >= FAILURES_IN_A_ROW:
                raise
            self._result.failed[item.key] = f"problem {item.problem.id}, sample {item.sample}: {error}"
        else:
            self._failures = 0

    def figures(self, seconds: float) -> dict[str, str]:
        """What the progress bar shows."""
        speed = {"tokens/s": f"{self._result.tokens / max(seconds, 1e-9):.0f}"}
        problems = {"failed": len(self._result.failed), "retries": self._client.retries}
        return speed | {name: str(count) for name, count in problems.items() if count}

    def _last_key(self, item: Item) -> str:
        return f"{item.key}:out" if self._collection.roll_in else item.key

    async def _make(self, item: Item) -> None:
        if item.parents:
            await self._branch(item)
            return
        collection = self._collection
        route, question = item.problem.request()
        body = {**question, **collection.sampling.fields(), "eta": None}
        if collection.guidance is not None:
            body |= collection.guidance.fields()
        if not collection.roll_in:
            if collection.branches:
                body |= with_alternatives(chat=route != "/v1/completions")
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
        parent = await self._parents.read(parent_id)
        departure = branch(parent.places, self._parents.ending_tokens(), dice)
        if departure is None:
            self._finish(item.key, None)
            self._result.no_way_out += 1
            return
        at, token = departure
        sampling = self._collection.sampling
        body = {
            **sampling.fields(),
            "prompt": [*parent.prompt, *parent.completion[:at], token],
            "max_tokens": sampling.max_tokens - at - 1,
            "eta": None,
        }
        about = {PARENT: parent_id, CUT: str(at + 1), FORCED: str(token)}
        await self._sampled(item, item.key, "/v1/completions", body, about)

    async def _sampled(self, item: Item, key: str, route: str, body: JSONObject, metadata: dict[str, str]) -> str:
        """The id of the rollout of one request: known, found in the store, or made now."""
        known = self._done.get(key)
        if known is not None:
            return known
        if key in self._begun and (stored := await self._client.find(key)) is not None:
            self._result.found += 1
            self._finish(key, stored)
            return stored
        self._begun.add(key)
        self._journal.add({"begun": key})
        completion = await self._client.sample(
            route,
            {
                **body,
                "model": self._collection.model,
                "seed": seed_of(key),
                "store": True,
                "metadata": {**self._metadata(item), ITEM: key, **metadata},
            },
        )
        if completion.tokens is None:
            self._result.found += 1
        else:
            self._result.made += 1
            self._result.tokens += completion.tokens
            self._parents.note(completion)
        self._finish(key, completion.rollout)
        return completion.rollout

    def _metadata(self, item: Item) -> dict[str, str]:
        collection = self._collection
        return {
            RUN: collection.run,
            TASK: collection.task,
            SPLIT: collection.split,
            PROBLEM: item.problem.id,
            CONTENT: content_of(item.problem),
            SAMPLE: f"branch-{item.sample}" if item.parents else str(item.sample),
            ROUND: str(collection.round),
        }

    def _finish(self, key: str, rollout: str | None) -> None:
        self._done[key] = rollout
        self._journal.add({"done": key, "rollout": rollout})
