"""Pre-training of the reference on true paths.

Beside the next token, heads that are thrown away afterwards predict the tokens after it, from the same hidden state.
They make the layers follow an arm's edges, which the next token alone gives no reason for at an arm's first node, and
which a critic that starts from these layers builds on. The arm itself is predicted no better for it: the reference
takes one at random.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from trainer.star_graph.graphs import Shape, draw
from trainer.star_graph.optimizer import Optimizer, OptimizerSpec

IGNORED = -100
LOGGED = 100  # steps


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
) -> list[dict[str, float]]:
    """Trains a model in place on fresh graphs.

    Args:
        stages: shapes and steps, easy ones first.
        batch: graphs of a step.
        heads: how many tokens after the next are predicted, too.
        weight: of their mean loss.
        graphs: how many different ones there are of each size; None: each is new.

    Returns:
        The mean losses of every 100 steps, in nats per token.
    """
    model.to(device).train()
    torch.manual_seed(seed)
    vocab = model.config.vocab_size
    ahead = nn.ModuleList(nn.Linear(model.config.hidden_size, vocab) for _ in range(heads)).to(device)
    steps = sum(count for _, count in stages)
    stepping = Optimizer(model.base_model, [model, ahead], optimizer, steps)
    log: list[dict[str, float]] = []
    sums = torch.zeros(2)
    with tqdm(total=steps, unit="step", desc="reference", smoothing=0.05) as bar:
        for step, (shape, ids, judged) in enumerate(batches(tokens, stages, batch, seed, graphs), 1):
            ids, judged = ids.to(device), judged.to(device)
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            soon = loss_of(model.get_output_embeddings(), hidden, judged, 1)
            later = [loss_of(head, hidden, judged, k) for k, head in enumerate(ahead, 2)]
            mean_later = torch.stack(later).mean() if later else torch.zeros_like(soon)
            (soon + weight * mean_later).backward()
            stepping.step()
            sums += torch.stack([soon, mean_later]).detach().cpu()
            bar.update()
            if step % LOGGED == 0 or step == steps:
                means = (sums / (step % LOGGED or LOGGED)).tolist()
                log.append({"step": step, "next": means[0], "later": means[1]})
                bar.set_postfix(graph=str(shape), next=f"{means[0]:.3f}", later=f"{means[1]:.3f}")
                sums.zero_()
    model.eval()
    return log


def batches(
    tokens: Any, stages: Sequence[tuple[Shape, int]], batch: int, seed: int, graphs: int | None = None
) -> Iterator[tuple[Shape, Tensor, Tensor]]:
    """Ids `[B, S]` of prompts and paths, and the same with all but the paths and their ends ignored."""
    end, pad = tokens.eos_token_id, tokens.pad_token_id
    for shape, steps in stages:
        for step in range(steps):
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
    """Mean cross-entropy in nats of the judged tokens `ahead` places on: hidden `[B, S, D]`, judged `[B, S]`."""
    wanted = judged[:, ahead:]
    where = wanted != IGNORED
    return F.cross_entropy(head(hidden[:, :-ahead][where]), wanted[where])
