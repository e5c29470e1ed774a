"""Admission: checks what a request asks for, and settles its guidance before anything is sampled."""

from qsharp_core.errors import GuidanceError, NoCriticError, UnknownCriticError
from qsharp_core.vllm_plugin.params import GuidanceParams
from qsharp_core.wire.guidance import (
    BUDGET_RANGE,
    DEFAULT_CANDIDATES,
    DEFAULT_METHOD,
    DEFAULT_MIN_PROB,
    DEFAULT_TAIL,
    PREFIX,
)
from server.critics.catalog import CriticCatalog, CriticInfo
from server.errors import UnknownModelError
from server.request.call import GuidedCall
from server.request.schema import GuidanceOptions, GuidedRequest, accepts
from server.request.values import wrong
from server.request.virtual_models import VirtualModel
from server.settings import NOT_CONFIGURED, Settings


def admit(
    request: GuidedRequest,
    settings: Settings,
    catalog: CriticCatalog,
    model: VirtualModel | None = None,
    who: str | None = None,
) -> GuidedCall | None:
    """The state that the request is served with; None if nothing of ours is to be done for it.

    A guided request uses its critic's version until `release` is called.

    Args:
        request: its fields.
        settings: the server's.
        catalog: the critics that are loaded.
        model: what the name of its model says; None if that is no virtual model's.
        who: by whom a trial of another version takes requests; None: it takes none.

    Raises:
        GuidanceError: names the field that is wrong.
        UnknownModelError: the model's name has a critic that is not loaded.
    """
    if request.store and settings.rollouts is None:
        raise GuidanceError(f"store must be false, null or absent: {NOT_CONFIGURED}", "store")
    refuse_private(getattr(request, "vllm_xargs", None), "vllm_xargs")
    nested = (request.model_extra or {}).get("extra_body")
    if isinstance(nested, dict) and (inside := {"eta", "guidance", "store", "metadata"} & nested.keys()):
        raise GuidanceError(
            f"extra_body.{min(inside)}: extra_body is a parameter of a client, which puts what it holds beside the "
            f"other fields; send {min(inside)} itself",
            f"extra_body.{min(inside)}",
        )
    options = request.guidance or GuidanceOptions()
    limit, accepted = settings.max_candidates, _accepted(settings)
    if options.samples is not None and options.samples > settings.max_search:
        raise wrong("guidance.search.n", options.samples, accepted["guidance.search.n"])
    _check_seed(request, options)
    if model is not None:
        _check_agreement(request, options, model)
    eta = _eta(request, options, model, settings)
    if options.candidates is not None and options.candidates > limit:
        raise wrong("guidance.candidates", options.candidates, accepted["guidance.candidates"])
    follows_critic = eta is None and _leaves_eta_to_critic(request, options, model)
    detail = options.detail or "summary"
    searches = options.search is not None
    needed = (
        request.eta is not None
        or follows_critic
        or detail in ("tokens", "candidates")
        or bool(request.store)
        or searches
    )
    if _only_scores(request, needed):
        return None
    if model is not None:
        _check_has_eta(request, model, settings)
    if _searches_beams(request, needed or (model is not None and eta is not None)):
        return None
    wanted = options.critic or (model.critic if model is not None else None)
    critic = _critic(wanted, model, catalog, who) if eta is not None or follows_critic or wanted is not None else None
    if follows_critic:
        assert critic is not None
        eta = _recommended_eta(critic)
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
            kl_total=_budget("kl_total", options.kl_total, settings.max_kl_total),
            kl_token=_budget("kl_token", options.kl_token, settings.max_kl_token),
            report_candidates=detail == "candidates",
        )
    elif searches:
        raise GuidanceError(f"guidance.search goes by a critic's values: send eta, {accepted['eta']}", "eta")
    limits = {"max_tokens", "max_completion_tokens"} & request.model_fields_set
    call = GuidedCall(
        params=params,
        critic=critic if params is not None else None,
        detail=detail,
        limit_given=any(getattr(request, name) is not None for name in limits),
        prompt_field="messages" if hasattr(request, "messages") else "prompt",
        search=options.search,
    )
    if call.critic is not None:
        call.release = call.critic.lease(call)
    return call


def _accepted(settings: Settings) -> dict[str, str]:
    return accepts(settings.max_candidates, settings.max_search)


def _check_seed(request: GuidedRequest, options: GuidanceOptions) -> None:
    """Refuses a seed from which the samples' own seeds, one more for each, would leave 64 bits."""
    seed, n = getattr(request, "seed", None), max(getattr(request, "n", None) or 1, options.samples or 1)
    if seed is not None and seed + n - 1 >= 2**63:
        raise GuidanceError(f"seed must be at most {2**63 - n} with n = {n}: each sample has a seed of its own", "seed")


def refuse_private(extra: object, param: str) -> None:
    """Refuses the worker's own arguments in a field of a request that is handed on to the engine.

    Raises:
        GuidanceError: names the field, `param`.
    """
    if isinstance(extra, dict) and any(name.startswith(PREFIX) for name in extra):
        raise GuidanceError(f"{param} cannot carry {PREFIX}…: send eta and guidance", param)


def _check_agreement(request: GuidedRequest, options: GuidanceOptions, model: VirtualModel) -> None:
    """Refuses fields that say something else than the model's name does."""
    if model.says_eta and "eta" in request.model_fields_set and request.eta != model.eta:
        raise GuidanceError(
            f"eta is {_json(request.eta)} and model says {_json(model.eta)}: leave one of them out", "eta"
        )
    if None not in (options.critic, model.critic) and options.critic != model.critic:
        raise GuidanceError(
            f"guidance.critic is {options.critic!r:.200} and model says {model.critic!r:.200}: leave one of them out",
            "guidance.critic",
        )


def _check_has_eta(request: GuidedRequest, model: VirtualModel, settings: Settings) -> None:
    """Refuses a model's name that has a critic, where nobody says how strongly it guides."""
    said = model.says_eta or "eta" in request.model_fields_set or settings.default_eta is not None
    if model.critic is not None and not said:
        raise GuidanceError(
            f"model names the critic {model.critic!r:.200}, which has no effect without eta: send "
            f"{_accepted(settings)['eta']}, or say {model.served}@eta=0.1@critic={model.critic:.200}",
            "model",
        )


def _critic(wanted: str | None, model: VirtualModel | None, catalog: CriticCatalog, who: str | None) -> CriticInfo:
    """The version that guides; errors name the model where its name is why it is wanted."""
    try:
        return catalog.resolve(wanted, who)
    except UnknownCriticError as error:
        if model is not None and model.critic == wanted:
            raise UnknownModelError(f"model: {error}") from error
        raise
    except NoCriticError as error:
        if model is not None and (model.eta is not None or model.critic is not None):
            raise NoCriticError(f"model: {error}", "model") from error
        raise


def _eta(
    request: GuidedRequest, options: GuidanceOptions, model: VirtualModel | None, settings: Settings
) -> float | None:
    if model is not None and model.says_eta:
        return model.eta
    if "eta" in request.model_fields_set:
        return request.eta
    if settings.default_eta is None and not options.has_budget and (options_set := options.names_set()):
        raise GuidanceError(
            f"guidance.{min(options_set)} has no effect without eta: send {_accepted(settings)['eta']}",
            "eta",
        )
    return settings.default_eta


def _leaves_eta_to_critic(request: GuidedRequest, options: GuidanceOptions, model: VirtualModel | None) -> bool:
    """Whether the request has a budget, and nobody says how strongly it is to be guided within it."""
    said = "eta" in request.model_fields_set or (model is not None and model.says_eta)
    return options.has_budget and not said


def _recommended_eta(critic: CriticInfo) -> float:
    recommended = critic.status.card.get("recommended_eta")
    if not isinstance(recommended, int | float):
        raise GuidanceError(f"eta must be given with a budget: critic {critic.key} recommends none", "eta")
    return float(recommended)


def _budget(name: str, asked: float | None, most: float | None) -> float | None:
    """The nats that a request may spend.

    Args:
        name: of the option.
        asked: by the request.
        most: that the server allows.
    """
    if asked is None:
        return most
    if most is not None and asked > most:
        raise wrong(f"guidance.{name}", asked, f"a number from {BUDGET_RANGE[0]:g} to {most:g}, in nats")
    return asked


def _only_scores(request: GuidedRequest, needed: bool) -> bool:
    """Whether the request asks for its prompt's log-probabilities, which are the reference's.

    So do requests that sample nothing, and those that evaluations send, which sample a token that they throw away.

    Raises:
        GuidanceError: it samples nothing, although something is `needed` (guidance, reports or storing) that this
            cannot have.
    """
    if not getattr(request, "echo", False) or hasattr(request, "messages"):
        return False
    most, logprobs = getattr(request, "max_tokens", None), getattr(request, "logprobs", None)
    if most == 0 and needed:
        raise GuidanceError("max_tokens must be at least 1 with guidance or store: nothing is sampled", "max_tokens")
    return most == 0 or (most == 1 and logprobs is not None and not needed)


def _searches_beams(request: GuidedRequest, needed: bool) -> bool:
    """Whether the request uses beam search.

    Raises:
        GuidanceError: it does, although something is `needed`.
    """
    if not getattr(request, "use_beam_search", False):
        return False
    if needed:
        raise GuidanceError("use_beam_search cannot be combined with guidance or store", "use_beam_search")
    return True


def _json(eta: float | None) -> str:
    return "null" if eta is None else f"{eta:g}"
