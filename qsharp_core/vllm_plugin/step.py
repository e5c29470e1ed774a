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
from qsharp_core.critic.engine import CriticEngine
from qsharp_core.critic.scorer import Question
from qsharp_core.errors import ConfigError, GuidanceError
from qsharp_core.policy import Candidates, GuidedStep, Method, Tail
from qsharp_core.vllm_plugin import cores, registry
from qsharp_core.vllm_plugin.audit import Auditor
from qsharp_core.vllm_plugin.memory import keep_freed_memory
from qsharp_core.vllm_plugin.params import GuidanceParams
from qsharp_core.vllm_plugin.ranks import Ranks
from qsharp_core.vllm_plugin.registry import LoadedCritic
from qsharp_core.vllm_plugin.selection import Selector
from qsharp_core.vllm_plugin.settings import EngineSettings
from qsharp_core.vllm_plugin.telemetry import Columns, Sender, Status, StepFacts

TAILS = {"floor": Tail.FLOOR, "keep": Tail.KEEP, "drop": Tail.DROP}
METHODS = {"qsharp": Method.QSHARP, "cd": Method.CD}


@dataclass(eq=False)
class Request:
    """A request in the batch that is guided or observed.

    Attributes:
        params: its guidance.
        temperature: as in its sampling parameters.
        critic: the version it began with; None where it is not guided.
        sequence: its handle in that critic's cache; None where there is none.
        failure: why it can no longer be guided; it is then reported as failed and left to the reader to end.
    """

    params: GuidanceParams
    temperature: float
    critic: LoadedCritic | None = None
    sequence: Sequence | None = None
    failure: str | None = None


@dataclass(slots=True)
class Row:
    """A logits row of this step.

    Attributes:
        length: tokens before it.
        read: these tokens; where they are on an accelerator this waits for it.
        keep: a copy of them on the accelerator, `[length]`, which does not wait; None where they are on the host.
    """

    index: int
    request: Request
    length: int
    read: Callable[[], list[int]]
    keep: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class _Batch:
    """What of a step follows from its requests alone: made anew when they change, not at every step.

    Attributes:
        requests, places: the rows' requests, and which logits rows are theirs.
        asked: the most candidates that one of them asks for; 0 where none is guided.
        least_RK: see `policy.least_log_ref`; rows that are not or no longer guided have no candidates.
        temperature_R: effective ones, float64.
        softmax_R: the same where one is not 1; else None.
        keep_R: rows whose tail keeps its mass.
        cd_R: which rows tilt as Controlled Decoding does; None where none does.
        bounds_R2: each row's relative tilt of the tail, where it does not keep its mass, and greatest reward.
        members: the rows that each critic guides.
    """

    requests: list[Request]
    places: list[int]
    index_R: Tensor
    asked: int
    scored: int
    least_RK: Tensor
    temperature_R: Tensor
    softmax_R: Tensor | None
    eta_R: Tensor
    keep_R: Tensor
    cd_R: Tensor | None
    bounds_R2: Tensor
    members: list[tuple[LoadedCritic, list[int]]]

    def covers(self, logits: Tensor) -> bool:
        """Whether the rows are all of the logits'."""
        return self.places == list(range(len(logits)))


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
    """Which rows of a step broke, on its way to the host.

    It may be on its way until the next guided step: it holds requests, which let go of their critics at their end.
    """

    def __init__(self, requests: list[Request], broken_R: Tensor) -> None:
        self.requests = requests
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
        rate = EngineSettings.of(vllm_config).audit_rate
        self.auditor = Auditor(rate, device, cores.spare(vllm_config, device))
        self.selector = Selector(cores.beside(vllm_config) if device.type == "cpu" else None)
        self._batch: _Batch | None = None
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
                self.fail(request, "unknown_critic", str(error))
        return request

    def close(self, request: Request) -> None:
        """A request leaves the batch (finished, aborted or preempted)."""
        self._batch = None  # it holds the critic
        critic, sequence = request.critic, request.sequence
        request.critic = request.sequence = None
        if critic is not None:
            critic.close(sequence)
            self.registry.collect()

    def fail(self, request: Request, reason: str, detail: str) -> None:
        """Guides a request no more, and has it reported as failed."""
        request.failure = reason
        self._batch = None
        # A front end that listens ends the request with an error; without one the log is all there is.
        _logger().error("guidance failed (%s): %s; the request goes on unguided", reason, detail)

    # -- the step

    def catch_up(self, rows: list[Row]) -> None:
        """Has critics on CPUs run what they lack of these rows' histories, beside the reference's forward pass.

        For a runner that knows all tokens before it runs the reference.
        """
        asking: dict[CriticEngine, list[Row]] = {}
        for row in rows:
            engine = row.request.critic.engine if row.request.critic is not None else None
            if engine is not None and row.request.failure is None and row.length <= engine.capacity:
                asking.setdefault(engine, []).append(row)
        for engine, own in asking.items():
            sequences: list[Sequence] = [row.request.sequence for row in own]  # type: ignore[misc]
            engine.catch_up(sequences, [row.length for row in own], [row.read for row in own])

    def apply(
        self, logits: Tensor, rows: list[Row], hidden: Callable[[], Tensor], last_R: Tensor | None = None
    ) -> None:
        """Tilts the logits of these rows in place: `[B, V]` float32, `rows` a subset of the B.

        Args:
            hidden: the hidden states `[B, D]` that the logits were computed from.
            last_R: the last token of each of the rows, int64, on the device: then a critic with a decoder is asked
                without waiting for the device.
        """
        self._step = None
        if not rows:
            return
        self._note_broken()
        batch = self._batch_of(rows)
        # The whole vocabulary is copied no more often than it must: with all rows guided, not here.
        logits_RV = logits if batch.covers(logits) else logits.index_select(0, batch.index_R)
        candidates = self.selector.select(logits_RV, batch.softmax_R, batch.least_RK)
        started = time.perf_counter()
        tilt_RK, broken_R = self._tilts(batch, rows, candidates, hidden, last_R)
        seconds = time.perf_counter() - started
        bounds_R2 = batch.bounds_R2
        if batch.asked:
            candidates, tilt_RK, bounds_R2 = self.ranks.agree(candidates, tilt_RK, bounds_R2)
        step = policy.guide(candidates, tilt_RK, batch.eta_R, batch.keep_R, *bounds_R2.unbind(1))
        if batch.asked:
            policy.guide_logits_(logits_RV, batch.temperature_R, candidates, step)
            if logits_RV is not logits:
                logits.index_copy_(0, batch.index_R, logits_RV)
        failures = {r.params.id: r.failure for r in batch.requests if r.failure is not None and r.params.id is not None}
        scored = int(candidates.mask_RK.sum()) if self.device.type == "cpu" else batch.scored
        self._step = _Step(rows, batch.index_R, candidates, step, broken_R, failures, seconds, scored)

    def report(self, sampled: Tensor) -> None:
        """Reports the step of the last `apply`, now that its tokens are known: `[B]` or `[B, 1]`."""
        step, self._step = self._step, None
        if step is None or not self.sender.connected:
            return
        tokens_R = sampled.reshape(-1).index_select(0, step.index_R).long()
        log_ref_R, log_pi_R = policy.token_logprobs(step.candidates, step.guided, tokens_R)
        failed_R = step.broken_R | self._column([row.request.failure is not None for row in step.rows], torch.bool)
        status_R = step.candidates.mask_RK.any(-1).long() * Status.GUIDED
        status_R.masked_fill_(failed_R, Status.FAILED)
        columns = Columns(tokens_R, status_R, step.guided.kl_R, log_ref_R, log_pi_R, step.guided.value_R)
        observed = [i for i, row in enumerate(step.rows) if row.request.params.id is not None]
        if len(observed) < len(step.rows):
            at = self._column(observed, torch.int64)
            columns = Columns(*(column[at] for column in columns))
        self.sender.send(self._facts([step.rows[i] for i in observed], step), columns)

    def report_audits(self) -> None:
        """Reports what audits have found, though there is no step to report."""
        if self.sender.connected and (audits := self.auditor.take_results()):
            none = torch.empty(0, device=self.device)
            columns = Columns(none, none, none, none, none, none)
            self.sender.send(StepFacts(audits=audits, engine=self.engine), columns)

    def _facts(self, rows: list[Row], step: _Step) -> StepFacts:
        engines = {key: critic.engine for key, critic in self.registry.critics.items() if critic.engine is not None}
        for engine in engines.values():
            engine.wait()  # what it counts is read here
        counts = [engine.take_counts() for engine in engines.values()]
        return StepFacts(
            ids=[row.request.params.id or 0 for row in rows],
            positions=[row.length for row in rows],
            failures=step.failures,
            critic_seconds=step.seconds,
            scored_candidates=step.scored,
            blocks_used={key: engine.blocks.used for key, engine in engines.items()},
            prefix_tokens=sum(count.prefix_tokens for count in counts),
            prefix_hits=sum(count.prefix_hits for count in counts),
            splits=sum(count.splits for count in counts),
            audits=self.auditor.take_results(),
            engine=self.engine,
        )

    def _batch_of(self, rows: list[Row]) -> _Batch:
        """The last step's, if the requests are the same and none has failed since."""
        requests, places = [row.request for row in rows], [row.index for row in rows]
        batch = self._batch
        if batch is not None and batch.requests == requests and batch.places == places:
            return batch
        params = [r.params for r in requests]
        temperatures = [r.temperature for r in requests]
        # Of the parameters alone, and so the same on every rank; who is guided is known where the critics are.
        asked = [p.candidates for p in params if p.eta is not None]
        counts = [r.params.candidates if r.critic is not None and r.failure is None else 0 for r in requests]
        members: dict[int, tuple[LoadedCritic, list[int]]] = {}
        for i, request in enumerate(requests):
            if request.critic is not None and request.failure is None:
                members.setdefault(id(request.critic), (request.critic, []))[1].append(i)
        methods = [METHODS[p.method] for p in params]
        least_RK = policy.least_log_ref(counts, [p.min_prob for p in params], max(asked, default=1))
        temperature_R = policy.effective_temperature(self._column(temperatures))
        tails = [TAILS[p.tail] for p in params]
        ranges = [r.critic.card.reward_range if r.critic else (0.0, 1.0) for r in requests]
        bounds = [
            (policy.tail_tilt(tail, p.eta or 1.0, between), between[1])
            for tail, p, between in zip(tails, params, ranges, strict=True)
        ]
        self._batch = _Batch(
            requests=requests,
            places=places,
            index_R=self._column(places, torch.int64),
            asked=max(asked, default=0),
            scored=sum(counts),
            least_RK=to_device(least_RK, self.device),
            temperature_R=temperature_R,
            softmax_R=None if {*temperatures} <= {0, 1} else temperature_R,
            eta_R=self._column([p.eta or 1.0 for p in params]),
            keep_R=self._column([tail == Tail.KEEP for tail in tails], torch.bool),
            cd_R=self._column([m == Method.CD for m in methods], torch.bool) if Method.CD in methods else None,
            bounds_R2=self._column(bounds),
            members=[*members.values()],
        )
        return self._batch

    def _tilts(
        self,
        batch: _Batch,
        rows: list[Row],
        candidates: Candidates,
        hidden: Callable[[], Tensor],
        last_R: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Relative tilts `[R, K]`, float64, and rows `[R]` whose critic's outputs are not finite.

        Rows whose critic fails lose their candidates.
        """
        tilt_RK, broken_R = torch.zeros_like(candidates.log_ref_RK), torch.zeros_like(candidates.mask_RK[:, 0])
        # Which rows have a choice is known on the device; where looking would mean to wait, all are asked.
        choice_R = candidates.mask_RK.any(-1).tolist() if last_R is None else [True] * len(rows)
        for critic, members in batch.members:
            asking = []
            for i in members:
                if choice_R[i] and rows[i].length > critic.max_length:
                    self.fail(rows[i].request, "too_long", f"{rows[i].length} tokens, capacity {critic.max_length}")
                    candidates.mask_RK[i] = False
                elif choice_R[i]:
                    asking.append(i)
            if len(asking) == len(rows):
                every = slice(None)  # views do
                tilt_RK, broken_R = self._tilts_of(critic, rows, batch, candidates, every, hidden, last_R)
            elif asking:
                at = self._column(asking, torch.int64)
                of_these = [rows[i] for i in asking]
                tilt_RK[at], broken_R[at] = self._tilts_of(critic, of_these, batch, candidates, at, hidden, last_R)
        candidates.mask_RK.logical_and_(~broken_R[:, None])
        if batch.members:
            self._checks.append(_Check(batch.requests, broken_R))
        if self.device.type == "cpu":
            self._note_broken()
        return tilt_RK, broken_R

    def _tilts_of(
        self,
        critic: LoadedCritic,
        rows: list[Row],
        batch: _Batch,
        candidates: Candidates,
        at: Tensor | slice,
        hidden: Callable[[], Tensor],
        last_R: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The same of some rows, `at` these places of the batch, that one critic guides."""
        ids, mask = candidates.ids_RK[at], candidates.mask_RK[at]
        question = Question(
            ids_RK=ids,
            log_ref_RK=candidates.log_ref_RK[at],
            mask_RK=mask,
            sequences=[row.request.sequence for row in rows if row.request.sequence is not None],
            lengths=[row.length for row in rows],
            read=lambda i: rows[i].read(),
            last_R=None if last_R is None else last_R[at],
            hidden=lambda: hidden()[batch.index_R[at]],
        )
        try:
            outputs = critic.scorer.answer(question)
        except Exception as error:  # whatever a backbone does, other requests and the engine go on
            for row in rows:
                self.fail(row.request, "exception", f"{type(error).__name__}: {error}")
            candidates.mask_RK[at] = False
            return torch.zeros_like(ids, dtype=torch.float64), torch.zeros_like(mask[:, 0])
        self.auditor.watch(critic, rows, ids, mask, outputs)
        broken_R = ~(outputs.isfinite().all(-1) | ~mask).all(-1)
        outputs = outputs.double()
        eta = batch.eta_R[at][:, None]
        distribution = critic.scorer.distribution
        tilts = distribution.relative_tilt(outputs, eta)
        if batch.cd_R is not None:
            expected = (distribution.mean(outputs) - distribution.reward_range[1]) / eta
            tilts = torch.where(batch.cd_R[at][:, None], expected, tilts)
        return tilts, broken_R

    def _note_broken(self) -> None:
        """Marks the requests whose critic's outputs were not finite, as far as the device has got."""
        while self._checks and self._checks[0].done:
            check = self._checks.popleft()
            for request, broken in zip(check.requests, check.broken_R.tolist(), strict=True):
                if broken and request.failure is None:
                    self.fail(request, "not_finite", "the critic's outputs are not finite")
                    engine = request.critic.engine if request.critic is not None else None
                    if engine is not None and request.sequence is not None:
                        engine.discard(request.sequence)

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
    if parallel.enable_batch_sharded_sampling:  # each rank then has the logits of some requests alone
        raise ConfigError("guidance does not work with --enable-batch-sharded-sampling: start without it")


def _logger() -> Any:
    from vllm.logger import init_logger

    return init_logger(__name__)
