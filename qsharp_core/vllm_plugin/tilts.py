"""Asks the critics of a step for the tilts of its candidates, and keeps a failing critic from harming other requests.

Shapes: R rows, K most candidates of any row, N outputs of a critic for each.
"""

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from qsharp_core import policy
from qsharp_core.critic.scoring.base import Question
from qsharp_core.policy import Candidates
from qsharp_core.transfer import column
from qsharp_core.vllm_plugin.audit import Auditor
from qsharp_core.vllm_plugin.plan import BatchPlan
from qsharp_core.vllm_plugin.registry import LoadedCritic
from qsharp_core.vllm_plugin.rows import LogitsRow, TrackedRequest


class _BrokenRows:
    """Which rows of a step had outputs that were not finite, copied to the host without waiting.

    The copy may be on its way until the next guided step. Meanwhile this holds requests, which let go of their critics
    when they end, and no critics.
    """

    def __init__(self, requests: list[TrackedRequest], broken_R: Tensor) -> None:
        self.requests = requests
        self.broken_R = broken_R.to("cpu", non_blocking=True)
        self._event = None
        if broken_R.device.type != "cpu":
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def done(self) -> bool:
        """Whether the copy has arrived."""
        return self._event is None or self._event.query()


class CriticTilts:
    """Asks critics, row by row of a step.

    Args:
        device: of the logits.
        auditor: is shown what the critics answered.
        fail: called with a request that can no longer be guided, the reason, and details for the log.
    """

    def __init__(
        self, device: torch.device, auditor: Auditor, fail: Callable[[TrackedRequest, str, str], None]
    ) -> None:
        self._device, self._auditor, self._fail = device, auditor, fail
        self._checks: deque[_BrokenRows] = deque()

    def ask(
        self,
        plan: BatchPlan,
        rows: list[LogitsRow],
        candidates: Candidates,
        hidden: Callable[[], Tensor],
        last_R: Tensor | None,
    ) -> tuple[Tensor, Tensor, dict[TrackedRequest, Tensor]]:
        """Asks every critic of the step about the rows that it guides. Rows that fail lose their candidates.

        Args:
            plan: of these rows.
            rows: the rows of the step.
            candidates: their candidates; `mask_RK` is cleared in rows that fail.
            hidden: returns the hidden states `[B, D]` that all logits of the step were computed from.
            last_R: the last token of each row, int64, on the device; None where the host knows all histories.

        Returns:
            Relative tilts `[R, K]`, float64; rows `[R]` whose critic's outputs were not finite, bool; and the outputs
            `[K, N]`, float64, of requests whose candidates are reported.
        """
        outputs: dict[TrackedRequest, Tensor] = {}
        tilt_RK, broken_R = torch.zeros_like(candidates.log_ref_RK), torch.zeros_like(candidates.mask_RK[:, 0])
        # Which rows have candidates is known on the device; where looking there would mean to wait, all are asked.
        has_choice_R = candidates.mask_RK.any(-1).tolist() if last_R is None else [True] * len(rows)
        for critic, members in plan.members:
            asked = [i for i in members if has_choice_R[i]]
            for i in asked:
                if rows[i].length > critic.max_length:
                    self._fail(rows[i].request, "too_long", f"{rows[i].length} tokens, capacity {critic.max_length}")
                    candidates.mask_RK[i] = False
            asked = [i for i in asked if rows[i].length <= critic.max_length]
            if len(asked) == len(rows):
                every = slice(None)  # views, no copies
                tilt_RK, broken_R = self._ask_one(critic, plan, rows, candidates, every, hidden, last_R, outputs)
            elif asked:
                at = column(asked, self._device, torch.int64)
                asked_rows = [rows[i] for i in asked]
                tilt_RK[at], broken_R[at] = self._ask_one(
                    critic, plan, asked_rows, candidates, at, hidden, last_R, outputs
                )
        candidates.mask_RK.logical_and_(~broken_R[:, None])
        if plan.members:
            self._checks.append(_BrokenRows(plan.requests, broken_R))
        if self._device.type == "cpu":
            self.note_broken()
        return tilt_RK, broken_R, outputs

    def note_broken(self) -> None:
        """Fails the requests whose critic's outputs were not finite, as far as the device has told."""
        while self._checks and self._checks[0].done:
            check = self._checks.popleft()
            for request, broken in zip(check.requests, check.broken_R.tolist(), strict=True):
                if not broken or request.failure is not None:
                    continue
                self._fail(request, "not_finite", "the critic's outputs are not finite")
                scorer = request.critic.cached_scorer if request.critic is not None else None
                if scorer is not None and request.sequence is not None:
                    scorer.discard(request.sequence)

    def _ask_one(
        self,
        critic: LoadedCritic,
        plan: BatchPlan,
        rows: list[LogitsRow],
        candidates: Candidates,
        at: Tensor | slice,
        hidden: Callable[[], Tensor],
        last_R: Tensor | None,
        reported: dict[TrackedRequest, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Asks one critic about some rows of the step.

        Args:
            critic: guides all of `rows`.
            plan, candidates, hidden, last_R: of the whole step, as in `ask`.
            rows: the rows to ask about.
            at: their indices in the step.
            reported: is given the outputs of requests whose candidates are reported.

        Returns:
            Their tilts and whether they broke, as `ask` returns them.
        """
        ids, mask = candidates.ids_RK[at], candidates.mask_RK[at]
        question = Question(
            ids_RK=ids,
            log_ref_RK=candidates.log_ref_RK[at],
            mask_RK=mask,
            sequences=[row.request.sequence for row in rows if row.request.sequence is not None],
            lengths=[row.length for row in rows],
            read=lambda i: rows[i].read(),
            last_R=None if last_R is None else last_R[at],
            hidden=lambda: hidden()[plan.index_R[at]],
        )
        try:
            outputs = critic.scorer.answer(question)
        except Exception as error:  # whatever a backbone raises: other requests and the engine go on
            for row in rows:
                self._fail(row.request, "exception", f"{type(error).__name__}: {error}")
            candidates.mask_RK[at] = False
            return torch.zeros_like(ids, dtype=torch.float64), torch.zeros_like(mask[:, 0])
        self._auditor.watch(critic, rows, ids, mask, outputs)
        if plan.reports_candidates:
            for i, row in enumerate(rows):
                if row.request.params.report_candidates:
                    reported[row.request] = outputs[i].double()
        broken_R = ~(outputs.isfinite().all(-1) | ~mask).all(-1)
        cd_R = None if plan.cd_R is None else plan.cd_R[at]
        return policy.relative_tilts(critic.scorer.distribution, outputs.double(), plan.eta_R[at], cd_R), broken_R
