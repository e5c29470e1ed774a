"""Receives the workers' step reports, and joins them with the choices that wait for them.

A report names the position of its token in the whole sequence, so a choice knows which positions it needs. A request
that was preempted reports some positions again; the last report of a position counts. A report of another token than
the choice has at that position is stale: vLLM has thrown that token away.
"""

import asyncio
import logging
import secrets
import tempfile
from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import zmq
import zmq.asyncio
from vllm.utils.network_utils import get_tcp_uri
from zmq.auth.asyncio import AsyncioAuthenticator

from qsharp_core.errors import CriticFailure, GuidanceError
from qsharp_core.vllm_plugin.telemetry import CandidateReport, Keys, Status, StepReport, decoder

logger = logging.getLogger("vllm.qsharp")  # below vLLM's own logger, whose handler formats it

NO_TOKEN = "no_token"  # a reason: what was sampled is a token that cannot be


class TokenReport(NamedTuple):
    """What a worker reported of one token and its step.

    Attributes:
        kl: KL divergence of the guided distribution from the reference's, in nats.
        ref_logprob, logprob: the token's log-probability under the reference and under the guided policy.
        value: `V` of the prefix before the token, in units of reward; NaN where the step was not guided.
        strength: the share of the tilt that was within the budget; 1 where nothing was clipped.
        candidates: of the step; None unless the request asks for them and the critic was asked.
    """

    token: int
    status: Status
    kl: float
    ref_logprob: float
    logprob: float
    value: float
    strength: float = 1.0
    candidates: CandidateReport | None = None

    @property
    def clipped(self) -> bool:
        """Whether the budget held the step back."""
        return self.strength < 1.0


class ReportedSample:
    """One engine request whose steps the workers report; `TelemetryReceiver.register` makes it.

    Attributes:
        id: names the request in reports; it goes to the worker as `qsharp_id`.
        failure: position and reason of the first failed step; None while none has failed.
        on_failure: is called when the first failed step is reported.
    """

    def __init__(self, receiver: "TelemetryReceiver", sample_id: int, on_failure: Callable[[], None] | None) -> None:
        self.id = sample_id
        self.failure: tuple[int, str] | None = None
        self.on_failure = on_failure
        self._receiver = receiver
        self._reports: dict[int, TokenReport] = {}
        self._news = asyncio.Event()

    @property
    def steps(self) -> int:
        """How many of its tokens were reported so far."""
        return len(self._reports)

    def take(self, position: int, report: TokenReport, reason: str | None) -> None:
        """Keeps a report that has arrived.

        Args:
            position: of the token in the whole sequence.
            reason: why the step failed, where it did.
        """
        self._reports[position] = report
        if not isfinite(report.ref_logprob):
            reason = NO_TOKEN
        if self.failure is None and (report.status == Status.FAILED or reason == NO_TOKEN):
            self.failure = (position, reason or "unknown")
            if self.on_failure is not None:
                self.on_failure()
        self._news.set()

    def check(self, length: int | None = None) -> None:
        """Raises an error if a step has failed.

        Args:
            length: only failures at the first `length` positions count; None: all do.

        Raises:
            CriticFailure: the critic failed.
            GuidanceError: the request left no token that can be sampled.
        """
        if self.failure is None or (length is not None and self.failure[0] >= length):
            return
        reason = self.failure[1]
        if reason == NO_TOKEN:
            raise GuidanceError(
                "no token was left to sample: together allowed_token_ids, bad_words, min_tokens, logit_bias and "
                "structured outputs exclude the whole vocabulary"
            )
        raise CriticFailure(f"the critic failed while it guided this request: {reason}", reason)

    async def wait(self, start: int, token_ids: Sequence[int], timeout: float) -> list[TokenReport]:
        """The reports of tokens, in order, as soon as they have arrived.

        Args:
            start: position of the first of these tokens; of a choice's first token it is the length of the prompt.
            token_ids: the tokens.
            timeout: seconds to wait.

        Raises:
            CriticFailure: the critic failed, or reports are missing after `timeout` seconds.
            GuidanceError: see `check`.
        """
        end = start + len(token_ids)
        arrived = 0
        try:
            async with asyncio.timeout(timeout):
                while True:
                    self.check(end)
                    while arrived < len(token_ids) and self._matches(start + arrived, token_ids[arrived]):
                        arrived += 1
                    if arrived == len(token_ids):
                        return [self._reports[position] for position in range(start, end)]
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError as error:
            missing = f"no report of token {arrived + 1} of {len(token_ids)} after {timeout:g} s"
            raise CriticFailure(missing, "telemetry_timeout") from error

    def close(self) -> None:
        """Ends the registration: later reports of this request are dropped."""
        self._receiver.samples.pop(self.id, None)

    def _matches(self, position: int, token: int) -> bool:
        report = self._reports.get(position)
        return report is not None and report.token == token


class TelemetryReceiver:
    """Receives reports and hands them to the samples that are registered.

    Args:
        observe: is called with every report.
        host: the address of this host that workers of other hosts reach; who has the keys may send reports to a port
            there. None: all workers are on this host, and send to a private local socket.

    Attributes:
        address: of the socket, for the workers.
        keys: for the workers; None where the socket is local.
    """

    def __init__(self, observe: Callable[[StepReport], None], host: str | None = None) -> None:
        self.samples: dict[int, ReportedSample] = {}
        self.keys: Keys | None = None
        self._observe = observe
        self._host = host
        self._folder = tempfile.TemporaryDirectory(prefix="qsharp-")
        # Paths of local sockets may have 107 characters.
        self.address = f"ipc://{Path(self._folder.name) / 's'}"
        self._task: asyncio.Task[None] | None = None
        self._authenticator: AsyncioAuthenticator | None = None

    def start(self) -> None:
        """Binds the socket and receives from now on, in the running event loop."""
        context = zmq.asyncio.Context()
        socket: zmq.asyncio.Socket = context.socket(zmq.PULL)
        socket.setsockopt(zmq.RCVHWM, 0)
        if self._host is None:
            socket.bind(self.address)
        else:
            self.keys = self._lock(context, socket)
            socket.setsockopt(zmq.IPV6, 1)
            port = socket.bind_to_random_port(get_tcp_uri(self._host, 0).removesuffix(":0"))
            self.address = get_tcp_uri(self._host, port)
        self._task = asyncio.create_task(self._receive(context, socket), name="qsharp-telemetry")
        self._task.add_done_callback(_log_end)

    async def close(self) -> None:
        """Stops receiving."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._folder.cleanup()

    def register(self, on_failure: Callable[[], None] | None = None) -> ReportedSample:
        """A new sample with an id of its own; whoever asked for it must close it."""
        sample = ReportedSample(self, secrets.randbits(63), on_failure)
        self.samples[sample.id] = sample
        return sample

    def take(self, report: StepReport) -> None:
        """Hands the rows of a step's report to the samples that they belong to."""
        self._observe(report)
        for row, sample_id in enumerate(report.ids):
            sample = self.samples.get(sample_id)
            if sample is not None:
                token_report = TokenReport(
                    report.tokens[row],
                    Status(report.status[row]),
                    report.kl[row],
                    report.ref_logprob[row],
                    report.logprob[row],
                    report.value[row],
                    report.strength[row],
                    report.candidates.get(row),
                )
                sample.take(report.positions[row], token_report, report.failures.get(sample_id))

    def _lock(self, context: zmq.asyncio.Context, socket: zmq.asyncio.Socket) -> Keys:
        """Has the socket take messages only from who has the keys, which are new."""
        (server, secret), (public, secret_of_senders) = zmq.curve_keypair(), zmq.curve_keypair()
        self._authenticator = AsyncioAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(credentials_provider=_Only(public))
        socket.curve_server, socket.curve_publickey, socket.curve_secretkey = True, server, secret
        return Keys(server.decode(), public.decode(), secret_of_senders.decode())

    async def _receive(self, context: zmq.asyncio.Context, socket: zmq.asyncio.Socket) -> None:
        try:
            while True:
                self.take(decoder.decode(await socket.recv()))
        finally:
            if self._authenticator is not None:
                self._authenticator.stop()
            context.destroy(linger=0)


class _Only:
    """Lets in who has this public key."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    def callback(self, domain: str, key: bytes) -> bool:
        """What ZeroMQ's authenticator asks."""
        return key == self._public


def _log_end(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("telemetry has stopped: guided requests will time out", exc_info=error)
