"""A trial on live traffic: a new version gets a share of the requests, until their rewards say which version is better.

The server draws who gets it. A wrong verdict has a bounded probability, however often one looks
(`trainer.loop.sequential`). Whatever an admin decides meanwhile stands.
"""

import asyncio
import bisect
import math
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from rich.console import Console
from tqdm import tqdm

from trainer.loop.activation import ServedCritic
from trainer.loop.report import TrialOutcome, TrialResult
from trainer.loop.sequential import RewardComparison, compare
from trainer.loop.versions import Version
from trainer.rollouts.client import JSONObject, ServerClient
from trainer.trust import EVERYBODY, Trust

LONGEST = 3600.0  # seconds that a request may take: rollouts are listed in the order in which they ended


@dataclass(frozen=True, kw_only=True)
class TrialSettings:
    """How a trial is made.

    Attributes:
        share: of the requests that name no version, strictly between 0 and 1.
        most: requests with rewards, of both versions together; if they decide nothing, the active version stays.
        alpha: probability that a version that is no better is promoted, or one that is no worse rolled back.
        interval: seconds between two looks.
        trust: whose rollouts and rewards count.
    """

    share: float
    most: int = 5000
    alpha: float = 0.05
    interval: float = 60.0
    trust: Trust = EVERYBODY


class _Decision(NamedTuple):
    created: float
    version: str
    share: float


class Trial:
    """Tries versions of one critic.

    Args:
        client: may see the rollouts, and has the admin key.
        served: the critic in the server.
        settings: of the trial.
        console: shows how far it is.
    """

    def __init__(self, client: ServerClient, served: ServedCritic, settings: TrialSettings, console: Console) -> None:
        self._client = client
        self._served = served
        self._settings = settings
        self._console = console

    async def run(self, new: Version, active: Version, why: str) -> TrialResult:
        """Tries `new` beside the version that is active, and ends the trial unless `new` is better.

        A trial that was begun before is gone on with, if it still runs.

        Args:
            why: it is worth a trial; the server keeps this with its decision.

        Raises:
            RequestError
        """
        seen = compare([], [], [], self._settings.alpha)
        if all(one.version != new.folder.name for one in await self._decisions()):
            if await self._served.current(active) != active:
                return self._result(seen, "ended")  # before it began: another version is active by now
            await self._served.try_out(new, self._settings.share, why)
        with tqdm(total=self._settings.most, unit="reward", desc=f"trial of {new.key}") as bar:
            while True:
                decisions = await self._decisions()
                period = _running(decisions, new)
                if not period:
                    return self._result(seen, "ended")
                seen = await self._look(new, active, period)
                bar.update(sum(seen.n) - bar.n)
                if seen.verdict != "undecided" or sum(seen.n) >= self._settings.most:
                    break
                await asyncio.sleep(self._settings.interval)
        if seen.verdict != "better":
            await self._served.end_trial(new, _told(seen))
        return self._result(seen, seen.verdict)

    async def _decisions(self) -> list[_Decision]:
        return [_Decision(one["created"], one["version"], one["share"]) for one in await self._served.decisions()]

    async def _look(self, new: Version, active: Version, period: Sequence[_Decision]) -> RewardComparison:
        """Compares all rewards of requests since the trial began: one for each request, the mean of its choices."""
        rewards: dict[tuple[float, str, bool], list[float]] = defaultdict(list)
        for version in (new, active):
            async for one in self._rollouts(version, period[0].created):
                rewards[one["created"], one["request_id"], version is new].append(one["reward"])
        begun = [decision.created for decision in period]
        ordered = sorted(rewards)
        return compare(
            [tried for _, _, tried in ordered],
            [fmean(rewards[key]) for key in ordered],
            [period[bisect.bisect_right(begun, created) - 1].share for created, _, _ in ordered],
            self._settings.alpha,
        )

    async def _rollouts(self, version: Version, since: float) -> AsyncIterator[JSONObject]:
        query = {"critic": version.key, "has_reward": "true", "order": "desc", **self._settings.trust.rewards}
        async for page in self._client.pages(query):
            for one in page:
                if one["created"] >= since:
                    yield one
            if page[-1]["created"] < since - LONGEST:
                return

    def _result(self, seen: RewardComparison, outcome: TrialOutcome) -> TrialResult:
        result = TrialResult(
            outcome=outcome,
            why=_told(seen),
            share=self._settings.share,
            alpha=seen.alpha,
            n=seen.n,
            means=(_finite(seen.means[0]), _finite(seen.means[1])),
            difference=_finite(seen.difference),
            low=_finite(seen.low),
            high=_finite(seen.high),
        )
        self._console.print(f"trial: {outcome}; {result.why}", highlight=False)
        return result


def _running(decisions: Sequence[_Decision], new: Version) -> Sequence[_Decision]:
    """The decisions of the trial that runs: the last ones, if they are about shares of this version."""
    start = len(decisions)
    while start and decisions[start - 1].version == new.folder.name and 0 < decisions[start - 1].share < 1:
        start -= 1
    return decisions[start:]


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _told(seen: RewardComparison) -> str:
    (new, active), (first, second) = seen.n, seen.means
    if not new or not active:
        return f"{new} rewards of the trial and {active} of the active version"
    return (
        f"mean reward {first:.4g} (n = {new}) and {second:.4g} (n = {active}) of the active version: "
        f"{seen.difference:+.4g} ({seen.low:+.4g} to {seen.high:+.4g}, wrong with probability {seen.alpha:g} at most)"
    )
