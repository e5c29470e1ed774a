"""Per-step reports from the worker to the API process, over a socket.

Each step sends one message, in columns, about the rows of requests with a `qsharp_id`. A row's position is the length
of its history. Positions are absolute: a request that comes back after preemption reports the same positions again, and
the reader keeps the last report of each.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from typing import Any, NamedTuple, Self

import msgspec
import torch
import zmq
from torch import Tensor


class Status(IntEnum):
    """What happened to a row in a step: the critic was not asked, it was asked, or it failed."""

    UNGUIDED = 0
    GUIDED = 1
    FAILED = 2


class AuditResult(msgspec.Struct, array_like=True, frozen=True):
    """The result of scoring a row again without the cache.

    Attributes:
        critic: key of the version.
        error: the largest difference of an output, relative to the largest output of the plain pass, or to 1 where all
            outputs are smaller.
        failed: whether the error is larger than the tolerance.
    """

    critic: str
    error: float
    failed: bool


class CandidateReport(msgspec.Struct, array_like=True, frozen=True):
    """The candidates of a row, the likeliest first, and what the critic said of them.

    Attributes:
        token_ids: there are none where the critic was not asked.
        ref_logprobs: their log-probabilities under the reference.
        outputs: the critic's outputs for each: one score, or a logit for each atom (`qsharp_core.returns`).
    """

    token_ids: list[int]
    ref_logprobs: list[float]
    outputs: list[list[float]]

    @staticmethod
    def packed(mask_K: Tensor, ids_K: Tensor, log_ref_K: Tensor, outputs_KN: Tensor) -> Tensor:
        """A row's candidates as one tensor `[K, 3 + N]`, float64, for one copy to the host."""
        return torch.cat([torch.stack([mask_K.double(), ids_K.double(), log_ref_K.double()], 1), outputs_KN], 1)

    @classmethod
    def of(cls, packed: Tensor) -> Self:
        """The report of what `packed` made, on the host."""
        rows = packed[packed[:, 0] > 0, 1:].tolist()
        return cls([int(row[0]) for row in rows], [row[1] for row in rows], [row[2:] for row in rows])


class StepFacts(msgspec.Struct, array_like=True, kw_only=True):
    """What the host knows of a step. The defaults are those of a report without a step.

    Attributes:
        ids: `qsharp_id` of each row's request.
        positions: number of tokens in each row's history.
        failures: reasons of failed requests, by id. A failure that only the device has seen is not among them.
        critic_seconds: how long the critics were asked.
        scored_candidates: number of candidates that were scored.
        blocks_used: number of cache blocks that requests hold, by critic.
        prefix_tokens: tokens of histories that were new to a critic's cache, since the last report.
        prefix_hits: those of them whose keys and values the cache held already.
        splits: extra passes of critics since the last report, because a step's rows did not fit in their memory.
        audits: results since the last report.
        engine: index of the data-parallel engine; 0 if there is one.
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
    """What the device knows of a step: one tensor `[rows]` per quantity.

    Attributes:
        tokens: ids of the sampled tokens.
        status: `Status` codes.
        kl: `KL(pi || ref)` in nats.
        ref_logprob, logprob: log-probabilities of the sampled token under the reference and under the guided policy.
        value: `V(x)` in units of reward; NaN in rows that were not guided.
        strength: the share of the tilt that was within the budget, from 0 to 1; 1 where nothing was clipped.
    """

    tokens: Tensor
    status: Tensor
    kl: Tensor
    ref_logprob: Tensor
    logprob: Tensor
    value: Tensor
    strength: Tensor

    def packed(self) -> Tensor:
        """All columns as one tensor `[columns, rows]`, for one copy to the host; token ids are exact in float64."""
        return torch.stack([column.double() for column in self])


class StepReport(StepFacts, array_like=True, kw_only=True):
    """The report of a step: `StepFacts`, `Columns` as lists of one entry per row, and the candidates of some rows."""

    tokens: list[int]
    status: list[int]
    kl: list[float]
    ref_logprob: list[float]
    logprob: list[float]
    value: list[float]
    strength: list[float]
    candidates: dict[int, CandidateReport] = {}

    @classmethod
    def of(cls, facts: StepFacts, packed: Tensor, candidates: Mapping[int, Tensor] | None = None) -> "StepReport":
        """The report of a step.

        Args:
            facts: what the host knows.
            packed: `Columns.packed`, on the host. A failed row without a reason in `facts` failed because its critic's
                outputs were not finite: every other reason is known before the step runs.
            candidates: `CandidateReport.packed` by row, on the host; None if no row's are reported.
        """
        columns: dict[str, Any] = dict(zip(Columns._fields, packed.tolist(), strict=True))
        columns |= {name: [int(number) for number in columns[name]] for name in ("tokens", "status")}
        broken = [key for key, code in zip(facts.ids, columns["status"], strict=True) if code == Status.FAILED]
        failures = {**dict.fromkeys(broken, "not_finite"), **facts.failures}
        columns["candidates"] = {row: CandidateReport.of(table) for row, table in (candidates or {}).items()}
        return cls(**{**msgspec.structs.asdict(facts), "failures": failures}, **columns)


class Keys(NamedTuple):
    """What a worker on another host needs to send reports: CurveZMQ keys, as text (Z85).

    They encrypt the reports, and let nobody else send any.

    Attributes:
        server: the receiver's public key.
        public, secret: the senders' keys.
    """

    server: str
    public: str
    secret: str


encoder = msgspec.msgpack.Encoder()
decoder = msgspec.msgpack.Decoder(StepReport)


class Sender:
    """Sends reports to all addresses that it is connected to.

    Args:
        device: of the tensors in the reports. From an accelerator they are copied without waiting, and a thread waits
            for them, so that the step is not delayed.
    """

    def __init__(self, device: torch.device) -> None:
        self._context = zmq.Context()
        self._sockets: dict[str, zmq.Socket] = {}
        self._thread = None if device.type == "cpu" else ThreadPoolExecutor(1, "qsharp-telemetry")

    @property
    def connected(self) -> bool:
        """Whether there is an address to send to."""
        return bool(self._sockets)

    def connect(self, address: str, keys: Keys | None = None) -> None:
        """Sends reports to this ZeroMQ address, too, from now on; with keys where it is a host's."""
        if address in self._sockets:
            return
        socket = self._context.socket(zmq.PUSH)
        socket.setsockopt(zmq.SNDHWM, 0)  # never drop; the reader only appends to lists
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IPV6, 1)
        if keys is not None:
            socket.curve_serverkey, socket.curve_publickey, socket.curve_secretkey = (key.encode() for key in keys)
        socket.connect(address)
        self._sockets[address] = socket

    def send(self, facts: StepFacts, columns: Columns, candidates: Mapping[int, Tensor] | None = None) -> None:
        """Sends the report of a step; `candidates` as in `StepReport.of`, on the device."""
        candidates = candidates or {}
        packed = columns.packed()
        if self._thread is None:
            self._finish(facts, packed, candidates)
        else:
            copied = packed.to("cpu", non_blocking=True)
            candidates = {row: table.to("cpu", non_blocking=True) for row, table in candidates.items()}
            event = torch.cuda.Event()
            event.record()
            self._thread.submit(self._finish, facts, copied, candidates, event)

    def _finish(
        self,
        facts: StepFacts,
        packed: Tensor,
        candidates: Mapping[int, Tensor],
        event: torch.cuda.Event | None = None,
    ) -> None:
        if event is not None:
            event.synchronize()
        message = encoder.encode(StepReport.of(facts, packed, candidates))
        for socket in self._sockets.values():
            socket.send(message, zmq.NOBLOCK)
