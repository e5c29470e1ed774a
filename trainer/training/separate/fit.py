"""The optimisation of a critic with a backbone of its own, over any number of processes.

A step's loss is the mean over its rollouts of the mean over their valid positions. Each pass contributes its *sum*
over rollouts, divided by the step's number of them, so that it does not matter how the step was cut into passes or
dealt to processes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from qsharp_core.returns import ReturnDistribution
from trainer.training.optimisation import Optimisation, OptimisationStep, adamw, run_parts
from trainer.training.plan import Clock, plan_of
from trainer.training.report import StepLine
from trainer.training.rollouts import Rollouts
from trainer.training.run import Progress, Run
from trainer.training.separate.batches import Batch
from trainer.training.separate.batching import plan_epoch, tokens_of
from trainer.training.separate.passes import Passes
from trainer.training.separate.scorer import LabelScorer, outputs_of, summed_loss
from trainer.training.settings import TrainSettings
from trainer.training.sharded import any_process, shard
from trainer.training.stopping import StopSignal
from trainer.training.trainable import Evaluate, Watch


@dataclass(frozen=True)
class Fit:
    """What an optimisation needs.

    Attributes:
        scorer: the critic, on its device.
        sharded: whether the critic is divided among the processes.
        returns: the distribution that the critic predicts.
        rollouts: to train on.
        settings: the run's.
        passes: how steps are run here.
        accelerator: devices and processes.
        autocast: dtype of the forward pass; None is the dtype of the weights.
        evaluate: the held-out log-loss at the end of an epoch.
        watch: sees every line of metrics.
        checkpoint_every: steps between two checkpoints.
    """

    scorer: LabelScorer
    sharded: bool
    returns: ReturnDistribution
    rollouts: Rollouts
    settings: TrainSettings
    passes: Passes
    accelerator: Accelerator
    autocast: torch.dtype | None
    evaluate: Evaluate
    watch: Watch
    checkpoint_every: int


def fit(job: Fit, run: Run) -> Progress:
    """Trains to the end from the run's last checkpoint on; at the end the scorer has the chosen weights.

    Raises:
        TrainingError: the loss is not finite.
    """
    settings, accelerator = job.settings, job.accelerator
    main = accelerator.is_main_process
    plan, clock = plan_of(settings, tokens_of(job.rollouts)), Clock(settings.max_seconds)
    lengths = job.rollouts.lengths

    def steps_of(epoch: int) -> list[list[int]]:
        return plan_epoch(job.rollouts, plan.batch, job.passes.trees, settings.seed, epoch)

    # Made again when its turn comes: all epochs' plans together would be larger than the index of the rollouts.
    sizes = [len(steps_of(epoch)) for epoch in range(plan.epochs)]
    total = sum(sizes)
    # Dropout stays off: a step's loss must not depend on how it was cut, and today's decoders have none.
    job.scorer.eval()
    if job.sharded:
        shard(job.scorer, job.scorer.layers, accelerator)
    optimizer = adamw(job.scorer, plan.learning_rate, settings.weight_decay)
    progress = run.load(job.scorer, optimizer)
    model = job.scorer if job.sharded else accelerator.prepare_model(job.scorer)
    if main:
        run.forget_after(progress.step)
    accelerator.wait_for_everyone()

    def after_step(epoch: int, indices: Sequence[int], step: OptimisationStep) -> None:
        nonlocal progress
        speed = round(int(lengths[list(indices)].sum()) / step.seconds, 1)
        if main:
            line = StepLine(
                step=step.number, epoch=epoch, loss=step.loss, lr=step.rate, grad_norm=step.norm,
                rollouts=len(indices), tokens_per_second=speed,
            )  # fmt: skip
            run.log(line)
            job.watch(line)
        progress = progress.model_copy(update={"step": step.number})
        optimisation.show(epoch=epoch, loss=f"{step.loss:.4f}", **{"tok/s": f"{speed:.0f}"})

    def after_epoch(epoch: int, step: OptimisationStep) -> None:
        nonlocal progress
        loss = job.evaluate(step.number, epoch)
        progress = run.keep_best(job.scorer, progress, loss, epoch, write=main and settings.select == "best")

    def checkpoint(step: OptimisationStep) -> None:
        # Told to one process alone, or to another one a step later: all of them stop at the same step.
        asked = any_process(accelerator, stop.asked)
        if step.number % job.checkpoint_every == 0 or step.number == total or asked:
            run.save(job.scorer, optimizer, progress, write=main)
        if asked:
            raise KeyboardInterrupt(
                f"stopped after step {step.number} of {total}; the same command with --resume goes on from there"
            )

    stop = StopSignal()
    with (
        stop,
        Optimisation(
            job.scorer.parameters(),
            [optimizer],
            clock.schedule(total, settings.warmup),
            clip=settings.clip,
            steps=total,
            done=progress.step,
            quiet=not main,
        ) as optimisation,
    ):
        run_parts(
            optimisation,
            _left(sizes, steps_of, progress.step),
            lambda indices: _gradients(job, model, indices),
            after_step=after_step,
            after_part=after_epoch,
            checkpoint=checkpoint,
            is_over=clock.is_over,
            enough=lambda epoch: plan.is_over(epoch - 1, progress.best_epoch),
        )
    accelerator.wait_for_everyone()
    if settings.select == "best" and progress.best_epoch is not None:
        run.load_best(job.scorer)
    return progress


def _left(
    sizes: Sequence[int], steps_of: Callable[[int], list[list[int]]], done: int
) -> Iterator[tuple[int, list[list[int]]]]:
    """The steps of each epoch, counted from 1, that are left when some are done."""
    before = 0
    for epoch, size in enumerate(sizes):
        left = max(done - before, 0)
        yield epoch + 1, [] if left >= size else steps_of(epoch)[left:]
        before += size


def _gradients(job: Fit, model: nn.Module, indices: Sequence[int]) -> float:
    """Adds the gradients of one step's loss, over all processes, and returns the loss."""
    accelerator = job.accelerator
    batches = job.passes.batches(indices, job.rollouts)
    total = torch.zeros((), device=accelerator.device)
    for batch in batches:
        # Gradients are summed here, and averaged over processes once, at the last pass. Whole ones might not fit where
        # they are sharded: there each pass's are averaged.
        at_once = job.sharded or batch is batches[-1]
        with nullcontext() if at_once else accelerator.no_sync(model):
            loss = _loss(job, model, batch.to(accelerator.device)) / len(indices)
            accelerator.backward(loss * accelerator.num_processes)
        total += loss.detach()
    return float(accelerator.reduce(total, "sum"))


def _loss(job: Fit, model: nn.Module, batch: Batch) -> Tensor:
    device = job.accelerator.device.type
    with torch.autocast(device, job.autocast or torch.bfloat16, enabled=job.autocast is not None):
        outputs_L = outputs_of(model, batch)
    return summed_loss(job.returns, outputs_L, batch, job.settings.loss)
