"""One guided step over a batch: the same for both of vLLM's model runners.

The adapters (`v1`, `v2`) say which logits rows belong to which request and what the request's tokens are; this asks
the critics, tilts the logits, and reports what was done once the tokens are sampled.

Shapes: R rows (of guided or observed requests only), V vocabulary, K most candidates of any row.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qsharp_core import policy
from qsharp_core.critic.cache import Sequence
from qsharp_core.critic.decode import to_device
from qsharp_core.errors import ConfigError, GuidanceError
from qsharp_core.policy import Candidates, GuidedStep, Method, Tail
from qsharp_core.vllm_plugin import registry
from qsharp_core.vllm_plugin.memory import keep_freed_memory
from qsharp_core.vllm_plugin.params import GuidanceParams
from qsharp_core.vllm_plugin.ranks import Ranks
from qsharp_core.vllm_plugin.registry import LoadedCritic
from qsharp_core.vllm_plugin.telemetry import Sender, Status, StepReport

TAILS = {"floor": Tail.FLOOR, "keep": Tail.KEEP, "drop": Tail.DROP}
METHODS = {"qsharp": Method.QSHARP, "cd": Method.CD}


@dataclass(eq=False)
class Request:
    """A request in the batch that is guided or observed.

    Attributes:
        params: its guidance.
        temperature: as in its sampling parameters.
        critic, sequence: the version it began with and its handle there; None where it is not guided.
        failure: why it can no longer be guided; it is then reported as failed and left to the reader to end.
    """

    params: GuidanceParams
    temperature: float
    critic: LoadedCritic | None = None
    sequence: Sequence | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Row:
    """A logits row of this step.

    Attributes:
        length: tokens before it.
        read: these tokens; where they are on an accelerator this waits for it.
    """

    index: int
    request: Request
    length: int
    read: Callable[[], list[int]]


@dataclass(frozen=True)
class _Step:
    """What is reported when the tokens of the running step are known."""

    rows: list[Row]
    index_R: Tensor
    candidates: Candidates
    guided: GuidedStep
    broken_R: Tensor
    failures: dict[int, str]
    seconds: float
    scored: int


class _Check:
    """Which rows of a step broke, on its way to the host."""

    def __init__(self, rows: list[Row], broken_R: Tensor) -> None:
        self.rows = rows
        self.broken_R = broken_R.to("cpu", non_blocking=True)
        self._event = None
        if broken_R.device.type != "cpu":
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def done(self) -> bool:
        """Whether it has arrived."""
        return self._event is None or self._event.query()


class GuidanceCore:
    """The critics of this worker, and the step.

    Of several tensor-parallel ranks the first has the critics; the others follow it (`vllm_plugin.ranks`).

    Args:
        vllm_config: vLLM's configuration; ours is in its `additional_config`.
        device: of the logits.

    Raises:
        ConfigError: a combination that is not supported, or a critic that cannot be loaded.
    """

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        refuse_unsupported(vllm_config)
        if device.type == "cpu":
            keep_freed_memory()
        self.device = device
        self.ranks = Ranks.of(vllm_config, device)
        self.registry = registry.build(vllm_config, device) if self.ranks.leads else registry.empty()
        self.engine: int = vllm_config.parallel_config.data_parallel_index
        self.sender = Sender(device)
        self._step: _Step | None = None
        self._checks: deque[_Check] = deque()

    # -- requests

    def open(self, sampling_params: Any) -> Request | None:
        """A request enters the batch; None if guidance has nothing to do with it.

        Values were checked at admission. What can still be wrong is the critic's name, where no front end of ours
        resolved it: the request then counts as failed.
        """
        params = GuidanceParams.from_extra_args(sampling_params.extra_args)
        if params is None:
            return None
        request = Request(params, sampling_params.temperature)
        if params.eta is not None and self.ranks.leads:
            try:
                request.critic = self.registry.resolve(params.critic)
                request.sequence = request.critic.open()
            except GuidanceError as error:
                self._fail(request, "unknown_critic", str(error))
        return request

    def close(self, request: Request) -> None:
        """A request leaves the batch (finished, aborted or preempted)."""
        if request.critic is not None and request.sequence is not None:
            request.critic.close(request.sequence)
            request.sequence = None
            self.registry.collect()

    # -- the step

    def apply(self, logits: Tensor, rows: list[Row], last_R: Tensor | None = None) -> None:
        """Tilts the logits of these rows in place: `[B, V]` float32, `rows` a subset of the B.

        Args:
            last_R: the last token of each of the rows, int64, on the device: then a critic with a decoder is asked
                without waiting for the device.
        """
        self._step = None
        if not rows:
            return
        self._note_broken()
        requests = [row.request for row in rows]
        places = [row.index for row in rows]
        index_R = self._column(places, torch.int64)
        # The whole vocabulary is copied no more often than it must: with all rows guided, not here.
        logits_RV = logits if places == list(range(len(logits))) else logits.index_select(0, index_R)
        temperatures = [r.temperature for r in requests]
        temperature_R = self._column(temperatures, torch.float32)
        # Of the parameters alone, and so the same on every rank; who is guided is known where the critics are.
        asked = [r.params.candidates for r in requests if r.params.eta is not None]
        guided = [r.sequence is not None and r.failure is None for r in requests]
        counts = [r.params.candidates if g else 0 for r, g in zip(requests, guided, strict=True)]
        candidates = policy.select_candidates(
            logits_RV,
            None if {*temperatures} <= {0, 1} else temperature_R,
            self._column(counts, torch.int64),
            self._column([r.params.min_prob for r in requests]),
            max([1, *asked]),
        )
        started = time.perf_counter()
        tilt_RK, broken_R = self._tilts(rows, candidates, last_R)
        seconds = time.perf_counter() - started
        range_R2 = self._column([r.critic.card.reward_range if r.critic else (0.0, 1.0) for r in requests])
        if asked:
            candidates, tilt_RK, range_R2 = self.ranks.agree(candidates, tilt_RK, range_R2)
        step = policy.guide(
            candidates,
            tilt_RK,
            self._column([r.params.eta or 1.0 for r in requests]),
            self._column([TAILS[r.params.tail] for r in requests], torch.int64),
            *range_R2.unbind(1),
        )
        if asked:
            policy.guide_logits_(logits_RV, temperature_R, candidates, step)
            if logits_RV is not logits:
                logits.index_copy_(0, index_R, logits_RV)
        failures = {r.params.id: r.failure for r in requests if r.failure is not None and r.params.id is not None}
        scored = int(candidates.mask_RK.sum()) if self.device.type == "cpu" else sum(counts)
        self._step = _Step(rows, index_R, candidates, step, broken_R, failures, seconds, scored)

    def report(self, sampled: Tensor) -> None:
        """Reports the step of the last `apply`, now that its tokens are known: `[B]` or `[B, 1]`."""
        step, self._step = self._step, None
        if step is None or not self.sender.connected:
            return
        tokens_R = sampled.reshape(-1).index_select(0, step.index_R).long()
        log_ref_R, log_pi_R = policy.token_logprobs(step.candidates, step.guided, tokens_R)
        failed_R = step.broken_R | self._column([row.request.failure is not None for row in step.rows], torch.bool)
        status_R = step.candidates.mask_RK.any(-1).double() * Status.GUIDED
        status_R.masked_fill_(failed_R, Status.FAILED)
        columns = torch.stack([tokens_R.double(), step.guided.kl_R, log_ref_R, log_pi_R, step.guided.value_R, status_R])
        observed = [i for i, row in enumerate(step.rows) if row.request.params.id is not None]
        if len(observed) < len(step.rows):
            columns = columns[:, self._column(observed, torch.int64)]
        rows = [step.rows[i] for i in observed]
        pools = {key: critic.engine.blocks for key, critic in self.registry.critics.items()}
        report = StepReport(
            ids=[row.request.params.id or 0 for row in rows],
            positions=[row.length for row in rows],
            tokens=[],
            status=[],
            kl=[],
            ref_logprob=[],
            logprob=[],
            value=[],
            failures=step.failures,
            critic_seconds=step.seconds,
            scored_candidates=step.scored,
            blocks_used={key: blocks.used for key, blocks in pools.items()},
            prefix_tokens=sum(blocks.wanted for blocks in pools.values()),
            prefix_hits=sum(blocks.found for blocks in pools.values()),
            engine=self.engine,
        )
        for blocks in pools.values():
            blocks.wanted = blocks.found = 0
        self.sender.send(report, columns)

    def _tilts(self, rows: list[Row], candidates: Candidates, last_R: Tensor | None) -> tuple[Tensor, Tensor]:
        """Relative tilts `[R, K]`, float64, and rows `[R]` whose critic's outputs are not finite.

        Rows whose critic fails lose their candidates.
        """
        tilt_RK = torch.zeros_like(candidates.log_ref_RK)
        broken_R = torch.zeros_like(candidates.mask_RK[:, 0])
        # Which rows have a choice is known on the device; where looking would mean to wait, all are asked.
        choice_R = candidates.mask_RK.any(-1).tolist() if last_R is None else [True] * len(rows)
        groups: dict[int, tuple[LoadedCritic, list[int]]] = {}
        for i, row in enumerate(rows):
            critic = row.request.critic
            if not choice_R[i] or critic is None or row.request.failure is not None:
                continue
            if row.length > critic.engine.capacity:
                self._fail(row.request, "too_long", f"{row.length} tokens, capacity {critic.engine.capacity}")
                candidates.mask_RK[i] = False
                continue
            groups.setdefault(id(critic), (critic, []))[1].append(i)
        for critic, members in groups.values():
            index = self._column(members, torch.int64)
            of_critic = [rows[i] for i in members]
            last = None if last_R is None or critic.engine.decoder is None else last_R[index]
            tilts, broken = self._tilts_of(critic, of_critic, candidates, index, last)
            tilt_RK[index], broken_R[index] = tilts, broken
            candidates.mask_RK[index] &= ~broken[:, None]
        if groups:
            self._checks.append(_Check(rows, broken_R))
        if self.device.type == "cpu":
            self._note_broken()
        return tilt_RK, broken_R

    def _tilts_of(
        self, critic: LoadedCritic, rows: list[Row], candidates: Candidates, index: Tensor, last_R: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ids, mask = candidates.ids_RK[index], candidates.mask_RK[index]
        sequences: list[Sequence] = [row.request.sequence for row in rows]  # type: ignore[misc]
        try:
            if last_R is None:
                outputs = critic.engine.score(sequences, [row.read() for row in rows], ids, mask)
            else:
                lengths = [row.length for row in rows]
                outputs = critic.engine.score_latest(sequences, lengths, last_R, ids, lambda i: rows[i].read())
        except Exception as error:  # whatever a backbone does, other requests and the engine go on
            for row in rows:
                self._fail(row.request, "exception", f"{type(error).__name__}: {error}")
            candidates.mask_RK[index] = False
            return torch.zeros_like(ids, dtype=torch.float64), torch.zeros_like(mask[:, 0])
        broken_R = ~(outputs.isfinite().all(-1) | ~mask).all(-1)
        outputs = outputs.double()
        eta = self._column([row.request.params.eta or 1.0 for row in rows])[:, None]
        distribution = critic.engine.critic.distribution
        tilts = distribution.relative_tilt(outputs, eta)
        if any(row.request.params.method == "cd" for row in rows):
            cd = self._column([METHODS[row.request.params.method] for row in rows], torch.int64) == Method.CD
            expected = (distribution.mean(outputs) - distribution.reward_range[1]) / eta
            tilts = torch.where(cd[:, None], expected, tilts)
        return tilts, broken_R

    def _note_broken(self) -> None:
        """Marks the requests whose critic's outputs were not finite, as far as the device has got."""
        while self._checks and self._checks[0].done:
            check = self._checks.popleft()
            for row, broken in zip(check.rows, check.broken_R.tolist(), strict=True):
                if broken and row.request.failure is None:
                    self._fail(row.request, "not_finite", "the critic's outputs are not finite")

    def _fail(self, request: Request, reason: str, detail: str) -> None:
        request.failure = reason
        # A front end that listens ends the request with an error; without one the log is all there is.
        _logger().error("guidance failed (%s): %s; the request goes on unguided", reason, detail)

    def _column(self, values: list[Any], dtype: torch.dtype = torch.float64) -> Tensor:
        return to_device(torch.tensor(values, dtype=dtype), self.device)


def refuse_unsupported(vllm_config: Any) -> None:
    """Combinations that are not supported are refused when the engine starts.

    Raises:
        ConfigError
    """
    if vllm_config.speculative_config is not None:
        raise ConfigError("guidance cannot be combined with speculative decoding: start without --speculative-config")
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise ConfigError(
            "guidance does not work with pipeline or prefill context parallelism: use --tensor-parallel-size or "
            "--data-parallel-size instead"
        )


def _logger() -> Any:
    from vllm.logger import init_logger

    return init_logger(__name__)
