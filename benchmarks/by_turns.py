"""What guidance costs, and what it saves that critics run beside the reference (docs/decisions.md), step by step.

    python -m benchmarks.by_turns [--pair tiny] [--measures step native slack tight beside first] [--clock cpu]

Of one engine, every other decoding step or wave of new prompts does without. Differences and ratios are between
neighbours, so that what else the machine does matters little; `make bench` compares whole waves.

`--clock cpu` times decoding steps by the CPU time that the worker's thread takes from the beginning of a step until its
tokens are drawn. It tells what a step computes where other processes take the cores away. What the critic does beside,
in a thread of its own, and vLLM's other processes are not in it.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

# The worker is handed `switch`.
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.guidance import ours, pairs
from benchmarks.guidance.ours import Ask
from benchmarks.guidance.pairs import Pair, Prompts
from benchmarks.intervals import interval
from qsharp_core.vllm_plugin import processors, upstream

TOKENS = 80
What = Literal["beside", "guided", "budget"]
Mode = Literal["with", "without", "by turns"]
Clock = Literal["wall", "cpu"]
Times = tuple[float, float]  # of neighbours, with and without, in milliseconds


def switch(worker: Any, what: What, mode: Mode) -> tuple[list[float], list[float]]:
    """Which of this worker's steps are from now on guided, run critics beside, or are kept within their budget.

    A step that is not guided leaves its tokens to the next one that is. Returns of the last steps when they began, and
    the CPU time that each took, in seconds.
    """
    if not hasattr(worker, "begun"):
        processor = upstream.processor_of(worker.model_runner, processors.processor_class(worker.vllm_config))
        assert processor is not None
        guide = processor.guide
        scorers = [critic.cached_scorer for critic in guide.registry.critics.values() if critic.cached_scorer]
        threads = [scorer._background for scorer in scorers]
        assert what != "beside" or None not in threads, "vLLM leaves no core over"
        update_state, apply, after_sample = processor.update_state, guide.apply, processor.after_sample
        limit = guide._limit

        def begin(batch_update: Any) -> None:
            worker.begun.append(time.perf_counter())
            worker.spent.append(-time.thread_time())
            worker.on = worker.mode == "with" or (worker.mode == "by turns" and len(worker.begun) % 2 == 1)
            for scorer, thread in zip(scorers, threads, strict=True):
                scorer._background = thread if worker.on or worker.what == "budget" else None
            update_state(batch_update)

        def guided(*given: Any) -> None:
            if worker.on or worker.what != "guided":
                apply(*given)

        def limited(budgets: Any, lengths: Any, candidates: Any, step: Any) -> Any:
            return limit(budgets, lengths, candidates, step) if worker.on else (step, None)

        def end(sampled_token_ids: Any) -> None:
            after_sample(sampled_token_ids)
            worker.spent[-1] += time.thread_time()

        processor.update_state, guide.apply, processor.after_sample = begin, guided, end
        guide._limit = limited
        worker.begun, worker.spent = [], []
    begun, spent = worker.begun, worker.spent
    worker.begun, worker.spent, worker.what, worker.mode = [], [], what, mode
    return begun, spent


def decoding(llm: Any, pair: Pair, ask: Ask, seed: int, what: What, clock: Clock) -> list[Times]:
    """Steps of one wave of prompts that have been seen."""
    ours.wave(llm, pair, ask, seed, 1)
    llm.collective_rpc(switch, args=(what, "by turns"))
    ours.wave(llm, pair, ask, seed, ask.tokens)
    ((begun, spent),) = llm.collective_rpc(switch, args=(what, "with"))
    between = [after - before for before, after in itertools.pairwise(begun)]
    taken = [1e3 * seconds for seconds in (spent if clock == "cpu" else between)]
    # Without the first and last steps, where rows come and go.
    return [*zip(taken[2:-2:2], taken[3:-2:2], strict=False)]


def first_tokens(llm: Any, pair: Pair, ask: Ask, seed: int, what: What, clock: Clock) -> list[Times]:
    """Two waves of prompts that share nothing and that nobody has seen, until they have a token each."""
    order: list[Mode] = ["with", "without"] if seed % 2 else ["without", "with"]
    taken = {}
    for place, mode in enumerate(order):
        llm.collective_rpc(switch, args=(what, mode))
        taken[mode] = 1e3 * ours.wave(llm, pair, ask, ask.rows * 10_000 + 2 * seed + place, 1)
    return [(taken["with"], taken["without"])]


@dataclass(frozen=True)
class Measure:
    """What is timed: of how many requests and candidates, in how many waves."""

    name: str
    what: What
    heads: tuple[str, ...]
    run: Callable[[Any, Pair, Ask, int, What, Clock], list[Times]]
    prompts: Prompts
    rows: tuple[int, ...]
    candidates: tuple[int, ...]
    waves: int
    kl_total: float | None = None


MEASURES = {
    "step": Measure("a step: guidance", "guided", ("V", "Q"), decoding, "alike", (32,), (4, 8, 20), 6),
    "native": Measure("a step: guidance", "guided", ("native",), decoding, "alike", (1, 8, 32), (20,), 6),
    "slack": Measure("a step: slack budget", "budget", ("V", "native"), decoding, "alike", (32,), (20,), 6, 1e6),
    "tight": Measure("a step: spent budget", "budget", ("V", "native"), decoding, "alike", (32,), (20,), 6, 1e-3),
    "beside": Measure("a step: beside", "beside", ("V", "Q"), decoding, "alike", (1, 32), (8,), 6),
    "first": Measure("a first token: beside", "beside", ("V", "Q"), first_tokens, "apart", (1, 8), (8,), 24),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=["default", "tiny"], default="default")
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="of decoding steps")
    given = parser.parse_args()
    table = Table(
        "of", "head", "requests", "candidates", "pairs", "without, ms", "with, ms", "with - without, ms",
        "without / with", title="medians, and 95 % intervals",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        pair = pairs.PAIRS[given.pair](Path(folder))
        processors.settle_runner()
        with ours.engine(pair, 32, processors.settled(), beside=True) as llm:
            beside = any(MEASURES[name].what == "beside" for name in given.measures)
            llm.collective_rpc(switch, args=("beside" if beside else "guided", "with"))
            for name in given.measures:
                measure = MEASURES[name]
                for head, rows, candidates in itertools.product(measure.heads, measure.rows, measure.candidates):
                    ask = Ask(
                        rows, TOKENS, pair.names[head], candidates, prompts=measure.prompts, kl_total=measure.kl_total
                    )
                    title = f"{measure.name}, {head}, {rows} at once, {candidates} candidates"
                    waves = tqdm(range(measure.waves + 1), desc=title, unit="wave")
                    run = partial(measure.run, llm, pair, ask)
                    found = [t for seed in waves for t in run(seed, measure.what, given.clock) if seed]
                    table.add_row(measure.name, head, str(rows), str(candidates), str(len(found)), *summary(found))
    Console(width=160).print(table)


def summary(found: list[Times]) -> tuple[str, str, str, str]:
    """Medians without, with, of the differences and of the ratios."""
    on, off = zip(*found, strict=True)
    return (
        f"{statistics.median(off):.2f}",
        f"{statistics.median(on):.2f}",
        interval([a - b for a, b in found]),
        interval([b / a for a, b in found]),
    )


if __name__ == "__main__":
    main()
