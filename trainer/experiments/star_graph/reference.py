"""Pre-training of the reference on true paths.

Beside the next token, heads that are thrown away afterwards predict the tokens after it, from the same hidden state.
They make the layers follow an arm's edges, which the next token alone gives no reason for at an arm's first node, and
which a critic that starts from these layers builds on. The arm itself is predicted no better for it: the reference
takes one at random.
"""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from qsharp_core.disk import whole_file
from trainer.experiments.star_graph.optimizer import OptimizerSpec, optimisation, optimizers
from trainer.experiments.star_graph.report import ReferenceEntry, ReferenceLog
from trainer.tasks.star_graph import Shape, draw

IGNORED = -100
LOGGED = 100  # steps
KEPT = 60.0
"""Seconds between two checkpoints."""


def train(
    model: Any,
    tokens: Any,
    stages: Sequence[tuple[Shape, int]],
    *,
    batch: int,
    heads: int,
    weight: float,
    optimizer: OptimizerSpec,
    device: torch.device,
    seed: int = 0,
    graphs: int | None = None,
    checkpoint: Path | None = None,
) -> ReferenceLog:
    """Trains a model in place on fresh graphs.

    Args:
        model: a causal language model.
        tokens: its tokenizer.
        stages: shapes and numbers of steps, easy ones first.
        batch: graphs of a step.
        heads: the number of tokens after the next one that are predicted, too.
        weight: of their mean loss.
        optimizer: how steps are made.
        device: of the training.
        seed: of the graphs and of the heads.
        graphs: the number of different graphs of each size; None means that each graph is new.
        checkpoint: a file, written about once a minute, from which a training that was stopped goes on.

    Returns:
        How long it took, and the mean losses of every 100 steps.

    Raises:
        TrainingError: the loss is not finite.
    """
    began = kept = time.monotonic()
    model.to(device).train()
    torch.manual_seed(seed)
    vocab = model.config.vocab_size
    ahead = nn.ModuleList(nn.Linear(model.config.hidden_size, vocab) for _ in range(heads)).to(device)
    steps = sum(count for _, count in stages)
    log: list[ReferenceEntry] = []
    sums = torch.zeros(2)

    def gradients(ids: Tensor, judged: Tensor) -> float:
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        soon = loss_of(model.get_output_embeddings(), hidden, judged, 1)
        later = [loss_of(head, hidden, judged, k) for k, head in enumerate(ahead, 2)]
        mean_later = torch.stack(later).mean() if later else torch.zeros_like(soon)
        loss = soon + weight * mean_later
        loss.backward()
        sums.add_(torch.stack([soon, mean_later]).detach().cpu())
        return loss.item()

    chosen = optimizers(model.base_model, [model, ahead], optimizer)
    if checkpoint is not None and checkpoint.exists():
        before = _load(checkpoint, model, ahead, chosen)
        log, began = list(before.log), began - before.seconds
    done = log[-1].step if log else 0
    with optimisation([model, ahead], chosen, optimizer, steps, "reference", done) as training:
        for shape, ids, judged in batches(tokens, stages, batch, seed, graphs, done):
            step = training.step(partial(gradients, ids.to(device), judged.to(device))).number
            if step % LOGGED == 0 or step == steps:
                means = (sums / (step % LOGGED or LOGGED)).tolist()
                log.append(ReferenceEntry(step=step, next=means[0], later=means[1]))
                training.show(graph=str(shape), next=f"{means[0]:.3f}", later=f"{means[1]:.3f}")
                sums.zero_()
                if checkpoint is not None and time.monotonic() - kept >= KEPT:
                    kept = time.monotonic()
                    _save(checkpoint, model, ahead, chosen, ReferenceLog(seconds=kept - began, log=log))
    model.eval()
    return ReferenceLog(seconds=time.monotonic() - began, log=log)


def _save(path: Path, model: Any, ahead: nn.Module, chosen: Sequence[Optimizer], log: ReferenceLog) -> None:
    state = {
        "model": model.state_dict(), "ahead": ahead.state_dict(), "optimizers": [one.state_dict() for one in chosen],
        "log": log.model_dump(),
    }  # fmt: skip
    with whole_file(path) as part:
        torch.save(state, part)


def _load(path: Path, model: Any, ahead: nn.Module, chosen: Sequence[Optimizer]) -> ReferenceLog:
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    ahead.load_state_dict(state["ahead"])
    for one, found in zip(chosen, state["optimizers"], strict=True):
        # The schedule starts from the greatest rates, and not from those of the last step.
        one.load_state_dict({**found, "param_groups": one.state_dict()["param_groups"]})
    return ReferenceLog.model_validate(state["log"])


def batches(
    tokens: Any,
    stages: Sequence[tuple[Shape, int]],
    batch: int,
    seed: int,
    graphs: int | None = None,
    done: int = 0,
) -> Iterator[tuple[Shape, Tensor, Tensor]]:
    """Yields shapes, token ids `[B, S]` of prompts and paths, and the same ids with all but the paths ignored.

    Of the steps of all stages the first `done` are left out.
    """
    end, pad = tokens.eos_token_id, tokens.pad_token_id
    for shape, steps in stages:
        first, done = min(done, steps), max(done - steps, 0)
        for step in range(first, steps):
            numbers = [(step * batch + i) % (graphs or steps * batch) for i in range(batch)]
            drawn = [draw(shape, f"pretrain-{seed}-{number}") for number in numbers]
            prompts = tokens([graph.prompt for graph in drawn])["input_ids"]
            paths = tokens([graph.path for graph in drawn])["input_ids"]
            size = max(len(a) + len(b) + 1 for a, b in zip(prompts, paths, strict=True))
            ids = torch.full((batch, size), pad)
            judged = torch.full((batch, size), IGNORED)
            for row, (prompt, path) in enumerate(zip(prompts, paths, strict=True)):
                whole = torch.tensor([*prompt, *path, end])
                ids[row, : len(whole)] = whole
                judged[row, len(prompt) : len(whole)] = whole[len(prompt) :]
            yield shape, ids, judged


def loss_of(head: nn.Module, hidden: Tensor, judged: Tensor, ahead: int) -> Tensor:
    """The mean cross-entropy, in nats, of predicting the token `ahead` places on, where it is judged.

    Args:
        head: maps hidden states to logits.
        hidden: `[B, S, D]`.
        judged: `[B, S]` token ids, `IGNORED` where they are not judged.
        ahead: from 1.
    """
    wanted = judged[:, ahead:]
    where = wanted != IGNORED
    return F.cross_entropy(head(hidden[:, :-ahead][where]), wanted[where])
