"""Star-Graph, all stages: the reference, its logged rollouts and the critic, the evaluation, the report.

    folder/reference/               the reference          reference.json   how its training went
    folder/reference.pt             of a training that was stopped
    folder/rollouts.db              what the server logged
    folder/critics/star-graph/1/    the critic             critic.json      how its training went
    folder/evaluation/              every sample
    folder/report.json, report.png

A stage whose result is there is not done again. One that was stopped is done from where it was, except the critic's
training, which is done from its start. The server runs while it is needed.
"""

import asyncio
import shutil
import time
from collections.abc import AsyncGenerator
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from qsharp_core.critic.checkpoint import fingerprint, save
from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.report import EvaluationReport
from trainer.evaluation.settings import Evaluation, every_setting
from trainer.experiments.star_graph import model, plot, reference, report, rollouts
from trainer.experiments.star_graph.critic import Buffer, CriticTrainer, fresh_critic, right_arm
from trainer.experiments.star_graph.report import CriticEntry, CriticLog, ReferenceLog, Stages, StarGraphOutcome
from trainer.experiments.star_graph.settings import StarGraphRecipe
from trainer.loop.activation import ServedCritic
from trainer.loop.versions import Version
from trainer.reports import write_json
from trainer.rewards.verifiers import OWN, Judge, TaskRef, Weighted
from trainer.rollouts.client import ServerClient
from trainer.rollouts.parameters import SamplingParameters
from trainer.serving import serve
from trainer.tasks.base import Task
from trainer.tasks.star_graph import draw, star_graph_task
from trainer.training.publish import is_published, publish

NAME = "star-graph"
ADMIN_KEY = "star-graph"  # of a server that listens on the loopback interface, while this runs
CHECKPOINT = "reference.pt"
PROBED = 300  # graphs that the critic's log is about

__all__ = ["StarGraphRecipe", "run"]


async def run(recipe: StarGraphRecipe, folder: Path, console: Console) -> StarGraphOutcome:
    """Does the stages that are missing in the folder, and prints the table.

    Raises:
        ServingError, RequestError, EvaluateError, JournalError, LoopError
    """
    torch.set_num_threads(recipe.threads)
    folder.mkdir(parents=True, exist_ok=True)
    task = star_graph_task(recipe.shape, recipe.evaluation.problems)
    if not (folder / "reference.json").exists():
        console.print(f"[bold]a reference for {recipe.shape}[/bold]", highlight=False)
        await asyncio.to_thread(_pretrain, recipe, folder)
    for path in folder.glob(f"*{CHECKPOINT}*"):  # and what a kill has left half written
        path.unlink()
    if not (folder / report.REPORT).exists():
        async with _server(recipe, folder, console) as client:
            if not (folder / "critic.json").exists():
                console.print("[bold]a critic from its rollouts[/bold]", highlight=False)
                await _learn(client, recipe, folder, task.sampling.max_tokens)
            console.print("[bold]evaluation on held-out graphs[/bold]", highlight=False)
            evaluated = await _evaluate(client, recipe, folder, task)
        stages = Stages(
            reference=ReferenceLog.read(folder / "reference.json"), critic=CriticLog.read(folder / "critic.json")
        )
        outcome = report.outcome(str(recipe.shape), recipe.shape.degree, stages, evaluated)
        await asyncio.to_thread(plot.plot, folder / "report.png", outcome)
        write_json(folder / report.REPORT, outcome.model_dump(mode="json"))
    outcome = StarGraphOutcome.model_validate_json((folder / report.REPORT).read_bytes())
    console.print(report.table(outcome))
    return outcome


def _pretrain(recipe: StarGraphRecipe, folder: Path) -> None:
    settings = recipe.reference
    reference_model, tokens = model.build(settings.model, recipe.labels, recipe.seed)
    log = reference.train(
        reference_model,
        tokens,
        [(recipe.shape_of(stage), stage.steps) for stage in settings.curriculum],
        batch=settings.batch,
        heads=settings.heads,
        weight=settings.weight,
        optimizer=settings.optimizer,
        device=_device(recipe),
        seed=recipe.seed,
        graphs=settings.graphs,
        checkpoint=folder / CHECKPOINT,
    )
    shutil.rmtree(folder / "reference", ignore_errors=True)
    model.save(folder / "reference", reference_model, tokens)
    log.write(folder / "reference.json")


async def _learn(client: ServerClient, recipe: StarGraphRecipe, folder: Path, max_tokens: int) -> None:
    began = time.monotonic()
    settings, device = recipe.critic, _device(recipe)
    tokens = AutoTokenizer.from_pretrained(folder / "reference")
    critic = fresh_critic(AutoModelForCausalLM.from_pretrained(folder / "reference", dtype=torch.float32))
    steps = sum(stage.steps for stage in settings.curriculum)
    asking = rollouts.Asking(
        model=NAME, samples=settings.samples, per_request=settings.per_request, ahead=4 * settings.per_request
    )
    probed = [draw(recipe.shape, f"probe-{i}") for i in range(PROBED)]
    log: list[CriticEntry] = []
    waited, losses = 0.0, []
    with CriticTrainer(critic, settings.optimizer, steps, device) as trainer:
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
                    losses.append(await asyncio.to_thread(trainer.step, batch))
                    if trainer.done % settings.log_every == 0 or trainer.done == steps:
                        arm = await asyncio.to_thread(right_arm, critic, tokens, probed, device)
                        log.append(CriticEntry(step=trainer.done, loss=sum(losses) / len(losses), right_arm=arm))
                        losses.clear()
                        trainer.show(graph=str(shape), loss=f"{log[-1].loss:.3f}", right_arm=f"{arm:.2f}")
    sampled = steps * settings.fresh * settings.samples
    fields = {
        "name": NAME,
        "head": "V",
        "distribution": {"kind": "bernoulli"},
        "tokenizer_fingerprint": fingerprint(tokens),
        "recommended_eta": recipe.eta,
        "task": str(recipe.shape),
        "rollouts": sampled,
    }
    write = partial(save, critic=critic.cpu().eval())
    await asyncio.to_thread(publish, folder / "critics", fields, write, f"{NAME}-{recipe.seed}", folder)
    CriticLog(
        seconds=time.monotonic() - began, seconds_waiting_for_rollouts=waited, rollouts=sampled, steps=steps, log=log
    ).write(folder / "critic.json")


async def _evaluate(client: ServerClient, recipe: StarGraphRecipe, folder: Path, task: Task) -> EvaluationReport:
    settings = recipe.evaluation
    version = Version.at(folder / "critics" / NAME / "1")
    assert is_published(version.folder), version
    await ServedCritic(client, NAME, folder / "critics").activate(version)
    evaluation = Evaluation(
        split="held_out",
        model=NAME,
        samples=1,
        sampling=SamplingParameters(max_tokens=task.sampling.max_tokens),
        settings=every_setting(settings.methods, settings.etas),
        critic=version.key,
        guidance=(("candidates", settings.candidates),),
        scored=False,
        seed=recipe.seed,
    )
    async with Judge([Weighted(OWN)]) as judge:
        evaluated = await evaluate(
            client, judge, TaskRef(task), evaluation, folder / "evaluation", concurrency=settings.concurrency
        )
        return evaluated.report


@asynccontextmanager
async def _server(recipe: StarGraphRecipe, folder: Path, console: Console) -> AsyncGenerator[ServerClient]:
    flags = [
        str(folder / "reference"), "--served-model-name", NAME, "--admin-key", ADMIN_KEY, "--rollouts",
        f"sqlite:///{(folder / 'rollouts.db').absolute()}", "--critic-root", str(folder), *recipe.server,
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
