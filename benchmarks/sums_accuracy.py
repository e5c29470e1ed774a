"""Accuracy of the default model on held-out sums, with its critic and without, through HTTP.

    python -m benchmarks.sums_accuracy                  starts the server itself
    python -m benchmarks.sums_accuracy --url http://…   uses one that runs

Every held-out problem is sampled at T = 1 under each `eta`, `--samples` times. Prints a table, and the paired
difference to the reference: the standard error is over problems, so samples of one problem count as one draw.
"""

import argparse
import asyncio
import json
import math
import statistics
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table
from tqdm.asyncio import tqdm

from benchmarks.serving import serve
from trainer.tasks import sums


@dataclass(frozen=True)
class Measured:
    """One setting: accuracy over problems, and what guidance cost."""

    eta: float | None
    method: str
    problems: int
    samples: int
    accuracy: float
    accuracy_se: float
    gain: float
    gain_se: float
    kl: float
    kl_se: float
    tokens: float


async def sample(
    client: httpx.AsyncClient,
    gate: asyncio.Semaphore,
    problem: sums.Problem,
    eta: float | None,
    args: argparse.Namespace,
) -> list[tuple[float, float, int]]:
    """Reward, KL and tokens of each sample of a problem."""
    async with gate:
        answer = await client.post(
            "/v1/completions",
            json={
                "model": args.model,
                "prompt": sums.prompt(problem),
                "n": args.samples,
                "temperature": 1.0,
                "max_tokens": 48,
                "stop": sums.STOP,
                "eta": eta,
                "guidance": {"candidates": args.candidates, "method": args.method},
            },
        )
        answer.raise_for_status()
    return [
        (sums.reward(problem, choice["text"]), choice["guidance"]["kl"], choice["guidance"]["tokens_total"])
        for choice in answer.json()["choices"]
    ]


async def measure(url: str, args: argparse.Namespace) -> list[Measured]:
    """All settings, the reference first; settings are interleaved so that they see the same machine."""
    problems = sums.problems("held_out")[: args.problems]
    etas: list[float | None] = [None, *args.eta]
    gate = asyncio.Semaphore(args.concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        jobs = [sample(client, gate, problem, eta, args) for problem in problems for eta in etas]
        answers = await tqdm.gather(*jobs, desc="problems x settings", smoothing=0.05)
    by_eta = {eta: answers[i :: len(etas)] for i, eta in enumerate(etas)}
    base = [statistics.fmean(r for r, _, _ in problem) for problem in by_eta[None]]
    return [_summary(eta, by_eta[eta], base, args) for eta in etas]


def _summary(
    eta: float | None, answers: list[list[tuple[float, float, int]]], base: list[float], args: argparse.Namespace
) -> Measured:
    rewards = [statistics.fmean(r for r, _, _ in problem) for problem in answers]
    kls = [statistics.fmean(kl for _, kl, _ in problem) for problem in answers]
    gains = [ours - theirs for ours, theirs in zip(rewards, base, strict=True)]
    return Measured(
        eta=eta,
        method=args.method if eta is not None else "reference",
        problems=len(answers),
        samples=args.samples,
        accuracy=statistics.fmean(rewards),
        accuracy_se=_error(rewards),
        gain=statistics.fmean(gains),
        gain_se=_error(gains),
        kl=statistics.fmean(kls),
        kl_se=_error(kls),
        tokens=statistics.fmean(n for problem in answers for _, _, n in problem),
    )


def _error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def show(results: list[Measured]) -> None:
    """The table, as README quotes it."""
    table = Table("eta", "method", "accuracy", "gain, points", "gain / s.e.", "KL, nats", "tokens")
    for r in results:
        table.add_row(
            "–" if r.eta is None else f"{r.eta:g}",
            r.method,
            f"{100 * r.accuracy:.1f} ± {100 * r.accuracy_se:.1f} %",
            "" if r.eta is None else f"{100 * r.gain:+.1f} ± {100 * r.gain_se:.1f}",
            "" if r.eta is None else f"{r.gain / r.gain_se:.1f}",
            f"{r.kl:.2f} ± {r.kl_se:.2f}",
            f"{r.tokens:.1f}",
        )
    console = Console()
    console.print(table)
    console.print(
        f"n = {results[0].problems} held-out problems x {results[0].samples} samples; ± is one standard error"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server; default: start the default one")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--eta", type=float, action="append", help="may be repeated; default: the critic's own")
    parser.add_argument("--method", choices=["qsharp", "cd"], default="qsharp")
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--samples", type=int, default=4, help="per problem and setting")
    parser.add_argument("--problems", type=int, help="only the first so many")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at once")
    parser.add_argument("--out", type=Path, help="results as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        started = serve([], log, patience=900) if args.url is None else nullcontext(args.url)
        with started as url:
            if args.eta is None:
                critics = httpx.get(f"{url}/v1/critics").raise_for_status().json()["data"]
                args.eta = [critics[0]["card"]["recommended_eta"]]
            begun = time.monotonic()
            results = asyncio.run(measure(url, args))
    show(results)
    print(f"{time.monotonic() - begun:.0f} s")
    if args.out:
        args.out.write_text(json.dumps([asdict(r) for r in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
