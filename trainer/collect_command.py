"""`qsharp collect`: samples a task's problems through a server, which stores the rollouts.

    qsharp collect --task sums --split train --n 16 --state runs/round-0.jsonl
    qsharp collect --task sums --split train --n 2 --branch 16 --state runs/branches.jsonl
    qsharp collect --task sums --split train --n 16 --eta 0.1 --roll-in --round 1 --state runs/round-1.jsonl

The same command goes on where it was stopped, killed or not; with a larger `--n`, `--branch` or `--limit` it goes on
from there. Branches are what a critic learns most from: they take, at tokens that the model is unsure of, one of its
likeliest tokens, which its own samples may hardly ever take, and go on from there.
"""

import argparse
import asyncio
from pathlib import Path

from rich.console import Console

from qsharp_core.wire.guidance import METHODS, TAILS
from trainer import client
from trainer.client import ServerClient
from trainer.collect import Collected, CollectError, Collection, Guidance, Sampling, checked, collect
from trainer.tasks.base import Task
from trainer.tasks.registry import task_of


def main(argv: list[str]) -> None:
    """Runs the command.

    Raises:
        CollectError, ServerError, TaskError, JournalError
    """
    args = _parser().parse_args(argv)
    if args.roll_in and args.eta is None:
        raise CollectError("--roll-in needs --eta: what is rolled in is guided")
    if args.branch and args.eta is not None:
        raise CollectError("--branch leaves rollouts of the model itself: leave out --eta")
    task = task_of(args.task, args.prompts)
    result = asyncio.run(_collect(args, task))
    _say(result)
    checked(result)


async def _collect(args: argparse.Namespace, task: Task) -> Collected:
    async with ServerClient(args.url, key=args.api_key, connections=args.concurrency, patience=args.patience) as server:
        collection = Collection(
            task=task.name,
            split=args.split,
            model=args.model or await server.model(),
            samples=args.n,
            branches=args.branch,
            sampling=sampling_of(args, task),
            guidance=await _guidance(args, server),
            roll_in=args.roll_in,
            round=args.round,
            limit=args.limit,
            seed=args.seed,
        )
        return await collect(server, task, collection, args.state, args.concurrency)


async def _guidance(args: argparse.Namespace, server: ServerClient) -> Guidance | None:
    if args.eta is None:
        return None
    critic = await server.critic(args.critic)
    if critic is None:
        raise CollectError("--eta needs a critic, and the server has none")
    return Guidance(
        eta=args.eta,
        critic=critic["id"],
        method=args.method,
        candidates=args.candidates,
        min_prob=args.min_prob,
        tail=args.tail,
    )


def sampling_of(args: argparse.Namespace, task: Task) -> Sampling:
    """From the command line, and for what it leaves open from the task."""
    return Sampling(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        max_tokens=args.max_tokens or task.sampling.max_tokens,
        stop=tuple(args.stop) if args.stop is not None else task.sampling.stop,
    )


def add_task_arguments(parser: argparse.ArgumentParser, split: str) -> None:
    """Which problems, and how they are sampled: of every command that samples."""
    group = parser.add_argument_group("problems")
    group.add_argument("--task", help="a name, or module:object")
    group.add_argument("--prompts", type=Path, metavar="FILE", help='JSON lines: {"id", "prompt" | "messages", …}')
    group.add_argument("--split", default=split, help="default: %(default)s")
    group.add_argument("--limit", type=client.positive, help="only the first so many problems")
    group = parser.add_argument_group("sampling")
    group.add_argument("--model", help="default: the one that is served")
    group.add_argument("--temperature", type=float, default=1.0, help="default: %(default)s")
    group.add_argument("--top-p", type=float, default=1.0, help="default: %(default)s")
    group.add_argument("--top-k", type=int, default=0, help="0 is all tokens (the default)")
    group.add_argument("--max-tokens", type=client.positive, help="default: the task's")
    group.add_argument("--stop", action="append", help="may be repeated; default: the task's")
    group.add_argument("--seed", type=int, default=0, help="another one makes other samples (default: %(default)s)")


def add_guidance_arguments(parser: argparse.ArgumentParser, critic: bool = True) -> argparse._ArgumentGroup:
    """The request's `guidance`, but for `method`; what is not given is the server's default."""
    group = parser.add_argument_group("guidance")
    if critic:
        group.add_argument("--critic", help="NAME or NAME@VERSION; default: the server's first")
    group.add_argument("--candidates", type=client.positive, help="tokens weighed at each step")
    group.add_argument("--min-prob", type=float, help="least probability of a candidate")
    group.add_argument("--tail", choices=TAILS, help="what happens to other tokens")
    return group


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qsharp collect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=client.positive, default=1, help="rollouts of each problem (default: %(default)s)")
    parser.add_argument(
        "--branch", type=client.positive, default=0, metavar="N",
        help="then N more of each problem that leave these where the model is unsure (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--state", type=Path, required=True, help="what was done, kept in this file")
    parser.add_argument("--round", type=int, default=0, help="a label kept with every rollout (default: %(default)s)")
    add_task_arguments(parser, split="train")
    group = add_guidance_arguments(parser)
    group.add_argument("--eta", type=float, help="in units of reward, smaller is stronger; default: unguided")
    group.add_argument("--method", choices=METHODS, default="qsharp", help="default: %(default)s")
    group.add_argument(
        "--roll-in", action="store_true", help="cut each guided completion, and have the reference go on from there"
    )
    client.add_arguments(parser)
    return parser


def _say(result: Collected) -> None:
    rate = result.tokens / max(result.seconds, 1e-9)
    parts = [
        f"{result.wanted} rollouts wanted",
        f"{result.before} done before",
        f"{result.made} completions sampled in {result.seconds:.0f} s ({rate:.0f} tokens/s)",
    ]
    for name, count in (
        ("found in the store", result.found),
        ("too short to be cut", result.too_short),
        ("that would leave where the model is sure or ends", result.no_way_out),
        ("failed", len(result.failed)),
        ("requests tried again", result.retries),
    ):
        if count:
            parts.append(f"{count} {name}")
    Console(stderr=True).print(f"run {result.run}: " + "; ".join(parts), highlight=False)
