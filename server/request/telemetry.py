"""The worker's step reports, received and joined with the choices that wait for them.

A report's position is absolute (the length of the history), so a choice knows which positions it needs; a request that
was preempted reports some again, and the last word on a position counts. A record whose token is not the choice's own
is stale: its sample was thrown away.
"""

import asyncio
import logging
import secrets
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import zmq
import zmq.asyncio

from qsharp_core.errors import CriticFailure
from qsharp_core.vllm_plugin.telemetry import Status, StepReport, decoder

logger = logging.getLogger("vllm.qsharp")  # below vLLM's own logger, whose handler formats it


class Record(NamedTuple):
    """What was reported of one token; `value` is NaN where the step was not guided."""

    token: int
    status: Status
    kl: float
    ref_logprob: float
    logprob: float
    value: float


class Sample:
    """One engine request that is reported on under `id`. Made by `TelemetryReceiver.register`.

    Attributes:
        id: for `qsharp_id`.
        failure: the first step that failed, as (position, reason).
        on_failure: called when that is known.
    """

    def __init__(self, receiver: "TelemetryReceiver", sample_id: int, on_failure: Callable[[], None] | None) -> None:
        self.id = sample_id
        self.failure: tuple[int, str] | None = None
        self.on_failure = on_failure
        self._receiver = receiver
        self._records: dict[int, Record] = {}
        self._news = asyncio.Event()

    def take(self, position: int, record: Record, reason: str | None) -> None:
        """A record has arrived."""
        self._records[position] = record
        if record.status == Status.FAILED and self.failure is None:
            self.failure = (position, reason or "unknown")
            if self.on_failure is not None:
                self.on_failure()
        self._news.set()

    def check(self, length: int | None = None) -> None:
        """Raises `CriticFailure` if a step failed; only steps of the first `length` positions count."""
        if self.failure is not None and (length is None or self.failure[0] < length):
            reason = self.failure[1]
            raise CriticFailure(f"the critic failed while it guided this request: {reason}", reason)

    async def wait(self, prompt_length: int, token_ids: Sequence[int], timeout: float) -> list[Record]:
        """The records of all tokens of the choice, as soon as they are there.

        Raises:
            CriticFailure: one of the steps failed, or reports are missing after `timeout` seconds.
        """
        end = prompt_length + len(token_ids)
        found = 0
        try:
            async with asyncio.timeout(timeout):
                while True:
                    self.check(end)
                    while found < len(token_ids) and self._matches(prompt_length + found, token_ids[found]):
                        found += 1
                    if found == len(token_ids):
                        return [self._records[position] for position in range(prompt_length, end)]
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError as error:
            missing = f"no report of token {found + 1} of {len(token_ids)} after {timeout:g} s"
            raise CriticFailure(missing, "telemetry_timeout") from error

    def close(self) -> None:
        """No more records are wanted."""
        self._receiver.samples.pop(self.id, None)

    def _matches(self, position: int, token: int) -> bool:
        record = self._records.get(position)
        return record is not None and record.token == token


class TelemetryReceiver:
    """Receives reports on a private local socket, and keeps those that somebody registered for.

    Args:
        observe: is shown every report.
    """

    def __init__(self, observe: Callable[[StepReport], None]) -> None:
        self.samples: dict[int, Sample] = {}
        self._observe = observe
        self._folder = tempfile.TemporaryDirectory(prefix="qsharp-")
        # Paths of local sockets may have 107 characters.
        self.address = f"ipc://{Path(self._folder.name) / 's'}"
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Binds the socket and receives from now on, in the running event loop."""
        context = zmq.asyncio.Context()
        socket: zmq.asyncio.Socket = context.socket(zmq.PULL)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.bind(self.address)
        self._task = asyncio.create_task(self._receive(context, socket), name="qsharp-telemetry")
        self._task.add_done_callback(_log_end)

    async def close(self) -> None:
        """Stops receiving."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._folder.cleanup()

    def register(self, on_failure: Callable[[], None] | None = None) -> Sample:
        """A sample with an id of its own; to be closed."""
        sample = Sample(self, secrets.randbits(63), on_failure)
        self.samples[sample.id] = sample
        return sample

    def take(self, report: StepReport) -> None:
        """Hands a report's rows to their samples."""
        self._observe(report)
        for row, sample_id in enumerate(report.ids):
            sample = self.samples.get(sample_id)
            if sample is not None:
                record = Record(
                    report.tokens[row],
                    Status(report.status[row]),
                    report.kl[row],
                    report.ref_logprob[row],
                    report.logprob[row],
                    report.value[row],
                )
                sample.take(report.positions[row], record, report.failures.get(sample_id))

    async def _receive(self, context: zmq.asyncio.Context, socket: zmq.asyncio.Socket) -> None:
        try:
            while True:
                self.take(decoder.decode(await socket.recv()))
        finally:
            context.destroy(linger=0)


def _log_end(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("telemetry has stopped: guided requests will time out", exc_info=error)
