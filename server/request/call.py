"""The state of one request on its way: what was settled at its admission, and what was done for its choices.

vLLM's handler stands between the route that parses a request and the engine proxy that samples it, and passes nothing
of ours on. `CALL` carries the state past it.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from qsharp_core.vllm_plugin.params import GuidanceParams
from qsharp_core.wire.guidance import Detail
from qsharp_core.wire.reports import ChoiceGuidance, KLBudget
from server.critics.catalog import CriticInfo
from server.request.recording import Recording
from server.request.search.fields import Search


@dataclass(eq=False)
class GuidedCall:
    """One HTTP request to a route that samples.

    Attributes:
        params: its guidance; None if it is not guided.
        critic: the exact version that guides it; None if it is not guided.
        detail: what its response reports.
        limit_given: whether the request itself limits how many tokens are sampled.
        prompt_field: the name of the request's field that holds its prompt.
        search: how its choices are searched for; None if each is a sample of its own.
        results: what was done for each choice, by the choice's index in the response.
        prompts: how many of its prompts were handed to the engine so far.
        samples: how many samples it asks for, of all its prompts.
        recording: makes rollouts of its choices; None if it is not stored.
        release: is called when the request has ended.
    """

    params: GuidanceParams | None
    critic: CriticInfo | None
    detail: Detail
    limit_given: bool
    prompt_field: str
    search: Search | None = None
    results: dict[int, ChoiceGuidance] = field(default_factory=dict)
    prompts: int = 0
    samples: int = 1
    recording: Recording | None = None
    release: Callable[[], Any] = lambda: None

    @property
    def budget(self) -> KLBudget | None:
        """What limits the KL divergence of each choice."""
        if self.params is None or (self.params.kl_total is None and self.params.kl_token is None):
            return None
        return KLBudget(total=self.params.kl_total, token=self.params.kl_token)

    @property
    def observed(self) -> bool:
        """Whether the worker must report this request's steps."""
        return self.params is not None or self.detail in ("tokens", "candidates")


CALL: ContextVar[GuidedCall | None] = ContextVar("qsharp_call", default=None)
# Whether what is asked of the engine now is known to be no answer that a default eta should guide.
UNGUIDED: ContextVar[bool] = ContextVar("qsharp_unguided", default=False)
