"""The optimisation of a head on the reference's hidden states, in steps of nodes that are drawn at random.

There are no checkpoints: training takes a minute or so, and from the same seed and features it ends with the same
weights.
"""

from collections.abc import Iterator
from itertools import islice, pairwise

import torch
from torch import Tensor

from qsharp_core.critic.native import NativeHead
from qsharp_core.returns import Categorical, ReturnDistribution
from trainer.training.features.known import Features
from trainer.training.native.nodes import Targets
from trainer.training.optimisation import Optimisation, OptimisationStep, adamw, run_parts
from trainer.training.plan import Clock, plan_of
from trainer.training.report import StepLine
from trainer.training.run import Progress, Run
from trainer.training.settings import TrainSettings
from trainer.training.trainable import Evaluate, Watch

PARTS = 10  # the head is measured after each of them
STATISTICS_AT_ONCE = 8192
LEAST_SCALE = 1e-4


@torch.no_grad()
def standardise(head: NativeHead, inputs: Features, embeddings: Tensor) -> None:
    """Sets what the head subtracts from its inputs and divides them by: means and standard deviations over nodes."""
    parts = (head.hidden, head.token, head.log_ref)
    sums = [torch.zeros(2, len(part.mean), dtype=torch.float64) for part in parts]
    for index in torch.arange(len(inputs)).split(STATISTICS_AT_ONCE):
        values = inputs.hidden(index), embeddings[inputs.tokens_M[index]], inputs.log_ref_M[index][:, None]
        for total, value in zip(sums, values, strict=True):
            total += torch.stack([value.double().sum(0), value.double().square().sum(0)])
    for part, total in zip(parts, sums, strict=True):
        mean, square = total / len(inputs)
        part.mean.copy_(mean)
        part.scale.copy_((square - mean**2).clamp(min=0).sqrt().clamp(min=LEAST_SCALE))
    head.log_ref.get_buffer("least").copy_(inputs.log_ref_M.min())


def node_losses(
    returns: ReturnDistribution, outputs: Tensor, targets_NO: Tensor, means_N: Tensor, kind: str = "likelihood"
) -> Tensor:
    """Each node's loss `[N]`.

    Args:
        returns: the distribution that is predicted.
        outputs: `[N, n_out]`.
        targets_NO: what a likelihood compares with; see `nodes.Targets`.
        means_N: mean rewards.
        kind: `likelihood` is the negative log-likelihood in nats, `squared` the squared error of the expected reward.
    """
    if kind == "squared":
        return (returns.mean(outputs) - means_N) ** 2
    if isinstance(returns, Categorical):
        return -(targets_NO * outputs.log_softmax(-1)).sum(-1)
    return returns.loss(outputs, targets_NO[:, 0])


def fit_head(
    head: NativeHead,
    returns: ReturnDistribution,
    inputs: Features,
    targets: Targets,
    embeddings: Tensor,
    settings: TrainSettings,
    run: Run,
    evaluate: Evaluate,
    watch: Watch,
) -> Progress:
    """Trains the head where it is; at the end it has the chosen weights.

    Args:
        head: on its device.
        returns: the distribution that the head predicts.
        inputs: features of M nodes.
        targets: what the nodes are trained towards.
        embeddings: the reference's, `[V, E]`.
        settings: the run's.
        run: keeps the lines of metrics and the best weights.
        evaluate: the held-out log-loss after a tenth of the steps; the head is in evaluation mode then.
        watch: sees every line of metrics.

    Raises:
        TrainingError: the loss is not finite.
    """
    device = head.bias.device
    plan, clock = plan_of(settings, len(inputs)), Clock(settings.max_seconds)
    torch.manual_seed(settings.seed)  # of dropout
    draws = _draws(len(inputs), plan.batch, settings.seed)
    progress = Progress()

    def gradients(index: Tensor) -> float:
        outputs = head(
            inputs.hidden(index).to(device),
            embeddings[inputs.tokens_M[index]].to(device),
            inputs.log_ref_M[index].to(device),
        )
        weights, means = targets.weights_M[index].to(device), targets.means_M[index].to(device)
        losses = node_losses(returns, outputs, targets.targets_MO[index].to(device), means, settings.loss)
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        return loss.item()

    def after_step(part: int, index: Tensor, step: OptimisationStep) -> None:
        nonlocal progress
        line = StepLine(
            step=step.number, epoch=part, loss=step.loss, lr=step.rate, grad_norm=step.norm,
            nodes_per_second=round(len(index) / step.seconds, 1),
        )  # fmt: skip
        run.log(line)
        watch(line)
        progress = progress.model_copy(update={"step": step.number})
        optimisation.show(loss=f"{step.loss:.4f}")

    def after_part(part: int, step: OptimisationStep) -> None:
        nonlocal progress
        head.eval()
        held_out = evaluate(step.number, part)
        head.train()
        progress = run.keep_best(head, progress, held_out, part, write=settings.select == "best")

    head.train()
    with Optimisation(
        head.parameters(),
        [adamw(head, plan.learning_rate, settings.weight_decay)],
        clock.schedule(plan.steps, settings.warmup),
        clip=settings.clip,
        steps=plan.steps,
    ) as optimisation:
        ends = [round(plan.steps * part / PARTS) for part in range(PARTS + 1)]
        parts = ((part, list(islice(draws, end - start))) for part, (start, end) in enumerate(pairwise(ends), start=1))
        run_parts(
            optimisation,
            parts,
            gradients,
            after_step=after_step,
            after_part=after_part,
            is_over=clock.is_over,
            enough=lambda part: plan.is_over(part - 1, progress.best_epoch),
        )
    head.eval()
    if settings.select == "best" and progress.best_epoch is not None:
        run.load_best(head)
    return progress


def _draws(nodes: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Yields batches of nodes without end, in one random order of all nodes after another; batches may span two."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.int64)
    while True:
        while len(left) < min(batch, nodes):
            left = torch.cat([left, torch.randperm(nodes, generator=generator)])
        yield left[:batch]
        left = left[batch:]
