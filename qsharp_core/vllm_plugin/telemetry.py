"""Per-step reports from the worker to the API process, over a local socket.

One message a step, in columns, for the rows somebody asked about (`qsharp_id`). A row's position is the length of its
history: absolute, so a preempted request that comes back reports the same positions again, and the reader keeps the
last word on each.
"""

from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from typing import Any, NamedTuple

import msgspec
import torch
import zmq
from torch import Tensor


class Status(IntEnum):
    """What happened to a row in a step."""

    UNGUIDED = 0
    GUIDED = 1
    FAILED = 2


class AuditResult(msgspec.Struct, array_like=True, frozen=True):
    """A row that was scored again without the cache.

    Attributes:
        critic: the version's key.
        error: the largest difference of an output, relative to the largest output of the plain pass, or to 1 where all
            are smaller.
        failed: whether it is past the tolerance.
    """

    critic: str
    error: float
    failed: bool


class StepFacts(msgspec.Struct, array_like=True, kw_only=True):
    """What is known of a step on the host; of no step by default.

    Attributes:
        ids, positions: of each row.
        failures: maps ids to reasons, where there is one to give.
        prefix_tokens: of histories that were new to a critic's cache, since the last report.
        prefix_hits: those of them whose keys and values were there already.
        splits: how often a critic had to run the rows of a step in one pass more, since the last report.
        audits: what was found since the last report.
        engine: which of the data-parallel engines: 0 where there is one.
    """

    ids: list[int] = []
    positions: list[int] = []
    failures: dict[int, str] = {}
    critic_seconds: float = 0.0
    scored_candidates: int = 0
    blocks_used: dict[str, int] = {}
    prefix_tokens: int = 0
    prefix_hits: int = 0
    splits: int = 0
    audits: list[AuditResult] = []
    engine: int = 0


class Columns(NamedTuple):
    """What is known of each row of a step on the device: `[rows]` each, token ids and `Status` codes among them.

    KL in nats, log-probabilities of the sampled token under the reference and the guided policy, value in units of
    reward and NaN for rows that were not guided.
    """

    tokens: Tensor
    status: Tensor
    kl: Tensor
    ref_logprob: Tensor
    logprob: Tensor
    value: Tensor

    def packed(self) -> Tensor:
        """`[columns, rows]` as one tensor, which is one copy to the host: float64, in which token ids are exact."""
        return torch.stack([column.double() for column in self])


class StepReport(StepFacts, array_like=True, kw_only=True):
    """A step's rows, in columns of equal length: `StepFacts`, and `Columns` as lists."""

    tokens: list[int]
    status: list[int]
    kl: list[float]
    ref_logprob: list[float]
    logprob: list[float]
    value: list[float]

    @classmethod
    def of(cls, facts: StepFacts, packed: Tensor) -> "StepReport":
        """From `Columns.packed`, on the host."""
        columns: dict[str, Any] = dict(zip(Columns._fields, packed.tolist(), strict=True))
        columns |= {name: [int(number) for number in columns[name]] for name in ("tokens", "status")}
        return cls(**msgspec.structs.asdict(facts), **columns)


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

    def send(self, facts: StepFacts, columns: Columns) -> None:
        """Sends a report of these."""
        packed = columns.packed()
        if self._thread is None:
            self._finish(facts, packed)
        else:
            copied = packed.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._thread.submit(self._finish, facts, copied, event)

    def _finish(self, facts: StepFacts, packed: Tensor, event: torch.cuda.Event | None = None) -> None:
        if event is not None:
            event.synchronize()
        report = StepReport.of(facts, packed)
        for key, code in zip(report.ids, report.status, strict=True):
            if code == Status.FAILED:
                report.failures.setdefault(key, "not_finite")  # every other reason is known before the step runs
        message = encoder.encode(report)
        for socket in self._sockets.values():
            socket.send(message, zmq.NOBLOCK)
