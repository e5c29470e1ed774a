"""The optimisation: AdamW with warm-up and cosine over the steps that `batching` plans.

A step's loss is the mean over its rollouts of the mean over their valid positions. Each pass contributes its *sum*
over rollouts, divided by the step's number of them, so that it does not matter how the step was cut into passes or
dealt to processes.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from qsharp_core.returns import ReturnDistribution
from trainer.training.batching import plan_epoch
from trainer.training.data import Rollout
from trainer.training.passes import Passes
from trainer.training.run import Progress, Run
from trainer.training.scorer import Scorer, outputs_of, summed_loss
from trainer.training.settings import TrainingError, TrainSettings

BETAS = (0.9, 0.95)

Watch = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Fit:
    """What an optimisation needs.

    Attributes:
        scorer: the critic, on its device.
        returns: its distribution.
        rollouts: to train on.
        passes: how steps are run here.
        accelerator: devices and processes.
        autocast: dtype of the forward pass, None for the weights' own.
        evaluate: held-out log-loss at the end of an epoch, None without held-out rollouts.
        watch: sees every line of metrics.
        checkpoint_every: steps.
    """

    scorer: Scorer
    returns: ReturnDistribution
    rollouts: Sequence[Rollout]
    settings: TrainSettings
    passes: Passes
    accelerator: Accelerator
    autocast: torch.dtype | None
    evaluate: Callable[[int, int], float | None]
    watch: Watch
    checkpoint_every: int


def learning_rate(step: int, steps: int, greatest: float, warmup: float) -> float:
    """Of step `step` of `1 … steps`: a linear rise over the first `warmup` of them, then a cosine towards 0."""
    rising = max(round(warmup * steps), 1)
    if step <= rising:
        return greatest * step / rising
    return greatest * 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising + 1)))


def optimizer_of(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over what has gradients; biases and norms do not decay."""
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (plain if p.ndim < 2 or name.endswith("bias") else decay).append(p)
    groups = [{"params": decay, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=BETAS)


def fit(job: Fit, run: Run) -> Progress:
    """Trains to the end from wherever the run's last checkpoint is; the scorer has the chosen weights then.

    Raises:
        TrainingError: the loss is not finite.
    """
    settings, accelerator = job.settings, job.accelerator
    main = accelerator.is_main_process
    plans = [
        plan_epoch(job.rollouts, settings.batch_tokens, job.passes.trees, settings.seed, epoch)
        for epoch in range(settings.epochs)
    ]
    total = sum(map(len, plans))
    # Dropout stays off: a step's loss must not hang on how it was cut, and today's decoders have none.
    job.scorer.eval()
    optimizer = optimizer_of(job.scorer, settings)
    progress = run.load(job.scorer, optimizer)
    model = accelerator.prepare_model(job.scorer)
    if main:
        run.forget_after(progress.step)
    accelerator.wait_for_everyone()

    step = 0
    with tqdm(total=total, initial=progress.step, unit="step", desc="training", disable=not main) as bar:
        for epoch, plan in enumerate(plans, start=1):
            for indices in plan:
                step += 1
                if step <= progress.step:
                    continue
                began = time.perf_counter()
                rate = learning_rate(step, total, settings.learning_rate, settings.warmup)
                loss, norm = _step(job, model, optimizer, indices, rate)
                line = {
                    "step": step,
                    "epoch": epoch,
                    "loss": loss,
                    "lr": rate,
                    "grad_norm": norm,
                    "rollouts": len(indices),
                    "tokens_per_second": round(
                        sum(job.rollouts[i].length for i in indices) / (time.perf_counter() - began), 1
                    ),
                }
                if main:
                    run.log(line)
                    job.watch(line)
                progress = progress.model_copy(update={"step": step})
                if indices is plan[-1]:
                    progress = _end_epoch(job, run, progress, epoch)
                if main and (step % job.checkpoint_every == 0 or step == total):
                    run.save(job.scorer, optimizer, progress)
                bar.update()
                bar.set_postfix({"epoch": epoch, "loss": f"{loss:.4f}", "tok/s": f"{line['tokens_per_second']:.0f}"})
    accelerator.wait_for_everyone()
    if settings.select == "best" and progress.best_epoch is not None:
        run.load_best(job.scorer)
    return progress


def _step(
    job: Fit, model: nn.Module, optimizer: torch.optim.Optimizer, indices: Sequence[int], rate: float
) -> tuple[float, float]:
    """One step of the optimizer: its loss, and the gradient's norm before clipping."""
    accelerator = job.accelerator
    batches = job.passes.batches(indices, job.rollouts)
    total = torch.zeros((), device=accelerator.device)
    for batch in batches:
        # Gradients are summed here, and averaged over processes once, at the last pass.
        last = batch is batches[-1]
        with nullcontext() if last else accelerator.no_sync(model):
            loss = _loss(job, model, batch.to(accelerator.device)) / len(indices)
            accelerator.backward(loss * accelerator.num_processes)
        total += loss.detach()
    loss_of_step = float(accelerator.reduce(total, "sum"))
    if not math.isfinite(loss_of_step):
        raise TrainingError(f"the loss became {loss_of_step}: lower --lr, or use --precision float32")
    norm = float(nn.utils.clip_grad_norm_(job.scorer.parameters(), job.settings.clip))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return loss_of_step, norm


def _loss(job: Fit, model: nn.Module, batch: Any) -> Tensor:
    device = job.accelerator.device.type
    with torch.autocast(device, job.autocast or torch.bfloat16, enabled=job.autocast is not None):
        outputs_L = outputs_of(model, batch)
    return summed_loss(job.returns, outputs_L, batch, job.settings.loss)


def _end_epoch(job: Fit, run: Run, progress: Progress, epoch: int) -> Progress:
    loss = job.evaluate(progress.step, epoch)
    if loss is None or (progress.best_loss is not None and loss >= progress.best_loss):
        return progress
    if job.accelerator.is_main_process and job.settings.select == "best":
        run.save_best(job.scorer)
    return progress.model_copy(update={"best_loss": loss, "best_epoch": epoch})
