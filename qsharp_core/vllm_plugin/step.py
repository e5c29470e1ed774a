"""One guided step over a batch: the same for both of vLLM's model runners.

The adapters (`v1`, `v2`) say which rows of logits belong to which request, and what the request's tokens are. The guide
asks the critics (`tilts`), tilts the logits (`qsharp_core.policy`), and reports the step once its tokens are sampled
(`report`).

Shapes: B all rows of logits, R rows of guided or observed requests, V vocabulary, D width of the reference's hidden
states.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qsharp_core import budget, policy
from qsharp_core.critic.scoring.cache import CachedSequence
from qsharp_core.critic.scoring.cached import CachedScorer
from qsharp_core.errors import GuidanceError
from qsharp_core.policy import Candidates, GuidedStep
from qsharp_core.vllm_plugin import cores, loading
from qsharp_core.vllm_plugin.audit import Auditor
from qsharp_core.vllm_plugin.memory import keep_freed_memory
from qsharp_core.vllm_plugin.params import GuidanceParams
from qsharp_core.vllm_plugin.plan import BatchPlan, Budgets
from qsharp_core.vllm_plugin.ranks import Ranks
from qsharp_core.vllm_plugin.report import Reporter, StepOutcome
from qsharp_core.vllm_plugin.rows import LogitsRow, TrackedRequest
from qsharp_core.vllm_plugin.settings import EngineSettings, refuse_unsupported
from qsharp_core.vllm_plugin.spending import Spending
from qsharp_core.vllm_plugin.tilts import CriticTilts

logger = logging.getLogger("vllm.qsharp")  # below vLLM's own logger, whose handler formats it


class StepGuide:
    """Guides the steps of one worker with its critics.

    Of several tensor-parallel ranks the first has the critics; the others follow it (`ranks`).

    Args:
        vllm_config: vLLM's configuration; ours is in its `additional_config`.
        device: of the logits.

    Raises:
        ConfigError: vLLM's configuration has something that guidance does not support, or ours is wrong.
        CriticError: a critic cannot be loaded.
    """

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        refuse_unsupported(vllm_config)
        if device.type == "cpu":
            keep_freed_memory()
        self.device = device
        self.ranks = Ranks.of(vllm_config, device)
        self.registry = loading.load_registry(vllm_config, device) if self.ranks.leads else loading.empty_registry()
        rate = EngineSettings.of(vllm_config).audit_rate
        self.auditor = Auditor(rate, device, cores.audit_executor(vllm_config, device))
        engine: int = vllm_config.parallel_config.data_parallel_index
        self.reporter = Reporter(device, self.registry, self.auditor, engine)
        self._spending = Spending(vllm_config.scheduler_config.max_num_seqs, device)
        self._tilts = CriticTilts(device, self.auditor, self.fail)
        self._plan: BatchPlan | None = None
        self._outcome: StepOutcome | None = None

    # -- requests

    def open(self, sampling_params: Any, *, resumed: bool = False) -> TrackedRequest | None:
        """A request enters the batch; None if it is neither guided nor observed.

        Values were checked at admission. The critic's name was not, unless a front end of ours resolved it: a request
        that names an unknown one counts as failed. Where a front end of ours listens, all that it guides has an id of
        its own making, and whatever has none came past it.

        Args:
            sampling_params: `vllm.SamplingParams`.
            resumed: whether it has sampled before, and was preempted.
        """
        params = GuidanceParams.from_extra_args(sampling_params.extra_args)
        if params is None:
            return None
        if params.id is None and self.reporter.sender.connected:
            logger.error("a request's guidance did not come from the server's front end, and is ignored")
            return None
        request = TrackedRequest(params, sampling_params.temperature)
        if params.kl_total is not None:
            assert params.id is not None
            request.account = self._spending.open(params.id, resumed=resumed)
        if params.eta is not None and self.ranks.leads:
            try:
                request.critic = self.registry.resolve(params.critic)
                request.sequence = request.critic.open()
            except GuidanceError as error:
                self.fail(request, "unknown_critic", str(error))
        return request

    def close(self, request: TrackedRequest) -> None:
        """A request leaves the batch: it has finished, or was aborted or preempted."""
        self._plan = None  # it holds the critic
        if request.account:
            assert request.params.id is not None
            self._spending.close(request.params.id)
        critic, sequence = request.critic, request.sequence
        request.critic = request.sequence = None
        if critic is not None:
            critic.close(sequence)
            self.registry.collect()

    def fail(self, request: TrackedRequest, reason: str, detail: str) -> None:
        """Guides a request no more, and has it reported as failed.

        Args:
            request: goes on unguided; a front end that reads the reports ends it with an error.
            reason: a metric's label.
            detail: for the log, which is all there is where no front end listens.
        """
        request.failure = reason
        self._plan = None
        logger.error("guidance failed (%s): %s; the request goes on unguided", reason, detail)

    # -- the step

    def catch_up(self, rows: list[LogitsRow]) -> None:
        """Lets critics on CPUs run what they lack of these rows' histories, beside the reference's forward pass.

        For a runner that knows all tokens before it runs the reference.
        """
        by_scorer: dict[CachedScorer, list[LogitsRow]] = {}
        for row in rows:
            critic = row.request.guiding_critic
            scorer = critic.cached_scorer if critic is not None else None
            if scorer is not None and row.length <= scorer.capacity:
                by_scorer.setdefault(scorer, []).append(row)
        for scorer, scorer_rows in by_scorer.items():
            sequences: list[CachedSequence] = [row.request.sequence for row in scorer_rows]  # type: ignore[misc]
            scorer.catch_up(sequences, [row.length for row in scorer_rows], [row.read for row in scorer_rows])

    def apply(
        self, logits: Tensor, rows: list[LogitsRow], hidden: Callable[[], Tensor], last_R: Tensor | None = None
    ) -> None:
        """Tilts the logits of these rows in place.

        Args:
            logits: all logits of the step, `[B, V]`, float32.
            rows: the rows of guided and observed requests, R of the B.
            hidden: returns the hidden states `[B, D]` that the logits were computed from.
            last_R: the last token of each of `rows`, int64, on the device, for critics that run in fixed shapes and so
                do not wait for the device; None where the host knows all histories.
        """
        self._outcome = None
        if not rows:
            return
        self._tilts.note_broken()
        plan = self._plan_of(rows)
        # Copies of the whole vocabulary are expensive: where all rows are ours, none is made here.
        logits_RV = logits if plan.covers(logits) else logits.index_select(0, plan.index_R)
        candidates = policy.select_candidates(logits_RV, plan.softmax_temperature_R, plan.least_RK)
        started = time.perf_counter()
        tilt_RK, broken_R, outputs = self._tilts.ask(plan, rows, candidates, hidden, last_R)
        seconds = time.perf_counter() - started
        bounds_R2 = plan.bounds_R2
        if plan.most_candidates:
            candidates, tilt_RK, bounds_R2 = self.ranks.agree(candidates, tilt_RK, bounds_R2)
        guided = policy.guide(candidates, tilt_RK, plan.eta_R, plan.keep_R, *bounds_R2.unbind(1))
        strength_R = None
        if plan.budget is not None:
            guided, strength_R = self._limit(plan.budget, [row.length for row in rows], candidates, guided)
        if plan.most_candidates:
            policy.guide_logits_(logits_RV, plan.temperature_R, candidates, guided)
            if logits_RV is not logits:
                logits.index_copy_(0, plan.index_R, logits_RV)
        # On an accelerator the number of scored candidates is on the device; there it is that of the asked ones.
        scored = int(candidates.mask_RK.sum()) if self.device.type == "cpu" else plan.candidates_asked
        self._outcome = StepOutcome(
            rows, plan.index_R, candidates, guided, strength_R, broken_R, outputs, plan.failures, seconds, scored
        )

    def report(self, sampled: Tensor) -> None:
        """Reports the step of the last `apply`, now that the tokens of all logits are sampled: `[B]` or `[B, 1]`."""
        outcome, self._outcome = self._outcome, None
        if outcome is not None:
            self.reporter.report(outcome, sampled)

    def _limit(
        self, budgets: Budgets, lengths: list[int], candidates: Candidates, guided: GuidedStep
    ) -> tuple[GuidedStep, Tensor]:
        """Keeps the step within what its rows have left, and notes what it spends; returns the strengths, too."""
        spent_R = self._spending.spent(budgets.account_R, lengths)
        left_R = (budgets.total_R - spent_R).clamp(min=0.0)
        guided, strength_R = budget.clip(candidates, guided, torch.minimum(budgets.token_R, left_R))
        self._spending.note(budgets.account_R, lengths, spent_R + guided.kl_R)
        return guided, strength_R

    def _plan_of(self, rows: list[LogitsRow]) -> BatchPlan:
        """The plan of the last step, if the requests are the same and none has failed since; else a new one."""
        if self._plan is None or not self._plan.fits(rows):
            self._plan = BatchPlan.of(rows, self.device)
        return self._plan
