"""What audits cost (docs/decisions.md): neighbouring blocks of decoding steps of one engine, with and without.

    python -m benchmarks.audit_cost [--pair tiny]

With audits, many more rows are drawn than by default, so that their cost can be seen at all; the last column is the
share of the steps' time that the default rate takes, in proportion.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

# The worker is handed `alternate`.
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.guidance import ours, pairs
from benchmarks.guidance.ours import Ask
from benchmarks.intervals import interval
from qsharp_core.vllm_plugin import processors, upstream
from qsharp_core.vllm_plugin.settings import DEFAULT_AUDIT_RATE

TOKENS = 136
BLOCK = 16  # steps with, then as many without
TIMES = 20  # the default rate


def alternate(worker: Any, rate: float) -> tuple[list[float], int]:
    """From now on every other block of this worker's steps has audits; returns when steps began, and rows audited."""
    if not hasattr(worker, "begun"):
        processor = upstream.processor_of(worker.model_runner, processors.processor_class(worker.vllm_config))
        assert processor is not None
        worker.auditor, update_state = processor.guide.auditor, processor.update_state

        def begin(batch_update: Any) -> None:
            if len(worker.begun) % BLOCK == 0:
                worker.auditor._rate = worker.rate if len(worker.begun) // BLOCK % 2 else 0.0
                worker.auditor._until = worker.auditor._draw()
            worker.begun.append(time.perf_counter())
            update_state(batch_update)

        processor.update_state = begin
        worker.begun = []
    begun, worker.begun, worker.rate = worker.begun, [], rate
    return begun, len(worker.auditor.take_results())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=["default", "tiny"], default="default")
    parser.add_argument("--waves", type=int, default=8)
    given = parser.parse_args()
    table = Table(
        "head", "requests", "candidates", "pairs of blocks", "audited rows", "without, ms a step",
        f"with - without, ms, {TIMES} times the default", "% of a step at the default",
        title="medians, and 95 % intervals",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        pair = pairs.PAIRS[given.pair](Path(folder))
        processors.settle_runner()
        with ours.engine(pair, 32, processors.settled(), beside=True) as llm:
            for head in ("V", "Q"):
                ask = Ask(32, TOKENS, pair.names[head], 20, prompts="alike")
                found: list[tuple[float, float]] = []
                rows = 0
                for seed in tqdm(range(given.waves), desc=f"{head} head, {ask.rows} at once", unit="wave"):
                    ours.wave(llm, pair, ask, seed, 1)
                    llm.collective_rpc(alternate, args=(TIMES * DEFAULT_AUDIT_RATE,))
                    ours.wave(llm, pair, ask, seed, ask.tokens)
                    ((begun, audited),) = llm.collective_rpc(alternate, args=(0.0,))
                    rows += audited
                    blocks = [1e3 * (begun[i + BLOCK] - begun[i]) / BLOCK for i in range(0, len(begun) - BLOCK, BLOCK)]
                    # Rows come in the first block, which has no audits.
                    found += zip(blocks[1::2], blocks[2::2], strict=False)
                off = [b for _, b in found]
                more = [a - b for a, b in found]
                share = [100 * (a - b) / b / TIMES for a, b in found]
                table.add_row(
                    head, str(ask.rows), str(ask.candidates), str(len(found)), str(rows),
                    f"{statistics.median(off):.1f}", interval(more), interval(share),
                )  # fmt: skip
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
