"""One guided step over a batch: the same for both of vLLM's model runners.

The adapters (`v1`, `v2`) say which logits rows belong to which request and what the request's tokens are; this asks
the critics, tilts the logits, and reports what was done once the tokens are sampled.

Shapes: R rows (of guided or observed requests only), V vocabulary, K most candidates of any row.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qsharp_core import policy
from qsharp_core.critic.cache import Sequence
from qsharp_core.errors import ConfigError, GuidanceError
from qsharp_core.policy import Candidates, GuidedStep, Method, Tail
from qsharp_core.vllm_plugin import registry
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
    """A logits row of this step, and the tokens before it."""

    index: int
    request: Request
    history: list[int]


@dataclass(frozen=True)
class _Step:
    """What is reported when the tokens of the running step are known."""

    rows: list[Row]
    index_R: Tensor
    candidates: Candidates
    guided: GuidedStep
    failures: dict[int, str]
    seconds: float
    scored: int


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
        self.device = device
        self.ranks = Ranks.of(vllm_config, device)
        self.registry = registry.build(vllm_config, device) if self.ranks.leads else registry.empty()
        self.engine: int = vllm_config.parallel_config.data_parallel_index
        self.sender = Sender(device)
        self._step: _Step | None = None

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

    def apply(self, logits: Tensor, rows: list[Row]) -> None:
        """Tilts the logits of these rows in place: `[B, V]` float32, `rows` a subset of the B."""
        self._step = None
        if not rows:
            return
        requests = [row.request for row in rows]
        index_R = torch.tensor([row.index for row in rows], device=self.device)
        logits_RV = logits.index_select(0, index_R)
        temperature_R = self._column([r.temperature for r in requests], torch.float32)
        # Of the parameters alone, and so the same on every rank; who is guided is known where the critics are.
        asked = [r.params.candidates for r in requests if r.params.eta is not None]
        guided = [r.sequence is not None and r.failure is None for r in requests]
        counts = [r.params.candidates if g else 0 for r, g in zip(requests, guided, strict=True)]
        candidates = policy.select_candidates(
            logits_RV,
            temperature_R,
            self._column(counts, torch.int64),
            self._column([r.params.min_prob for r in requests]),
            max([1, *asked]),
        )
        started = time.perf_counter()
        tilt_RK = self._tilts(rows, candidates)
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
            logits.index_copy_(0, index_R, policy.guided_logits(logits_RV, temperature_R, candidates, step))
        failures = {r.params.id: r.failure for r in requests if r.failure is not None and r.params.id is not None}
        scored = int(candidates.mask_RK.sum()) if self.device.type == "cpu" else sum(counts)
        self._step = _Step(rows, index_R, candidates, step, failures, seconds, scored)

    def report(self, sampled: Tensor) -> None:
        """Reports the step of the last `apply`, now that its tokens are known: `[B]` or `[B, 1]`."""
        step, self._step = self._step, None
        if step is None or not self.sender.connected:
            return
        tokens_R = sampled.reshape(-1).index_select(0, step.index_R).long()
        log_ref_R, log_pi_R = policy.token_logprobs(step.candidates, step.guided, tokens_R)
        columns = torch.stack([tokens_R.double(), step.guided.kl_R, log_ref_R, log_pi_R, step.guided.value_R])
        observed = [i for i, row in enumerate(step.rows) if row.request.params.id is not None]
        if len(observed) < len(step.rows):
            columns = columns[:, observed]
        rows = [step.rows[i] for i in observed]
        guided = step.candidates.mask_RK.any(-1).tolist()
        report = StepReport(
            ids=[row.request.params.id or 0 for row in rows],
            positions=[len(row.history) for row in rows],
            tokens=[],
            status=[
                Status.FAILED if step.rows[i].request.failure else Status.GUIDED if guided[i] else Status.UNGUIDED
                for i in observed
            ],
            kl=[],
            ref_logprob=[],
            logprob=[],
            value=[],
            failures=step.failures,
            critic_seconds=step.seconds,
            scored_candidates=step.scored,
            blocks_used={key: c.engine.blocks.used for key, c in self.registry.critics.items()},
            engine=self.engine,
        )
        self.sender.send(report, columns)

    def _tilts(self, rows: list[Row], candidates: Candidates) -> Tensor:
        """Relative tilts `[R, K]`, float64. Rows whose critic fails lose their candidates, and are marked."""
        tilt_RK = torch.zeros_like(candidates.log_ref_RK)
        guided_R = candidates.mask_RK.any(-1).tolist()
        groups: dict[int, tuple[LoadedCritic, list[int]]] = {}
        for i, row in enumerate(rows):
            critic = row.request.critic
            if not guided_R[i] or critic is None:
                continue
            if len(row.history) > critic.engine.capacity:
                self._fail(row.request, "too_long", f"{len(row.history)} tokens, capacity {critic.engine.capacity}")
                candidates.mask_RK[i] = False
                continue
            groups.setdefault(id(critic), (critic, []))[1].append(i)
        for critic, members in groups.values():
            index = torch.tensor(members, device=self.device)
            tilt_RK[index] = self._tilts_of(critic, [rows[i] for i in members], candidates, index)
        return tilt_RK

    def _tilts_of(self, critic: LoadedCritic, rows: list[Row], candidates: Candidates, index: Tensor) -> Tensor:
        ids, mask = candidates.ids_RK[index], candidates.mask_RK[index]
        sequences = [row.request.sequence for row in rows]
        assert all(s is not None for s in sequences)
        try:
            outputs = critic.engine.score(sequences, [row.history for row in rows], ids, mask)  # type: ignore[arg-type]
        except Exception as error:  # whatever a backbone does, other requests and the engine go on
            for row in rows:
                self._fail(row.request, "exception", f"{type(error).__name__}: {error}")
            candidates.mask_RK[index] = False
            return torch.zeros_like(ids, dtype=torch.float64)
        finite = (outputs.isfinite().all(-1) | ~mask).all(-1)
        if not bool(finite.all()):
            for row, good in zip(rows, finite.tolist(), strict=True):
                if not good:
                    self._fail(row.request, "not_finite", "the critic's outputs are not finite")
            candidates.mask_RK[index[~finite]] = False
        outputs = outputs.double()
        eta = self._column([row.request.params.eta or 1.0 for row in rows])[:, None]
        distribution = critic.engine.critic.distribution
        tilts = distribution.relative_tilt(outputs, eta)
        if any(row.request.params.method == "cd" for row in rows):
            cd = self._column([METHODS[row.request.params.method] for row in rows], torch.int64) == Method.CD
            expected = (distribution.mean(outputs) - distribution.reward_range[1]) / eta
            tilts = torch.where(cd[:, None], expected, tilts)
        return tilts

    def _fail(self, request: Request, reason: str, detail: str) -> None:
        request.failure = reason
        # A front end that listens ends the request with an error; without one the log is all there is.
        _logger().error("guidance failed (%s): %s; the request goes on unguided", reason, detail)

    def _column(self, values: list[Any], dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


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
