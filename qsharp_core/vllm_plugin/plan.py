"""What follows from the requests of a step alone: made again when they change, not at every step.

Shapes: R rows, K most candidates of any row.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qsharp_core import policy
from qsharp_core.transfer import column, to_device
from qsharp_core.vllm_plugin.registry import LoadedCritic
from qsharp_core.vllm_plugin.rows import LogitsRow, TrackedRequest
from qsharp_core.wire.guidance import Method, Tail


@dataclass(frozen=True)
class Budgets:
    """What limits the KL divergence of a batch's rows.

    Attributes:
        total_R, token_R: nats that all tokens and one token may spend, float64; infinite without such a budget.
        account_R: what all tokens have spent is kept there (`spending`), int64; 0 in rows without such a budget.
    """

    total_R: Tensor
    token_R: Tensor
    account_R: Tensor

    @classmethod
    def of(cls, requests: list[TrackedRequest], device: torch.device) -> "Budgets | None":
        """The budgets of these requests; None if none has any."""
        params = [request.params for request in requests]
        if all(p.kl_total is None and p.kl_token is None for p in params):
            return None
        return cls(
            total_R=column([math.inf if p.kl_total is None else p.kl_total for p in params], device),
            token_R=column([math.inf if p.kl_token is None else p.kl_token for p in params], device),
            account_R=column([request.account for request in requests], device, torch.int64),
        )


@dataclass(frozen=True)
class BatchPlan:
    """How the rows of a batch are guided.

    Attributes:
        requests: the request of each row.
        places: the place of each row among all logits.
        index_R: the same places, int64, on the device.
        most_candidates: the most candidates that a guided request asks for; 0 where no request asks for guidance.
        candidates_asked: the number of candidates that the guided rows ask for, all together.
        least_RK: see `policy.least_log_ref`; rows that are not guided, or no longer, have no candidates.
        temperature_R: effective temperatures, float64.
        softmax_temperature_R: the same; None where all are 1.
        eta_R: float64; 1 in rows that are not guided.
        keep_R: rows whose tail keeps its mass, bool.
        cd_R: rows that tilt as Controlled Decoding does, bool; None where no row does.
        bounds_R2: the relative tilt of each row's tail (ignored in rows of `keep_R`), and the greatest reward; float64.
        members: each critic, and the indices of the rows that it guides.
        budget: what limits the rows' KL divergence; None where no row has a budget.
        reports_candidates: whether a request asks for its candidates to be reported.
    """

    requests: list[TrackedRequest]
    places: list[int]
    index_R: Tensor
    most_candidates: int
    candidates_asked: int
    least_RK: Tensor
    temperature_R: Tensor
    softmax_temperature_R: Tensor | None
    eta_R: Tensor
    keep_R: Tensor
    cd_R: Tensor | None
    bounds_R2: Tensor
    members: list[tuple[LoadedCritic, list[int]]]
    budget: "Budgets | None"
    reports_candidates: bool

    @classmethod
    def of(cls, rows: list[LogitsRow], device: torch.device) -> "BatchPlan":
        """The plan for these rows."""
        requests, places = [row.request for row in rows], [row.index for row in rows]
        params = [request.params for request in requests]
        temperatures = [request.temperature for request in requests]
        # From parameters alone, so that every rank has the same; which rows are guided is known where the critics are.
        candidate_counts = [p.candidates for p in params if p.eta is not None]
        counts = [request.params.candidates if request.guiding_critic else 0 for request in requests]
        members: dict[int, tuple[LoadedCritic, list[int]]] = {}
        for i, request in enumerate(requests):
            if (critic := request.guiding_critic) is not None:
                members.setdefault(id(critic), (critic, []))[1].append(i)
        least_RK = policy.least_log_ref(counts, [p.min_prob for p in params], max(candidate_counts, default=1))
        temperature_R = policy.effective_temperature(column(temperatures, device))
        tails = [Tail(p.tail) for p in params]
        is_cd = [Method(p.method) == Method.CD for p in params]
        ranges = [request.critic.card.reward_range if request.critic else (0.0, 1.0) for request in requests]
        bounds = [
            (policy.tail_tilt(tail, p.eta or 1.0, reward_range), reward_range[1])
            for tail, p, reward_range in zip(tails, params, ranges, strict=True)
        ]
        return cls(
            requests=requests,
            places=places,
            index_R=column(places, device, torch.int64),
            most_candidates=max(candidate_counts, default=0),
            candidates_asked=sum(counts),
            least_RK=to_device(least_RK, device),
            temperature_R=temperature_R,
            softmax_temperature_R=None if {*temperatures} <= {0, 1} else temperature_R,
            eta_R=column([p.eta or 1.0 for p in params], device),
            keep_R=column([tail == Tail.KEEP for tail in tails], device, torch.bool),
            cd_R=column(is_cd, device, torch.bool) if any(is_cd) else None,
            bounds_R2=column(bounds, device),
            members=[*members.values()],
            budget=Budgets.of(requests, device),
            reports_candidates=any(p.report_candidates for p in params),
        )

    def fits(self, rows: list[LogitsRow]) -> bool:
        """Whether these rows have the requests and the places that the plan was made for."""
        return self.requests == [row.request for row in rows] and self.places == [row.index for row in rows]

    def covers(self, logits: Tensor) -> bool:
        """Whether the rows are all rows of the logits, in order."""
        return self.places == list(range(len(logits)))

    @property
    def failures(self) -> dict[int, str]:
        """The reasons of requests that have failed, by the id that they are reported under."""
        return {
            request.params.id: request.failure
            for request in self.requests
            if request.failure is not None and request.params.id is not None
        }
