"""Star-Graph, all stages: the reference, its logged rollouts and the critic, the evaluation, the report.

    folder/reference/               the reference          reference.json   how its training went
    folder/rollouts.db              what the server logged
    folder/critics/star-graph/1/    the critic             critic.json      how its training went
    folder/evaluation/              every sample
    folder/report.json, report.png

A stage whose result is there is not done again; one that was stopped is done from its start, the evaluation from where
it was. The server runs while it is needed.
"""

import asyncio
import json
import shutil
import time
from collections.abc import AsyncGenerator
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from qsharp_core.critic.checkpoint import CARD, fingerprint, save
from trainer.client import ServerClient
from trainer.collect import Sampling
from trainer.evaluate import Evaluation, Setting, evaluate, write_json
from trainer.loop.activation import ServedCritic, Version
from trainer.rewards.verifiers import OWN, Judge, TaskRef, Weighted
from trainer.serving import serve
from trainer.star_graph import model, plot, reference, report, rollouts
from trainer.star_graph.critic import Buffer, Learner, fresh_critic, right_arm
from trainer.star_graph.graphs import draw
from trainer.star_graph.settings import StarGraphRecipe
from trainer.tasks.base import Task
from trainer.tasks.star_graph import star_graph_task
from trainer.training.publish import publish

NAME = "star-graph"
ADMIN_KEY = "star-graph"  # of a server that listens on the loopback interface, while this runs
PROBED = 300  # graphs that the critic's log is about

__all__ = ["StarGraphRecipe", "run"]


async def run(recipe: StarGraphRecipe, folder: Path, console: Console) -> dict[str, Any]:
    """Does what is missing in the folder, and shows the table.

    Returns:
        The report.

    Raises:
        ServingError, ServerError, EvaluateError, JournalError, LoopError
    """
    torch.set_num_threads(recipe.threads)
    folder.mkdir(parents=True, exist_ok=True)
    task = star_graph_task(recipe.shape, recipe.evaluation.problems)
    if not (folder / "reference.json").exists():
        console.print(f"[bold]a reference for {recipe.shape}[/bold]", highlight=False)
        await asyncio.to_thread(_pretrain, recipe, folder)
    if not (folder / report.REPORT).exists():
        async with _server(recipe, folder, console) as client:
            if not (folder / "critic.json").exists():
                console.print("[bold]a critic from its rollouts[/bold]", highlight=False)
                await _learn(client, recipe, folder, task.sampling.max_tokens)
            console.print("[bold]evaluation on held-out graphs[/bold]", highlight=False)
            evaluated = await _evaluate(client, recipe, folder, task)
        stages = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("reference", "critic")}
        made = report.made(str(recipe.shape), recipe.shape.degree, stages, evaluated)
        await asyncio.to_thread(plot.plot, folder / "report.png", made)
        write_json(folder / report.REPORT, made)
    found: dict[str, Any] = json.loads((folder / report.REPORT).read_text())
    console.print(report.table(found))
    return found


def _pretrain(recipe: StarGraphRecipe, folder: Path) -> None:
    began = time.monotonic()
    settings = recipe.reference
    made, tokens = model.build(settings.model, recipe.labels, recipe.seed)
    log = reference.train(
        made,
        tokens,
        [(recipe.shape_of(stage), stage.steps) for stage in settings.curriculum],
        batch=settings.batch,
        heads=settings.heads,
        weight=settings.weight,
        optimizer=settings.optimizer,
        device=_device(recipe),
        seed=recipe.seed,
        graphs=settings.graphs,
    )
    shutil.rmtree(folder / "reference", ignore_errors=True)
    model.save(folder / "reference", made, tokens)
    write_json(folder / "reference.json", {"seconds": time.monotonic() - began, "log": log})


async def _learn(client: ServerClient, recipe: StarGraphRecipe, folder: Path, max_tokens: int) -> None:
    began = time.monotonic()
    settings, device = recipe.critic, _device(recipe)
    tokens = AutoTokenizer.from_pretrained(folder / "reference")
    critic = fresh_critic(AutoModelForCausalLM.from_pretrained(folder / "reference", dtype=torch.float32))
    steps = sum(stage.steps for stage in settings.curriculum)
    learner = Learner(critic, settings.optimizer, steps, device)
    asking = rollouts.Asking(
        model=NAME, samples=settings.samples, per_request=settings.per_request, ahead=4 * settings.per_request
    )
    probed = [draw(recipe.shape, f"probe-{i}") for i in range(PROBED)]
    log: list[dict[str, float]] = []
    waited, losses = 0.0, []
    with tqdm(total=steps, unit="step", desc="critic", smoothing=0.05) as bar:
        for number, stage in enumerate(settings.curriculum):
            buffer = Buffer(settings.buffer, recipe.seed)
            shape, seeds = recipe.shape_of(stage), f"rollouts-{recipe.seed}-{number}"
            async with rollouts.fresh(client, asking, shape, max_tokens, seeds) as stream:
                for _ in range(stage.steps):
                    asked = time.monotonic()
                    new = [await anext(stream) for _ in range(settings.fresh)]
                    waited += time.monotonic() - asked
                    buffer.add(new)
                    batch = [*new, *buffer.draw(settings.batch - settings.fresh)]
                    losses.append(await asyncio.to_thread(learner.step, batch))
                    bar.update()
                    if bar.n % settings.log_every == 0 or bar.n == steps:
                        arm = await asyncio.to_thread(right_arm, critic, tokens, probed, device)
                        log.append({"step": bar.n, "loss": sum(losses) / len(losses), "right_arm": arm})
                        losses.clear()
                        bar.set_postfix(graph=str(shape), loss=f"{log[-1]['loss']:.3f}", right_arm=f"{arm:.2f}")
    fields = {
        "name": NAME,
        "head": "V",
        "distribution": {"kind": "bernoulli"},
        "tokenizer_fingerprint": fingerprint(tokens),
        "recommended_eta": recipe.eta,
        "task": str(recipe.shape),
        "rollouts": steps * settings.fresh * settings.samples,
    }
    write = partial(save, critic=critic.cpu().eval())
    await asyncio.to_thread(publish, folder / "critics", fields, write, f"{NAME}-{recipe.seed}")
    spent = {"seconds": time.monotonic() - began, "seconds_waiting_for_rollouts": waited}
    write_json(folder / "critic.json", {**spent, "rollouts": fields["rollouts"], "steps": steps, "log": log})


async def _evaluate(client: ServerClient, recipe: StarGraphRecipe, folder: Path, task: Task) -> dict[str, Any]:
    settings = recipe.evaluation
    version = Version.at(folder / "critics" / NAME / "1")
    assert (version.folder / CARD).is_file(), version
    await ServedCritic(client, NAME, folder / "critics").activate(version)
    evaluation = Evaluation(
        split="held_out",
        model=NAME,
        samples=1,
        sampling=Sampling(max_tokens=task.sampling.max_tokens),
        settings=tuple(Setting(method, eta) for method in settings.methods for eta in settings.etas),
        critic=version.key,
        guidance=(("candidates", settings.candidates),),
        scored=False,
        seed=recipe.seed,
    )
    async with Judge([Weighted(OWN)]) as judge:
        return await evaluate(
            client, judge, TaskRef(task), evaluation, folder / "evaluation", concurrency=settings.concurrency
        )


@asynccontextmanager
async def _server(recipe: StarGraphRecipe, folder: Path, console: Console) -> AsyncGenerator[ServerClient]:
    flags = [
        str(folder / "reference"), "--served-model-name", NAME, "--admin-key", ADMIN_KEY, "--rollouts",
        f"sqlite:///{(folder / 'rollouts.db').absolute()}", *recipe.server,
    ]  # fmt: skip
    with ExitStack() as stack:
        with console.status("starting the server"):
            url = await asyncio.to_thread(stack.enter_context, serve(flags, folder / "server.log"))
        async with ServerClient(url, key=ADMIN_KEY, connections=recipe.evaluation.concurrency) as client:
            yield client


def _device(recipe: StarGraphRecipe) -> torch.device:
    if recipe.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(recipe.device)
