"""Reports of guided steps to the API process: what the step computed, once its tokens are sampled.

Shapes: R rows of the step, K most candidates of any row, N outputs of a critic for each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qsharp_core import policy
from qsharp_core.policy import Candidates, GuidedStep
from qsharp_core.transfer import column
from qsharp_core.vllm_plugin.audit import Auditor
from qsharp_core.vllm_plugin.registry import WorkerRegistry
from qsharp_core.vllm_plugin.rows import LogitsRow, TrackedRequest
from qsharp_core.vllm_plugin.telemetry import CandidateReport, Columns, Sender, Status, StepFacts


@dataclass(frozen=True)
class StepOutcome:
    """A guided step whose tokens are not yet known.

    Attributes:
        rows: the rows of the step.
        index_R: the place of each row among all logits, int64, on the device.
        candidates, guided: the guided policy.
        strength_R: which share of the tilt is within each row's budget, float64; None where no row has a budget.
        broken_R: rows whose critic's outputs were not finite, bool.
        outputs: the critics' outputs `[K, N]`, float64, of requests whose candidates are reported.
        failures: why requests had failed before this step, by `qsharp_id`.
        seconds: how long the critics were asked.
        scored: number of candidates that were scored.
    """

    rows: list[LogitsRow]
    index_R: Tensor
    candidates: Candidates
    guided: GuidedStep
    strength_R: Tensor | None
    broken_R: Tensor
    outputs: Mapping[TrackedRequest, Tensor]
    failures: dict[int, str]
    seconds: float
    scored: int


class Reporter:
    """Makes reports and sends them to whoever is connected; makes none while nobody is.

    Args:
        device: of the logits.
        registry: the critics whose caches are reported.
        auditor: what it found is reported, too.
        engine: index of this data-parallel engine.
    """

    def __init__(self, device: torch.device, registry: WorkerRegistry, auditor: Auditor, engine: int) -> None:
        self._device, self._registry, self._auditor, self._engine = device, registry, auditor, engine
        self.sender = Sender(device)

    def report(self, outcome: StepOutcome, sampled: Tensor) -> None:
        """Reports a step.

        Args:
            outcome: the step.
            sampled: the tokens that were sampled from all logits, `[B]` or `[B, 1]`.
        """
        if not self.sender.connected:
            return
        rows, guided = outcome.rows, outcome.guided
        tokens_R = sampled.reshape(-1).index_select(0, outcome.index_R).long()
        log_ref_R, log_pi_R = policy.token_logprobs(outcome.candidates, guided, tokens_R)
        has_failed = [row.request.failure is not None for row in rows]
        status_R = outcome.candidates.mask_RK.any(-1).long() * Status.GUIDED
        status_R.masked_fill_(outcome.broken_R | column(has_failed, self._device, torch.bool), Status.FAILED)
        strength_R = torch.ones_like(guided.kl_R) if outcome.strength_R is None else outcome.strength_R
        columns = Columns(tokens_R, status_R, guided.kl_R, log_ref_R, log_pi_R, guided.value_R, strength_R)
        observed = [i for i, row in enumerate(rows) if row.request.params.id is not None]
        if len(observed) < len(rows):
            at = column(observed, self._device, torch.int64)
            columns = Columns(*(values_R[at] for values_R in columns))
        self.sender.send(self._facts([rows[i] for i in observed], outcome), columns, _candidates(outcome, observed))

    def report_audits(self) -> None:
        """Reports what audits have found, although there is no step to report."""
        if self.sender.connected and (audits := self._auditor.take_results()):
            none = torch.empty(0, device=self._device)
            columns = Columns(none, none, none, none, none, none, none)
            self.sender.send(StepFacts(audits=audits, engine=self._engine), columns)

    def _facts(self, rows: list[LogitsRow], outcome: StepOutcome) -> StepFacts:
        """What the host knows of a step, for these of its rows."""
        critics = self._registry.critics.items()
        scorers = {key: critic.cached_scorer for key, critic in critics if critic.cached_scorer is not None}
        counts = [scorer.take_counts() for scorer in scorers.values()]
        return StepFacts(
            ids=[row.request.params.id or 0 for row in rows],
            positions=[row.length for row in rows],
            failures=outcome.failures,
            critic_seconds=outcome.seconds,
            scored_candidates=outcome.scored,
            blocks_used={key: scorer.blocks.used for key, scorer in scorers.items()},
            prefix_tokens=sum(count.prefix_tokens for count in counts),
            prefix_hits=sum(count.prefix_hits for count in counts),
            splits=sum(count.splits for count in counts),
            audits=self._auditor.take_results(),
            engine=self._engine,
        )


def _candidates(outcome: StepOutcome, observed: Sequence[int]) -> dict[int, Tensor]:
    """The candidates of rows whose request asks for them, by the row's place among those that are reported."""
    if not outcome.outputs:
        return {}
    chosen, rows = outcome.candidates, outcome.rows
    return {
        place: CandidateReport.packed(chosen.mask_RK[i], chosen.ids_RK[i], chosen.log_ref_RK[i], outputs_KN)
        for place, i in enumerate(observed)
        if (outputs_KN := outcome.outputs.get(rows[i].request)) is not None
    }
