"""What a response says of a choice, from the workers' reports of its tokens."""

from collections.abc import Sequence
from math import isnan

from qsharp_core.residual import Step, bellman_residuals
from qsharp_core.vllm_plugin.telemetry import Status
from qsharp_core.wire.guidance import Tail
from qsharp_core.wire.reports import ChoiceGuidance, DetailedToken, SearchReport, TokenGuidance
from server.request.call import GuidedCall
from server.request.candidates import TokenTexts, distribution_of, step_candidates
from server.request.telemetry import TokenReport


def choice_guidance(call: GuidedCall, reports: list[TokenReport], search: SearchReport | None = None) -> ChoiceGuidance:
    """The `guidance` of a choice that has ended, without candidates.

    Args:
        call: its request.
        reports: one for each of its tokens, in order.
        search: what was done to find it.
    """
    return ChoiceGuidance(
        eta=call.params.eta if call.params else None,
        critic=call.critic.key if call.critic else None,
        kl=sum(report.kl for report in reports),
        value=next((report.value for report in reports if not isnan(report.value)), None),
        tokens_guided=sum(report.status == Status.GUIDED for report in reports),
        tokens_total=len(reports),
        kl_budget=call.budget,
        steps_clipped=sum(report.clipped for report in reports),
        search=search,
        tokens=[_token(report) for report in reports] if call.detail == "tokens" else None,
    )


def with_candidates(
    call: GuidedCall, result: ChoiceGuidance, reports: list[TokenReport], prompt: Sequence[int], texts: TokenTexts
) -> ChoiceGuidance:
    """A choice's `guidance` with its tokens and their candidates.

    Args:
        call, reports: as in `choice_guidance`.
        result: what that returned.
        prompt: token ids before the choice.
        texts: of the model's tokens.
    """
    pieces = texts.pieces(prompt, [report.token for report in reports])
    tokens = [
        DetailedToken(**_token(report).model_dump(), text=piece, candidates=step_candidates(report.candidates, texts))
        for report, piece in zip(reports, pieces, strict=True)
    ]
    return result.model_copy(update={"tokens": tokens, "distribution": distribution_of(call)})


def _token(report: TokenReport) -> TokenGuidance:
    return TokenGuidance(
        token_id=report.token,
        kl=report.kl,
        ref_logprob=report.ref_logprob,
        logprob=report.logprob,
        value=None if isnan(report.value) else report.value,
        strength=report.strength,
    )


def residuals(call: GuidedCall, reports: list[TokenReport]) -> list[float]:
    """The critic's Bellman residuals over a choice that has ended, in units of reward.

    There are none for an unguided choice, and none for Controlled Decoding, whose tilt is not `ln E[exp(z / eta)]`.
    """
    if call.params is None or call.params.eta is None or call.critic is None or call.params.method != "qsharp":
        return []
    steps = [Step(report.value, report.ref_logprob, report.logprob, report.clipped) for report in reports]
    return bellman_residuals(steps, call.params.eta, Tail(call.params.tail), call.critic.status.reward_range[0])
