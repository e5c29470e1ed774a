"""The default model learns to add: its server without a critic, two rounds of the loop, and a measurement.

Every number here is chosen for two CPU cores. Steps are small and many, because steps count more than
anything else; guidance looks at few candidates, because a critic is too hopeful about tokens that it never saw.
"""

import asyncio
from pathlib import Path
from typing import Any

from rich.console import Console

from qsharp_core.precision import fast_bfloat16
from trainer.client import ServerClient
from trainer.collect import Sampling
from trainer.demo.plot import plot
from trainer.demo.report import made
from trainer.evaluate import Evaluation, Setting, evaluate, write_json
from trainer.loop.activation import LoopError, ServedCritic, Version
from trainer.loop.rounds import run_loop
from trainer.loop.settings import Budget, LoopSettings, Recipe
from trainer.rewards.verifiers import OWN, Judge, TaskRef, Weighted
from trainer.tasks.registry import find_task
from trainer.training.settings import TrainSettings

NAME = "sums"
ADMIN_KEY = "demo"  # of a server that listens on the loopback interface, while the demo runs
ETA = 0.1
OTHER_ETAS = (0.02, 0.05, 0.3)
CANDIDATES = 8
CONCURRENCY = 64
ROLLOUTS = (8, 2)  # of each problem, by round
SAMPLES, OTHER_SAMPLES = 6, 2  # of each held-out problem: reference and ETA, all other settings
METHODS = ("qsharp", "cd")


def server_flags(folder: Path) -> list[str]:
    """Of `qsharp serve`: the embedded model alone, and a store."""
    return [
        "--no-critic", "--admin-key", ADMIN_KEY, "--rollouts", f"sqlite:///{(folder / 'rollouts.db').absolute()}",
        "--max-model-len", "512", "--max-num-seqs", str(CONCURRENCY),
    ]  # fmt: skip


def train_settings(base: str) -> TrainSettings:
    """Of both versions."""
    return TrainSettings(
        name=NAME,
        base=base,
        layers=3,
        mlp=512,
        borrow_embeddings=True,
        held_out=0.06,
        epochs=5,
        learning_rate=5e-4,
        warmup=0.1,
        batch_tokens=13_000,
        weigh="nodes",
        select="last",  # log-loss is of over-confidence, too, and guidance goes by ratios
        precision="bf16" if fast_bfloat16() else "float32",
    )


async def run(url: str, folder: Path, started: float, console: Console) -> dict[str, Any]:
    """The demo on a running server; goes on where an earlier run was stopped.

    Args:
        started: seconds that the server took to start.

    Returns:
        The report.

    Raises:
        LoopError: no version is better than none.
        TrainingError, CollectError, EvaluateError, ServerError, JournalError
    """
    task = TaskRef(find_task(NAME), NAME)
    sampling = Sampling(max_tokens=task.task.sampling.max_tokens, stop=task.task.sampling.stop)
    async with (
        Judge([Weighted(OWN)]) as judge,
        ServerClient(url, key=ADMIN_KEY, connections=CONCURRENCY) as server,
    ):
        model = (await server.get("/v1/models"))["data"][0]
        recipe = Recipe(
            settings=train_settings(model["root"]), out=folder / "critics", continues=True, eta=ETA, dtype="bf16"
        )
        settings = LoopSettings(
            task=task,
            split="train",
            model=model["id"],
            samples=ROLLOUTS,
            sampling=sampling,
            eta=ETA,
            recipe=recipe,
            guidance=(("candidates", CANDIDATES), ("min_prob", 0.0)),
            concurrency=CONCURRENCY,
        )
        served = ServedCritic(server, NAME, recipe.out)
        budget = Budget(rounds=len(ROLLOUTS))
        loop = await run_loop(server, served, judge, settings, budget, folder / "loop", console)
        if loop["critic"] is None:
            raise LoopError(f"no version beat a constant on held-out rollouts: see {folder / 'loop' / 'report.json'}")
        await served.current(Version.of(loop["critic"], recipe.out))  # this server may be a later one than the loop's
        console.print("[bold]evaluation on held-out problems[/bold]", highlight=False)
        evaluation = Evaluation(
            split="held_out",
            model=model["id"],
            samples=SAMPLES,
            sampling=sampling,
            settings=tuple(
                Setting(method, eta, None if (method, eta) == (METHODS[0], ETA) else OTHER_SAMPLES)
                for method in METHODS
                for eta in sorted({ETA, *OTHER_ETAS})
            ),
            critic=loop["critic"],
            guidance=settings.guidance,
            scored=False,
        )
        out = folder / "evaluation"
        evaluated = await evaluate(server, judge, task, evaluation, out, concurrency=CONCURRENCY // SAMPLES + 4)
    report = made(loop, evaluated, ETA, started)
    await asyncio.to_thread(plot, folder / "report.png", report)
    write_json(folder / "report.json", report)
    return report
