"""Requests in the batch that are guided or observed, and their rows of logits."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from qsharp_core.critic.scoring.cache import CachedSequence
from qsharp_core.vllm_plugin.params import GuidanceParams
from qsharp_core.vllm_plugin.registry import LoadedCritic


@dataclass(eq=False)
class TrackedRequest:
    """A request in the batch that is guided or observed.

    Attributes:
        params: the request's guidance.
        temperature: the temperature in its sampling parameters.
        critic: the version that the request began with; None if it is not guided.
        sequence: the request's sequence in the cache of that critic; None if there is none.
        account: of what it spends of its budget (`spending`); 0 if it has no budget for all its tokens.
        failure: why the request can no longer be guided. It goes on unguided and is reported as failed; the reader of
            the reports ends it.
    """

    params: GuidanceParams
    temperature: float
    critic: LoadedCritic | None = None
    sequence: CachedSequence | None = None
    account: int = 0
    failure: str | None = None

    @property
    def guiding_critic(self) -> LoadedCritic | None:
        """The critic that guides the request now; None if there is none or it has failed."""
        return self.critic if self.failure is None else None


@dataclass(slots=True)
class LogitsRow:
    """The row of logits of a request in the running step.

    Attributes:
        index: place of the row among all logits.
        request: the request that the row belongs to.
        length: number of tokens in the request's history.
        read: returns the history. Where tokens are on an accelerator, it waits for the device.
        keep: copies the history on the accelerator, `[length]`, without waiting; None where tokens are on the host.
    """

    index: int
    request: TrackedRequest
    length: int
    read: Callable[[], list[int]]
    keep: Callable[[], Tensor] | None = None
