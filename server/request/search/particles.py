"""Twisted sequential Monte Carlo with the critic's value as twist and the guided policy as proposal.

docs/method.md ("Search") has the derivation, `qsharp_core.particles` the arithmetic. Particles go on in rounds: in each
one every particle that has not ended is an engine request whose prompt is the request's and its tokens so far. vLLM's
prefix cache and the critic's shared blocks have most of that already. A particle that is drawn again is a copy of
another one's tokens and reports.
"""

import hashlib
import random
from collections.abc import Callable, Coroutine, Mapping
from contextlib import aclosing
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from qsharp_core.particles import Weights, systematic
from qsharp_core.wire.reports import SearchReport
from server.request.sample import Sampler
from server.request.search.fields import ParticleSearch
from server.request.search.found import Decode, Found, Terms, estimate, together
from server.request.search.ranking import ranked
from server.request.telemetry import TokenReport


@dataclass
class Particle:
    """One particle.

    Attributes:
        tokens, reports: its path, and what was reported of it.
        finish_reason, stop_reason: vLLM's; None while it has not ended.
    """

    tokens: list[int] = field(default_factory=list)
    reports: list[TokenReport] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def fork(self) -> "Particle":
        """A copy that goes on by itself."""
        return replace(self, tokens=list(self.tokens), reports=list(self.reports))


# Lengthens a particle by a round's tokens, drawn with this seed; None: with any.
Extend = Callable[[Particle, int | None], Coroutine[Any, Any, None]]


class Cloud:
    """Particles with their weights.

    Args:
        size: how many there are.
        eta: strength of the guidance, in units of reward.
        seed: settles all that is drawn here, and the seeds that `Extend` is given; None: nothing does.
    """

    def __init__(self, size: int, eta: float, seed: int | None) -> None:
        self.particles = [Particle() for _ in range(size)]
        self.weights = Weights(size, eta)
        self._seed = seed
        self._rng = random.Random(None if seed is None else f"particles/{seed}")

    async def run(self, extend: Extend, below: float) -> None:
        """Lengthens the particles round by round until all have ended.

        Args:
            extend: lengthens one of them.
            below: between two rounds they are resampled where their effective share is below this.
        """
        number = 0
        while live := [i for i, particle in enumerate(self.particles) if particle.finish_reason is None]:
            known = [len(particle.reports) for particle in self.particles]
            await together(extend(self.particles[i], self._seed_of(number, i)) for i in live)
            for i in live:
                self.weights.take(i, self.particles[i].reports[known[i] :])
            if any(particle.finish_reason is None for particle in self.particles):
                ancestors = self.weights.resample(below, self._rng.random())
                if ancestors is not None:
                    self.particles = [self.particles[ancestor].fork() for ancestor in ancestors]
            number += 1

    def draw(self, draws: int) -> list[int]:
        """Indices of particles drawn by their weights; each of them alone follows the weights' law."""
        indices = systematic(self.weights.logs, draws, self._rng.random())
        self._rng.shuffle(indices)
        return indices

    def _seed_of(self, number: int, particle: int) -> int | None:
        if self._seed is None:
            return None
        digest = hashlib.sha256(f"{self._seed}/{number}/{particle}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1  # vLLM takes 63 bits


async def particles(
    search: ParticleSearch,
    wanted: int,
    sampler: Sampler,
    prompt: Mapping[str, Any],
    params: SamplingParams,
    terms: Terms,
    decode: Decode,
) -> list[Found]:
    """Choices taken from the particles, when all of these have ended.

    Args:
        search: what is asked for.
        wanted: how many choices there are.
        sampler: makes the rounds' samples.
        prompt, params: of the request.
        terms: of the critic.
        decode: makes text of a choice's tokens.
    """
    source = _Source(search.every, sampler, prompt, params, decode)
    cloud = Cloud(search.n, terms.eta, params.seed)
    await cloud.run(source.extend, search.resample_below)
    texts = [source.text(particle) for particle in cloud.particles]
    estimates = [estimate(particle.reports, terms.eta) for particle in cloud.particles]
    if search.by == "sample":
        chosen = cloud.draw(wanted)
    else:
        order = ranked(
            search.by,
            texts,
            estimates,
            vote=search.vote,
            reward_range=terms.reward_range,
            weights=cloud.weights.relative,
        )
        chosen = _different_first(order, cloud.particles)[:wanted]
    return [
        Found(
            source.output(cloud.particles[i], texts[i]),
            list(cloud.particles[i].reports),
            SearchReport(
                kind="particles",
                n=search.n,
                sample=None,
                estimate=estimates[i],
                tokens_spent=source.spent,
                resamplings=cloud.weights.resamplings,
                log_estimate=cloud.weights.log_estimate,
            ),
        )
        for i in chosen
    ]


class _Source:
    """Lengthens particles by engine requests.

    Attributes:
        spent: tokens that the engine has sampled.
    """

    def __init__(
        self, every: int, sampler: Sampler, prompt: Mapping[str, Any], params: SamplingParams, decode: Decode
    ) -> None:
        self.spent = 0
        self._every = every
        self._sampler = sampler
        self._prompt = prompt
        self._params = params
        self._decode = decode
        self._first: RequestOutput | None = None  # an output with the request's own prompt

    async def extend(self, particle: Particle, seed: int | None) -> None:
        """Lengthens a particle by a round, and ends it where vLLM would have ended it in one request."""
        assert self._params.max_tokens is not None
        left = self._params.max_tokens - len(particle.tokens)
        params = copy(self._params)
        params.n, params.seed, params.max_tokens = 1, seed, min(self._every, left)
        params.output_kind = RequestOutputKind.FINAL_ONLY
        so_far = [*self._prompt["prompt_token_ids"], *particle.tokens]
        sample = self._sampler.sample(
            {**self._prompt, "prompt_token_ids": so_far}, params, kl_total=self._left_to_spend(particle)
        )
        async with aclosing(sample.outputs()) as outputs:
            async for output in outputs:
                if self._first is None and not particle.tokens:
                    self._first = output
                (choice,) = output.outputs
        self.spent += sample.spent
        particle.tokens += sample.tokens
        particle.reports += sample.reports
        # A stop string that the engine has found is looked for again: it may have begun in an earlier round, and so may
        # a character that its text begins with.
        by_string = choice.finish_reason == "stop" and isinstance(choice.stop_reason, str)
        if by_string or self._params.stop:
            decoded = self._decode(particle.tokens, choice.finish_reason == "stop" and not by_string)
            if decoded.stop is not None:
                del particle.tokens[decoded.tokens :], particle.reports[decoded.tokens :]
                particle.finish_reason, particle.stop_reason = "stop", decoded.stop
                return
        if not by_string and choice.finish_reason != "length":
            particle.finish_reason, particle.stop_reason = choice.finish_reason, choice.stop_reason
        elif len(particle.tokens) >= self._params.max_tokens:
            particle.finish_reason = "length"

    def text(self, particle: Particle) -> str:
        """The text of a particle that has ended."""
        by_token = particle.finish_reason == "stop" and not isinstance(particle.stop_reason, str)
        return self._decode(particle.tokens, by_token).text

    def output(self, particle: Particle, text: str) -> RequestOutput:
        """A particle as vLLM's output of one choice."""
        assert self._first is not None
        output = copy(self._first)
        output.outputs = [
            CompletionOutput(
                index=0,
                text=text,
                token_ids=list(particle.tokens),
                cumulative_logprob=None,
                logprobs=None,
                finish_reason=particle.finish_reason,
                stop_reason=particle.stop_reason,
            )
        ]
        output.finished = True
        return output

    def _left_to_spend(self, particle: Particle) -> float | None:
        """The nats that the rest of a particle may spend; None if that is not limited."""
        guidance = self._sampler.guidance
        if guidance is None or guidance.kl_total is None:
            return None
        return max(guidance.kl_total - sum(report.kl for report in particle.reports), 0.0)


def _different_first(order: list[int], cloud: list[Particle]) -> list[int]:
    """The same order, but with further copies of a completion behind all that are different."""
    seen: set[tuple[int, ...]] = set()
    different: list[int] = []
    copies: list[int] = []
    for i in order:
        tokens = tuple(cloud[i].tokens)
        (copies if tokens in seen else different).append(i)
        seen.add(tokens)
    return different + copies
