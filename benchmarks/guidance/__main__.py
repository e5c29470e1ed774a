"""`python -m benchmarks.guidance`."""

import argparse
import json
import os
import platform
import statistics
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.guidance import bare, ours
from benchmarks.guidance.ours import Ask, spread
from benchmarks.guidance.pairs import Pair, default, tiny


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", nargs="+", choices=["default", "tiny"], default=["default", "tiny"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32], help="requests at once")
    parser.add_argument("--candidates", type=int, nargs="+", default=[4, 8, 20])
    parser.add_argument("--heads", nargs="+", choices=["V", "Q"], default=["V", "Q"])
    parser.add_argument("--tokens", type=int, default=24, help="of each request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the result there")
    given = parser.parse_args()
    torch.set_num_threads(1)  # as many as vLLM gives its worker on two cores
    results = []
    with tempfile.TemporaryDirectory(prefix="qsharp-") as folder:
        for name in given.pairs:
            made = {"default": default, "tiny": tiny}[name](Path(folder) / name)
            results += measure(made, given)
    show(results)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")


def measure(pair: Pair, given: argparse.Namespace) -> list[dict[str, Any]]:
    """One pair's table; all numbers of it are from one run, by turns."""
    names = {"V": "sums" if pair.name == "default" else "v", "Q": "q"}
    asks = [Ask(rows, given.tokens) for rows in given.rows]
    guided = {
        Ask(rows, given.tokens, names[head], candidates): head
        for rows in given.rows
        for head in given.heads
        for candidates in given.candidates
    }
    critics = {head: pair.critic(head) for head in given.heads}
    with (
        ours.engine(pair, max(given.rows)) as llm,
        tqdm(total=(given.rounds + 1) * (len(asks) + len(guided)), desc=pair.name, unit="wave") as bar,
    ):
        times = ours.times_of(llm, pair, [*asks, *guided], given.rounds, bar.update)
    found = []
    for ask, head in guided.items():
        arithmetic = [bare.seconds(critics[head], ask.rows, ask.tokens, ask.candidates) for _ in range(given.rounds)]
        plain = times[Ask(ask.rows, ask.tokens)]
        median = {k: statistics.median(v) for k, v in {"plain": plain, "ours": times[ask], "bare": arithmetic}.items()}
        found.append(
            {
                "pair": pair.name, "head": head, "rows": ask.rows, "candidates": ask.candidates,
                "unguided_s": plain, "guided_s": times[ask], "bare_s": arithmetic,
                "ratio": median["plain"] / median["ours"],
                "efficiency": (median["plain"] + median["bare"]) / median["ours"],
            }
        )  # fmt: skip
    return found


def show(results: list[dict[str, Any]]) -> None:
    table = Table(
        "pair", "head", "rows", "candidates", "unguided, s", "guided, s", "critic alone, s", "ratio", "efficiency"
    )
    for r in results:
        table.add_row(
            r["pair"], r["head"], str(r["rows"]), str(r["candidates"]), spread(r["unguided_s"]), spread(r["guided_s"]),
            spread(r["bare_s"]), f"{r['ratio']:.2f}", f"{r['efficiency']:.2f}",
        )  # fmt: skip
    Console(width=140).print(table)


def machine() -> dict[str, Any]:
    """What the numbers hang on."""
    return {
        "date": date.today().isoformat(), "machine": platform.machine(), "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "qsharp-serve")},
    }  # fmt: skip


if __name__ == "__main__":
    main()
