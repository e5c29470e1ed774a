"""Admission: checks what a request asks for, and settles its guidance before anything is sampled."""

from qsharp_core.errors import GuidanceError
from qsharp_core.vllm_plugin.params import GuidanceParams
from qsharp_core.wire.guidance import DEFAULT_CANDIDATES, DEFAULT_METHOD, DEFAULT_MIN_PROB, DEFAULT_TAIL, PREFIX
from server.critics.catalog import CriticCatalog
from server.request.call import GuidedCall
from server.request.schema import GuidanceOptions, GuidedRequest, accepts, wrong
from server.settings import NOT_CONFIGURED, Settings


def admit(request: GuidedRequest, settings: Settings, catalog: CriticCatalog) -> GuidedCall | None:
    """The state that the request is served with; None if nothing of ours is to be done for it.

    A guided request uses its critic's version until `release` is called.

    Raises:
        GuidanceError: names the field that is wrong.
    """
    if request.store and settings.rollouts is None:
        raise GuidanceError(f"store must be false, null or absent: {NOT_CONFIGURED}", "store")
    _check_seed(request)
    refuse_private(getattr(request, "vllm_xargs", None), "vllm_xargs")
    nested = (request.model_extra or {}).get("extra_body")
    if isinstance(nested, dict) and (inside := {"eta", "guidance", "store", "metadata"} & nested.keys()):
        raise GuidanceError(
            f"extra_body.{min(inside)}: extra_body is a parameter of a client, which puts what it holds beside the "
            f"other fields; send {min(inside)} itself",
            f"extra_body.{min(inside)}",
        )
    options = request.guidance or GuidanceOptions()
    eta = _eta(request, options, settings)
    limit = settings.max_candidates
    if options.candidates is not None and options.candidates > limit:
        raise wrong("guidance.candidates", options.candidates, accepts(limit)["guidance.candidates"])
    detail = options.detail or "summary"
    asked = "eta" in request.model_fields_set and eta is not None
    if _samples_nothing_for_us(request, needed=asked or detail == "tokens" or bool(request.store)):
        return None
    critic = catalog.resolve(options.critic) if eta is not None or options.critic is not None else None
    params = None
    if eta is not None:
        assert critic is not None
        params = GuidanceParams(
            eta=eta,
            critic=critic.key,
            candidates=options.candidates or min(DEFAULT_CANDIDATES, limit),
            min_prob=DEFAULT_MIN_PROB if options.min_prob is None else options.min_prob,
            tail=options.tail or DEFAULT_TAIL,
            method=options.method or DEFAULT_METHOD,
        )
    limits = {"max_tokens", "max_completion_tokens"} & request.model_fields_set
    call = GuidedCall(
        params=params,
        critic=critic if params is not None else None,
        detail=detail,
        limit_given=any(getattr(request, name) is not None for name in limits),
        prompt_field="messages" if hasattr(request, "messages") else "prompt",
    )
    if call.critic is not None:
        call.release = call.critic.lease(call)
    return call


def _check_seed(request: GuidedRequest) -> None:
    """Refuses a seed from which the choices' own seeds, one more for each, would leave 64 bits."""
    seed, n = getattr(request, "seed", None), getattr(request, "n", None) or 1
    if seed is not None and seed + n - 1 >= 2**63:
        raise GuidanceError(f"seed must be at most {2**63 - n} with n = {n}: each choice has a seed of its own", "seed")


def refuse_private(extra: object, param: str) -> None:
    """Refuses the worker's own arguments in a field of a request that is handed on to the engine.

    Raises:
        GuidanceError: names the field, `param`.
    """
    if isinstance(extra, dict) and any(name.startswith(PREFIX) for name in extra):
        raise GuidanceError(f"{param} cannot carry {PREFIX}…: send eta and guidance", param)


def _eta(request: GuidedRequest, options: GuidanceOptions, settings: Settings) -> float | None:
    if "eta" in request.model_fields_set:
        return request.eta
    if settings.default_eta is None and (options_set := options.names_set()):
        raise GuidanceError(
            f"guidance.{min(options_set)} has no effect without eta: send {accepts(settings.max_candidates)['eta']}",
            "eta",
        )
    return settings.default_eta


def _samples_nothing_for_us(request: GuidedRequest, needed: bool) -> bool:
    """Whether the request uses beam search, or only scores its prompt.

    Raises:
        GuidanceError: it does, although something is `needed` (guidance, reports or storing) that this cannot have.
    """
    if getattr(request, "use_beam_search", False):
        if needed:
            raise GuidanceError("use_beam_search cannot be combined with guidance or store", "use_beam_search")
        return True
    if getattr(request, "echo", False) and getattr(request, "max_tokens", None) == 0:
        if needed:
            raise GuidanceError(
                "max_tokens must be at least 1 with guidance or store: nothing is sampled", "max_tokens"
            )
        return True
    return False
