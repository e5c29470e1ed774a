"""The best of several samples.

Those that fall behind may be ended on the way: speculative rejection, arXiv 2410.20290.
"""

import asyncio
import math
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from copy import copy
from typing import Any

from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from qsharp_core.wire.reports import SearchReport
from server.request.sample import Sample, Sampler, one_of
from server.request.search.fields import BestOfSearch, Rejection
from server.request.search.found import Found, Terms, estimate
from server.request.search.ranking import ranked, with_mean


async def best_of(
    search: BestOfSearch, wanted: int, sampler: Sampler, prompt: Mapping[str, Any], params: SamplingParams, terms: Terms
) -> list[Found]:
    """The best samples, the best first.

    Args:
        search: what is asked for.
        wanted: how many are returned.
        sampler: makes the samples.
        prompt, params: of the request; the seed of sample `i` is that of the request plus `i`.
        terms: of the critic.
    """
    params = copy(params)
    params.output_kind = RequestOutputKind.DELTA if search.reject else RequestOutputKind.FINAL_ONLY
    running = [
        _Running(i, sampler.sample(prompt, one_of(params, i), followed=search.reject is not None))
        for i in range(search.n)
    ]
    kept = await _run(running, wanted, search.reject, terms.eta)
    outputs = [one.output for one in kept]
    estimates = [estimate(one.sample.reports, terms.eta) for one in kept]
    order = ranked(
        search.by,
        [output.outputs[0].text for output in outputs],
        estimates,
        vote=search.vote,
        reward_range=terms.reward_range,
    )
    spent = sum(one.sample.spent for one in running)
    return [
        Found(
            outputs[i],
            kept[i].sample.reports,
            SearchReport(
                kind="best_of",
                n=search.n,
                sample=kept[i].index,
                estimate=estimates[i],
                tokens_spent=spent,
                rejected=search.n - len(kept),
            ),
        )
        for i in order[:wanted]
    ]


class _Running:
    """A sample that runs in a task of its own."""

    def __init__(self, index: int, sample: Sample) -> None:
        self.index = index
        self.sample = sample
        self.task: asyncio.Task[None] | None = None
        self._output: RequestOutput | None = None

    @property
    def output(self) -> RequestOutput:
        """All of its outputs as one."""
        assert self._output is not None
        return self._output

    @property
    def ended(self) -> bool:
        """Whether it has ended; raises what it ended by, if that is an error."""
        assert self.task is not None
        if not self.task.done():
            return False
        self.task.result()
        return True

    async def run(self, news: asyncio.Event) -> None:
        """Samples, and sets `news` when there is something new."""
        try:
            async with aclosing(self.sample.outputs()) as outputs:
                async for output in outputs:
                    if self._output is None:
                        self._output = output
                    else:
                        self._output.add(output, aggregate=True)
                    news.set()
        finally:
            news.set()


async def _run(running: Sequence[_Running], wanted: int, rejection: Rejection | None, eta: float) -> list[_Running]:
    """Runs all samples to their ends, and returns those that were not rejected.

    Samples are looked at when each has as many tokens as the look is for, or has ended. What is compared is what was
    known of each at that token, however far it has come meanwhile, so that a seed settles who is rejected.
    """
    news = asyncio.Event()
    for one in running:
        one.task = asyncio.create_task(one.run(news))
    live, at = list(running), 0
    try:
        while True:
            ended = [one.ended for one in live]
            if rejection is not None and len(live) > wanted:
                look = at + rejection.every
                beyond = [len(one.sample.reports) > look for one in live]
                if any(beyond) and all(done or far for done, far in zip(ended, beyond, strict=True)):
                    live, at = _better(live, wanted, rejection.keep, look, eta), look
                    continue
            if all(ended):
                return live
            news.clear()
            await news.wait()
    finally:
        tasks = [one.task for one in running if one.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _better(live: Sequence[_Running], wanted: int, keep: float, at: int, eta: float) -> list[_Running]:
    """The better share of the samples, by what was known after `at` tokens; the others are ended."""
    values = with_mean([estimate(one.sample.reports[:at], eta) for one in live])
    order = sorted(range(len(live)), key=lambda i: -values[i])
    kept = max(wanted, math.ceil(keep * len(live)))
    for i in order[kept:]:
        task = live[i].task
        assert task is not None
        task.cancel()
    return [live[i] for i in sorted(order[:kept])]
