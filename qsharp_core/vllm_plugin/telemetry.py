"""Per-step reports from the worker to the API process, over a local socket.

One message a step, in columns, for the rows somebody asked about (`qsharp_id`). A row's position is the length of its
history: absolute, so a preempted request that comes back reports the same positions again, and the reader keeps the
last word on each.
"""

from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum

import msgspec
import torch
import zmq
from torch import Tensor


class Status(IntEnum):
    """What happened to a row in a step."""

    UNGUIDED = 0
    GUIDED = 1
    FAILED = 2


class StepReport(msgspec.Struct, array_like=True):
    """A step's rows, in columns of equal length; `failures` maps ids to reasons, where there is one to give."""

    ids: list[int]
    positions: list[int]
    tokens: list[int]
    status: list[int]
    kl: list[float]
    ref_logprob: list[float]
    logprob: list[float]
    value: list[float]  # NaN for rows that were not guided
    failures: dict[int, str]
    critic_seconds: float
    scored_candidates: int
    blocks_used: dict[str, int]
    prefix_tokens: int  # of histories that were new to a critic's cache, since the last report
    prefix_hits: int  # those of them whose keys and values were there already
    engine: int  # which of the data-parallel engines: 0 where there is one


encoder = msgspec.msgpack.Encoder()
decoder = msgspec.msgpack.Decoder(StepReport)


class Sender:
    """Sends reports to whoever has connected; drops them while nobody has.

    Args:
        device: of the tensors in the reports. On an accelerator they are copied aside and awaited in a thread, so that
            the step is not held up.
    """

    def __init__(self, device: torch.device) -> None:
        self._context = zmq.Context()
        self._sockets: dict[str, zmq.Socket] = {}
        self._thread = None if device.type == "cpu" else ThreadPoolExecutor(1, "qsharp-telemetry")

    @property
    def connected(self) -> bool:
        return bool(self._sockets)

    def connect(self, address: str) -> None:
        """Also sends to this ZeroMQ address from now on."""
        if address in self._sockets:
            return
        socket = self._context.socket(zmq.PUSH)
        socket.setsockopt(zmq.SNDHWM, 0)  # never drop; the reader is local and only appends to lists
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(address)
        self._sockets[address] = socket

    def send(self, report: StepReport, columns: Tensor) -> None:
        """Completes `report` with `columns` and sends it.

        Args:
            report: with its host-side fields filled in.
            columns: `[6, rows]` float64: token, kl, ref_logprob, logprob, value, status.
        """
        if self._thread is None:
            self._finish(report, columns)
        else:
            copied = columns.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._thread.submit(self._finish, report, copied, event)

    def _finish(self, report: StepReport, columns: Tensor, event: torch.cuda.Event | None = None) -> None:
        if event is not None:
            event.synchronize()
        tokens, report.kl, report.ref_logprob, report.logprob, report.value, status = columns.tolist()
        report.tokens = [int(token) for token in tokens]
        report.status = [int(code) for code in status]
        for key, code in zip(report.ids, report.status, strict=True):
            if code == Status.FAILED:
                report.failures.setdefault(key, "not_finite")  # every other reason is known before the step runs
        message = encoder.encode(report)
        for socket in self._sockets.values():
            socket.send(message, zmq.NOBLOCK)
