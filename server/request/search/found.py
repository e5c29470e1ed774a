"""A sample that a search returns, and what all searches need for it."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any, TypeVar

from vllm.outputs import RequestOutput

from qsharp_core.wire.reports import SearchReport
from server.request.telemetry import TokenReport
from server.upstream import Decoded

T = TypeVar("T")
Decode = Callable[[Sequence[int], bool], Decoded]  # a choice's tokens, and whether the last of them ended it


@dataclass(frozen=True)
class Terms:
    """What a critic's values mean.

    Attributes:
        eta: strength of the guidance, in units of reward.
        reward_range: the least and the greatest reward that the critic knows.
    """

    eta: float
    reward_range: tuple[float, float]


@dataclass(frozen=True)
class Found:
    """A sample that is returned as a choice.

    Attributes:
        output: with this one choice, whole.
        reports: of its tokens.
        report: for the response.
    """

    output: RequestOutput
    reports: list[TokenReport]
    report: SearchReport


def estimate(reports: Sequence[TokenReport], eta: float) -> float | None:
    """The reward that the critic expects after these tokens: `V + eta · ln(pi/ref)` where it was last asked.

    It is the critic's own prediction for the token that was drawn there, and nearer to `V` if a budget held that step
    back.

    Returns:
        None if the critic was never asked.
    """
    last = next((report for report in reversed(reports) if not isnan(report.value)), None)
    return None if last is None else last.value + eta * (last.logprob - last.ref_logprob)


async def together(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of coroutines that run at once; when one fails or the caller is cancelled, the others are ended."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
