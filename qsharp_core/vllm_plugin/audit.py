"""The worker checks itself: a random share of guided rows is scored again without the cache, and compared.

A critic whose cache is wrong does not crash: it guides badly. Rows are therefore drawn while requests are served, and a
thread scores them again by a plain forward pass, beside the steps. If the scores differ by more than the tolerance, the
critic forgets its cache, which makes it right again, and the row is logged in full.
"""

import logging
import math
import random
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from qsharp_core.critic.scoring.cached import CachedScorer
from qsharp_core.vllm_plugin.registry import LoadedCritic
from qsharp_core.vllm_plugin.rows import LogitsRow
from qsharp_core.vllm_plugin.telemetry import AuditResult

# The error of right scores stays far below (docs/decisions.md); that of a row with a wrong slot is mostly above.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
# Rows of more tokens are drawn more rarely, so that audits cost about the same whatever the lengths of rows.
USUAL_TOKENS = 512
# Rows of more tokens are never drawn: the plain pass needs memory for every pair of tokens.
MOST_TOKENS = 8192
# At most so many rows wait to be scored again; further ones are not audited.
MOST_WAITING = 4
WORST = 10.0  # reported for an error that is larger or not a number

logger = logging.getLogger("vllm.qsharp")  # below vLLM's own logger, whose handler formats it


@dataclass
class _Case:
    """A row as it was scored, on the critic's device.

    Shapes: K candidates, N outputs per candidate.
    """

    critic: str
    scorer: CachedScorer
    history: list[int] | Tensor
    ids_K: Tensor
    mask_K: Tensor
    outputs_KN: Tensor
    scored: "torch.cuda.Event | None" = None


class Auditor:
    """Draws rows, has them scored again, and keeps the results until they are taken.

    Args:
        rate: the share of guided rows that is drawn, 0 to 1.
        device: of the critics.
        executor: one thread, which should take little time from the steps.
    """

    def __init__(self, rate: float, device: torch.device, executor: Executor) -> None:
        self._rate, self._device, self._executor = rate, device, executor
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._results: deque[AuditResult] = deque(maxlen=1000)
        self._room = threading.Semaphore(MOST_WAITING)
        self._until = self._draw()  # rows to pass over before the next one that is drawn

    def watch(
        self, critic: LoadedCritic, rows: Sequence[LogitsRow], ids_RK: Tensor, mask_RK: Tensor, outputs_RKN: Tensor
    ) -> None:
        """Draws some of the rows that a critic has just scored. Does not wait for the device.

        Args:
            critic: a native critic has no cache, and none of its rows is drawn.
            rows: the R rows.
            ids_RK, mask_RK: their K candidates, and which were asked for.
            outputs_RKN: the critic's outputs, N per candidate.
        """
        if critic.cached_scorer is None:
            return
        while self._until < len(rows):
            place = self._until
            self._until += 1 + self._draw()
            length = rows[place].length
            if length > MOST_TOKENS or random.random() * length > USUAL_TOKENS:
                continue
            if not self._room.acquire(blocking=False):
                continue
            keep = rows[place].keep
            history = rows[place].read() if keep is None else keep()
            case = _Case(
                critic.card.key,
                critic.cached_scorer,
                history,
                ids_RK[place].clone(),
                mask_RK[place].clone(),
                outputs_RKN[place].clone(),
            )
            if self._stream is not None:
                case.scored = torch.cuda.Event()
                case.scored.record()
            self._executor.submit(self._audit, case)
        self._until -= len(rows)

    def take_results(self) -> list[AuditResult]:
        """The results since the last call."""
        results = []
        while self._results:
            results.append(self._results.popleft())
        return results

    def _draw(self) -> int:
        """How many rows to pass over before the next one that is drawn, from the geometric distribution."""
        if self._rate >= 1:
            return 0
        if self._rate <= 0:
            return 2**63
        return int(math.log(1 - random.random()) / math.log1p(-self._rate))

    def _audit(self, case: _Case) -> None:
        try:
            with ExitStack() as stack:
                if self._stream is not None and case.scored is not None:
                    stack.enter_context(torch.cuda.stream(self._stream))
                    self._stream.wait_event(case.scored)
                self._compare(case)
        except Exception:  # too little memory, for example: nothing is known about the scores
            logger.warning("a row could not be scored again", exc_info=True)
        finally:
            self._room.release()

    def _compare(self, case: _Case) -> None:
        history = case.history.tolist() if isinstance(case.history, Tensor) else case.history
        candidates: list[int] = case.ids_K[case.mask_K].tolist()
        cached_KN = case.outputs_KN[case.mask_K].double()
        if not candidates or not cached_KN.isfinite().all():
            return  # nothing to compare, or a row that has failed already
        plain_KN = case.scorer.score_uncached(history, candidates).double()
        error = ((cached_KN - plain_KN).abs().max() / plain_KN.abs().max().clamp(min=1.0)).item()
        tolerance = TOLERANCE[case.scorer.dtype]
        result = AuditResult(case.critic, error if error < WORST else WORST, failed=not error <= tolerance)
        if result.failed:
            case.scorer.distrust()
            logger.error(
                "audit of critic %s: cached scores differ from a plain forward pass by %.3g, more than %g; its cache "
                "is forgotten. tokens=%s candidates=%s cached=%s plain=%s",
                result.critic, error, tolerance, history, candidates, cached_KN.tolist(), plain_KN.tolist(),
            )  # fmt: skip
        self._results.append(result)
