"""The optimisation of a head: AdamW, one cycle of the learning rate, steps of nodes that are drawn anew in every pass.

Nothing of it is checkpointed: it takes a minute or so, and from the same seed and features ends with the same weights.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qsharp_core.critic.native import NativeHead
from qsharp_core.returns import Categorical, ReturnDistribution
from trainer.training.features.known import Features
from trainer.training.fit import learning_rate, optimizer_of
from trainer.training.native.nodes import Targets
from trainer.training.run import Progress
from trainer.training.settings import TrainingError, TrainSettings

PARTS = 10  # the head is measured after each of them
STATISTICS_AT_ONCE = 8192
LEAST_SCALE = 1e-4


@torch.no_grad()
def standardise(head: NativeHead, inputs: Features, embeddings: Tensor) -> None:
    """Sets what the head subtracts and divides by from nodes: their means and standard deviations."""
    parts = (head.hidden, head.token, head.log_ref)
    sums = [torch.zeros(2, len(part.mean), dtype=torch.float64) for part in parts]
    for index in torch.arange(len(inputs)).split(STATISTICS_AT_ONCE):
        values = inputs.hidden(index), embeddings[inputs.tokens_M[index]], inputs.log_ref_M[index][:, None]
        for total, found in zip(sums, values, strict=True):
            total += torch.stack([found.double().sum(0), found.double().square().sum(0)])
    for part, total in zip(parts, sums, strict=True):
        mean, square = total / len(inputs)
        part.mean.copy_(mean)
        part.scale.copy_((square - mean**2).clamp(min=0).sqrt().clamp(min=LEAST_SCALE))
    head.log_ref.get_buffer("least").copy_(inputs.log_ref_M.min())


def node_losses(
    returns: ReturnDistribution, outputs: Tensor, targets_NO: Tensor, means_N: Tensor, kind: str = "likelihood"
) -> Tensor:
    """Each node's loss `[N]` of outputs `[N, n_out]`: nats, or the squared error of the expected reward."""
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
    evaluate: Callable[[int, int], float | None],
    watch: Callable[[dict[str, Any]], None],
) -> Progress:
    """Trains the head where it is; it has the chosen weights then.

    Args:
        embeddings: the reference's, `[V, E]`.
        evaluate: held-out log-loss after a step of a tenth; the head is in evaluation mode.
        watch: sees every step.

    Raises:
        TrainingError: the loss is not finite.
    """
    device = head.bias.device
    assert settings.steps is not None
    torch.manual_seed(settings.seed)  # of dropout
    optimizer = optimizer_of(head, settings)
    draws = _draws(len(inputs), settings.batch_tokens, settings.seed)
    progress, best = Progress(), None
    ends = {round(settings.steps * part / PARTS): part for part in range(1, PARTS + 1)}
    head.train()
    with tqdm(total=settings.steps, unit="step", desc="training") as bar:
        for step in range(1, settings.steps + 1):
            began = time.perf_counter()
            rate = learning_rate(step, settings.steps, settings.learning_rate, settings.warmup)
            index = next(draws)
            outputs = head(
                inputs.hidden(index).to(device),
                embeddings[inputs.tokens_M[index]].to(device),
                inputs.log_ref_M[index].to(device),
            )
            weights, means = targets.weights_M[index].to(device), targets.means_M[index].to(device)
            losses = node_losses(returns, outputs, targets.targets_MO[index].to(device), means, settings.loss)
            loss = (losses * weights).sum() / weights.sum()
            if not math.isfinite(loss.item()):
                raise TrainingError(f"the loss became {loss.item()}: lower --lr")
            loss.backward()
            norm = float(nn.utils.clip_grad_norm_(head.parameters(), settings.clip))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            part = ends.get(step, progress.step * PARTS // settings.steps + 1)
            line = {"step": step, "epoch": part, "loss": loss.item(), "lr": rate, "grad_norm": norm}
            watch(line | {"nodes_per_second": round(len(index) / (time.perf_counter() - began), 1)})
            progress = progress.model_copy(update={"step": step})
            if step in ends:
                head.eval()
                held_out = evaluate(step, part)
                head.train()
                if held_out is not None and (progress.best_loss is None or held_out < progress.best_loss):
                    progress = progress.model_copy(update={"best_loss": held_out, "best_epoch": part})
                    best = {name: value.clone() for name, value in head.state_dict().items()}
            bar.update()
            bar.set_postfix({"loss": f"{loss.item():.4f}"}, refresh=False)
    head.eval()
    if settings.select == "best" and best is not None:
        head.load_state_dict(best)
    return progress


def _draws(nodes: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Batches of nodes: all of them in a new order, again and again; the last ones of an order go into the next."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.int64)
    while True:
        while len(left) < min(batch, nodes):
            left = torch.cat([left, torch.randperm(nodes, generator=generator)])
        yield left[:batch]
        left = left[batch:]
