"""The worker checks itself: a random share of guided rows is scored again without the cache, and compared.

Guidance is only as good as the critic's cache, and a wrong one does not crash: it guides badly. So rows are drawn while
requests are served, and a thread scores them again by a plain forward pass, off the step's path. Past the tolerance
the engine forgets its cache, which makes it right again, and the case is logged in full.
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
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qsharp_core.critic.engine import CriticEngine
from qsharp_core.vllm_plugin.registry import LoadedCritic
from qsharp_core.vllm_plugin.telemetry import AuditResult

if TYPE_CHECKING:
    from qsharp_core.vllm_plugin.core import Row

# The error of sound scores stays far below (docs/decisions.md), that of a row with a wrong slot mostly above.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
# Rows of more tokens are drawn more rarely, so that an audited row costs about as much whatever its length.
USUAL_TOKENS = 512
# Rows of more tokens are not drawn: the plain pass needs memory for every pair of tokens.
MOST_TOKENS = 8192
# Rows that wait to be scored again; further ones are let go.
MOST_WAITING = 4
WORST = 10.0  # what an error is reported as that is larger, or is not a number

logger = logging.getLogger("vllm.qsharp")  # below vLLM's own logger, whose handler formats it


@dataclass
class _Case:
    """A row as it was scored, on the critic's device."""

    critic: str
    engine: CriticEngine
    history: list[int] | Tensor
    ids_K: Tensor
    mask_K: Tensor
    outputs_KN: Tensor
    scored: "torch.cuda.Event | None" = None


class Auditor:
    """Draws rows, has them scored again, and keeps what was found until it is asked.

    Args:
        rate: the share of guided rows that is drawn, 0 to 1.
        device: of the critics.
        executor: one thread, which shall take little from the steps.
    """

    def __init__(self, rate: float, device: torch.device, executor: Executor) -> None:
        self._rate, self._device, self._executor = rate, device, executor
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._results: deque[AuditResult] = deque(maxlen=1000)
        self._room = threading.Semaphore(MOST_WAITING)
        self._until = self._draw()  # rows before the next that is drawn

    def watch(
        self, critic: LoadedCritic, rows: Sequence["Row"], ids_RK: Tensor, mask_RK: Tensor, outputs_RKN: Tensor
    ) -> None:
        """Rows were scored: draws some of them, where the critic has a cache. Does not wait for the device."""
        if critic.engine is None:
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
                critic.engine,
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
        """What was found since the last time."""
        taken = []
        while self._results:
            taken.append(self._results.popleft())
        return taken

    def _draw(self) -> int:
        """Rows to pass over before the next one that is drawn: geometric."""
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
        except Exception:  # for want of memory, say: nothing is known of the scores
            logger.warning("a row could not be scored again", exc_info=True)
        finally:
            self._room.release()

    def _compare(self, case: _Case) -> None:
        history = case.history.tolist() if isinstance(case.history, Tensor) else case.history
        candidates: list[int] = case.ids_K[case.mask_K].tolist()
        cached_KN = case.outputs_KN[case.mask_K].double()
        if not candidates or not cached_KN.isfinite().all():
            return  # such a row has failed already
        plain_KN = case.engine.score_uncached(history, candidates).double()
        error = ((cached_KN - plain_KN).abs().max() / plain_KN.abs().max().clamp(min=1.0)).item()
        tolerance = TOLERANCE[case.engine.dtype]
        result = AuditResult(case.critic, error if error < WORST else WORST, failed=not error <= tolerance)
        if result.failed:
            case.engine.distrust()
            logger.error(
                "audit of critic %s: cached scores differ from a plain forward pass by %.3g, more than %g; its cache "
                "is forgotten. tokens=%s candidates=%s cached=%s plain=%s",
                result.critic, error, tolerance, history, candidates, cached_KN.tolist(), plain_KN.tolist(),
            )  # fmt: skip
        self._results.append(result)
