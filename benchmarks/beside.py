"""What it saves that critics run beside the reference, on the core that vLLM leaves over (docs/decisions.md).

    python -m benchmarks.beside [--pair tiny]

One engine, in which every other decoding step, or every other wave of new prompts, does without. Differences are
between neighbours, so that what else the machine does matters little.
"""

import argparse
import itertools
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
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
from qsharp_core.vllm_plugin import processors, upstream

CANDIDATES, TOKENS = 8, 80
Mode = Literal["with", "without", "by turns"]
Times = tuple[float, float]  # of neighbours, with and without, in milliseconds


def switch(worker: Any, mode: Mode) -> list[float]:
    """Which of this worker's steps run critics beside from now on; returns when those since the last call began."""
    if not hasattr(worker, "begun"):
        processor = upstream.processor_of(worker.model_runner, processors.processor_class(worker.vllm_config))
        assert processor is not None
        engines = [critic.engine for critic in processor.core.registry.critics.values()]
        threads = [engine._aside for engine in engines]
        assert None not in threads, "vLLM leaves no core over"
        update_state = processor.update_state

        def begin(batch_update: Any) -> None:
            worker.begun.append(time.perf_counter())
            beside = worker.mode == "with" or (worker.mode == "by turns" and len(worker.begun) % 2 == 1)
            for engine, thread in zip(engines, threads, strict=True):
                engine._aside = thread if beside else None
            update_state(batch_update)

        processor.update_state = begin
        worker.begun = []
    begun, worker.begun, worker.mode = worker.begun, [], mode
    return begun


def decoding(llm: Any, pair: Pair, ask: Ask, seed: int) -> list[Times]:
    """Steps of one wave of prompts that have been seen."""
    ours.wave(llm, pair, ask, seed, 1)
    llm.collective_rpc(switch, args=("by turns",))
    ours.wave(llm, pair, ask, seed, ask.tokens)
    (begun,) = llm.collective_rpc(switch, args=("by turns",))
    taken = [1e3 * (after - before) for before, after in itertools.pairwise(begun)]
    return [
        *zip(taken[2:-2:2], taken[3:-2:2], strict=False)
    ]  # without the first and last steps, where rows come and go


def first_tokens(llm: Any, pair: Pair, ask: Ask, seed: int) -> list[Times]:
    """Two waves of prompts that share nothing and that nobody has seen, until they have a token each."""
    order: list[Mode] = ["with", "without"] if seed % 2 else ["without", "with"]
    taken = {}
    for place, mode in enumerate(order):
        llm.collective_rpc(switch, args=(mode,))
        taken[mode] = 1e3 * ours.wave(llm, pair, ask, ask.rows * 10_000 + 2 * seed + place, 1)
    return [(taken["with"], taken["without"])]


@dataclass(frozen=True)
class Measure:
    """What is timed: of how many requests at once, in how many waves."""

    name: str
    run: Callable[[Any, Pair, Ask, int], list[Times]]
    prompts: Prompts
    rows: tuple[int, ...]
    waves: int


MEASURES = (
    Measure("a decoding step", decoding, "alike", (1, 32), 6),
    Measure("a first token", first_tokens, "apart", (1, 8), 24),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=["default", "tiny"], default="default")
    given = parser.parse_args()
    table = Table("of", "head", "requests", "pairs", "without, ms", "with, ms", "with - without, ms (95 %)")
    with tempfile.TemporaryDirectory() as folder:
        pair = pairs.PAIRS[given.pair](Path(folder))
        processors.settle_runner()
        with ours.engine(pair, 32, processors.settled(), beside=True) as llm:
            llm.collective_rpc(switch, args=("with",))
            for measure, head in itertools.product(MEASURES, ("V", "Q")):
                for rows in measure.rows:
                    ask = Ask(rows, TOKENS, pair.names[head], CANDIDATES, prompts=measure.prompts)
                    waves = tqdm(range(measure.waves + 1), desc=f"{measure.name}, {head}, {rows} at once", unit="wave")
                    found = [times for seed in waves for times in measure.run(llm, pair, ask, seed) if seed]
                    table.add_row(measure.name, head, str(rows), str(len(found)), *summary(found))
    Console(width=120).print(table)


def summary(found: list[Times]) -> tuple[str, str, str]:
    """Medians without, with, and of the differences, whose interval is of 1,000 bootstrap samples."""
    beside, alone = zip(*found, strict=True)
    differences = [a - b for a, b in found]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(differences, k=len(differences))) for _ in range(1000))
    interval = f"({medians[25]:.2f} to {medians[-26]:.2f})"
    return (
        f"{statistics.median(alone):.2f}",
        f"{statistics.median(beside):.2f}",
        f"{statistics.median(differences):.2f} {interval}",
    )


if __name__ == "__main__":
    main()
