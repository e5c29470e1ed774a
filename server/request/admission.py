"""A request on its way: what it asks of guidance, settled at admission, and what was done for its choices.

The route that parses a request and the engine proxy that serves it are vLLM's handler apart; `CALL` bridges it.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from qsharp_core.errors import GuidanceError
from qsharp_core.vllm_plugin.params import GuidanceParams
from qsharp_core.wire.guidance import DEFAULT_CANDIDATES, DEFAULT_MIN_PROB, PREFIX, Detail
from server.critics.catalog import CriticInfo, Registry
from server.request.recording import Recording
from server.request.schema import ChoiceGuidance, GuidanceOptions, GuidedFields, accepts, wrong
from server.settings import NOT_CONFIGURED, Settings


@dataclass(eq=False)
class GuidedCall:
    """One HTTP request to a generating route.

    Attributes:
        params: its guidance; None if it is not guided.
        critic: the version it is guided by, exact.
        detail: what its response reports.
        limit_given: the request itself says how many tokens it wants.
        prompt_field: what the request calls its prompt.
        results: by the response's choice index.
        prompts: prompts handed to the engine so far.
        recording: of a request that is stored.
    """

    params: GuidanceParams | None
    critic: CriticInfo | None
    detail: Detail
    limit_given: bool
    prompt_field: str
    results: dict[int, ChoiceGuidance] = field(default_factory=dict)
    prompts: int = 0
    recording: Recording | None = None
    release: Callable[[], Any] = lambda: None

    @property
    def observed(self) -> bool:
        """Whether the worker must report on it."""
        return self.params is not None or self.detail == "tokens"


CALL: ContextVar[GuidedCall | None] = ContextVar("qsharp_call", default=None)


def admit(request: GuidedFields, settings: Settings, registry: Registry) -> GuidedCall | None:
    """Settles a request's guidance; None where nothing is sampled for it.

    Raises:
        GuidanceError: names the field.
    """
    if request.store and settings.rollouts is None:
        raise GuidanceError(f"store must be false, null or absent: {NOT_CONFIGURED}", "store")
    if any(name.startswith(PREFIX) for name in getattr(request, "vllm_xargs", None) or {}):
        raise GuidanceError(f"vllm_xargs cannot carry {PREFIX}…: send eta and guidance", "vllm_xargs")
    options = request.guidance or GuidanceOptions()
    eta = request.eta if "eta" in request.model_fields_set else settings.default_eta
    if eta is None and "eta" not in request.model_fields_set and (given := options.given()):
        raise GuidanceError(
            f"guidance.{min(given)} has no effect without eta: send {accepts(settings.max_candidates)['eta']}", "eta"
        )
    limit = settings.max_candidates
    if options.candidates is not None and options.candidates > limit:
        raise wrong("guidance.candidates", options.candidates, accepts(limit)["guidance.candidates"])
    critic = registry.resolve(options.critic) if eta is not None or options.critic is not None else None
    detail: Detail = options.detail or "summary"
    asked = eta is not None or detail == "tokens"
    if getattr(request, "use_beam_search", False):
        if asked or request.store:
            raise GuidanceError("use_beam_search cannot be combined with guidance or store", "use_beam_search")
        return None
    if getattr(request, "echo", False) and getattr(request, "max_tokens", None) == 0:
        if asked or request.store:
            raise GuidanceError(
                "max_tokens must be at least 1 with guidance or store: nothing is sampled", "max_tokens"
            )
        return None
    params = None
    if eta is not None:
        assert critic is not None
        params = GuidanceParams(
            eta=eta,
            critic=critic.key,
            candidates=options.candidates or min(DEFAULT_CANDIDATES, limit),
            min_prob=DEFAULT_MIN_PROB if options.min_prob is None else options.min_prob,
            tail=options.tail or "floor",
            method=options.method or "qsharp",
        )
    limit_given = {"max_tokens", "max_completion_tokens"} & request.model_fields_set
    call = GuidedCall(
        params=params,
        critic=critic if params is not None else None,
        detail=detail,
        limit_given=any(getattr(request, name) is not None for name in limit_given),
        prompt_field="messages" if hasattr(request, "messages") else "prompt",
    )
    if call.critic is not None:
        call.release = call.critic.lease(call)
    return call
