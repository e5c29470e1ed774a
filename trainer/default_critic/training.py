"""A critic from the reference's first layers, fitted to the trees of its rollouts."""

import json
import random
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel, get_cosine_schedule_with_warmup

from qsharp_core.critic.checkpoint import BernoulliCard, CriticCard, MLPCard, save
from qsharp_core.critic.model import Critic, Head, HeadShape
from qsharp_core.returns import Bernoulli
from trainer.default_critic.prefix import ATTENTION, common_prefix, prefix_keys_values
from trainer.default_critic.rollouts import Rollout, read_rollouts
from trainer.default_critic.trees import Tree, build_tree, inputs, pruned, thinned
from trainer.tasks import sums
from trainer.training.measures import auc
from trainer.training.siblings import ONLY_WAY

VALIDATION_TREES = 8
"""Problems scored in one forward pass of the validation."""
WARM_UP_STEPS = 50
VALIDATE_EVERY = 500


@dataclass(frozen=True)
class TrainSettings:
    """How a critic is trained.

    A step takes `problems`, of each `rollouts` at random. `hide_question` and `hide_token` are the probabilities that
    a problem's question, or any one token, is hidden from what comes after it.
    """

    layers: int
    mlp: int
    learning_rate: float
    weight_decay: float
    steps: int
    problems: int
    rollouts: int
    hide_question: float
    hide_token: float
    bfloat16: bool
    seed: int


def train(
    reference: Path, rollouts_path: Path, output: Path, settings: TrainSettings, version: str, eta: float
) -> None:
    """Train a critic on the rollouts; write its folder in bfloat16, with validation metrics."""
    if output.exists():
        raise SystemExit(f"{output} exists: choose another --output, or remove it")
    by_problem: dict[sums.Problem, list[Rollout]] = defaultdict(list)
    for rollout in read_rollouts(rollouts_path):
        by_problem[rollout.problem].append(rollout)
    if not by_problem:
        raise SystemExit(f"{rollouts_path} holds no rollouts: draw them first with the command `rollouts`")
    prefix_ids = common_prefix([rollouts[0].prompt for rollouts in by_problem.values()])
    held_back = validation_triples()
    training = [rollouts for p, rollouts in by_problem.items() if sums.unordered(p) not in held_back]
    validation = [rollouts for p, rollouts in by_problem.items() if sums.unordered(p) in held_back]

    torch.manual_seed(settings.seed)
    random.seed(settings.seed)
    critic = truncated_critic(reference, settings.layers, settings.mlp)
    fit(critic, prefix_ids, training, validation, settings)

    # Metrics of what is stored: the weights as they are after rounding.
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.copy_(parameter.bfloat16())
    metrics = validate(critic, prefix_ids, validation)
    config = cast(PreTrainedConfig, critic.backbone.config)
    config.update({"dtype": torch.bfloat16, "architectures": ["LlamaModel"]})
    card = CriticCard.model_validate(
        {
            "name": "sums",
            "version": version,
            "head": "V",
            "distribution": BernoulliCard(kind="bernoulli"),
            "mlp": MLPCard(width=settings.mlp),
            "borrow": ["input_embeddings"],
            "recommended_eta": eta,
            "reference": "SmolLM2-135M-Instruct",
            "sampling_policy": {"temperature": 1.0, "top_p": 1.0, "top_k": 0},
            "metrics": {"validation": metrics, "training_rollouts": sum(map(len, training))},
            "training": asdict(settings),
        }
    )
    save(output, card, critic.to(torch.bfloat16))
    print(json.dumps(metrics, indent=2))


def truncated_critic(reference: Path, layers: int, width: int) -> Critic:
    """The reference's first `layers` layers with a fresh MLP head of `width` hidden units.

    The token embeddings stay the reference's, frozen: they are 5/6 of so small a critic.
    """
    backbone = AutoModel.from_pretrained(
        reference, dtype=torch.float32, num_hidden_layers=layers, attn_implementation=ATTENTION
    )
    backbone.get_input_embeddings().requires_grad_(False)
    config = backbone.config
    shape = HeadShape("V", config.hidden_size, n_out=1, vocab=config.vocab_size, mlp=width)
    return Critic(backbone, Head(shape), Bernoulli())


def fit(
    critic: Critic,
    prefix_ids: list[int],
    training: list[list[Rollout]],
    validation: list[list[Rollout]],
    settings: TrainSettings,
) -> None:
    """AdamW over small random subtrees; each entry of `training` and `validation` is a problem's rollouts."""
    parameters = [p for p in critic.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, WARM_UP_STEPS, settings.steps)
    trees = [build_tree(rollouts, len(prefix_ids)) for rollouts in training]
    order: list[Tree] = []
    recent = 0.0
    with tqdm(total=settings.steps, unit="step") as bar:
        for step in range(1, settings.steps + 1):
            batch: list[Tree] = []
            while len(batch) < settings.problems:
                order = order or random.sample(trees, len(trees))
                tree = order.pop()
                some = random.sample(tree.paths, min(settings.rollouts, len(tree.paths)))
                batch.append(thinned(pruned(tree, some), settings.hide_question, settings.hide_token))
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.bfloat16):
                loss = tree_loss(critic, prefix_ids, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            recent += (loss.item() - recent) / min(step, 100)
            bar.update()
            bar.set_postfix({"loss": f"{recent:.4f}"})
            if step % VALIDATE_EVERY == 0:
                metrics = {"step": step, "loss": recent, **validate(critic, prefix_ids, validation)}
                tqdm.write(json.dumps({k: v and round(v, 4) for k, v in metrics.items()}))


def score_trees(critic: Critic, prefix_ids: list[int], trees: list[Tree]) -> Tensor:
    """The critic's outputs at every node, padded on the right: `[trees, nodes, n_out]`."""
    backbone = cast(PreTrainedModel, critic.backbone)
    hidden = backbone(
        **inputs(trees, len(prefix_ids)), use_cache=False, prefix=prefix_keys_values(backbone, prefix_ids)
    ).last_hidden_state
    return critic.head.at_tokens(hidden)


def tree_loss(critic: Critic, prefix_ids: list[int], trees: list[Tree]) -> Tensor:
    """Negative log-likelihood in nats, a weighted mean over nodes.

    A node counts once, however many rollouts label it; one that is the only way on counts less, because guidance
    weighs tokens against those that could stand in their place.
    """
    outputs = score_trees(critic, prefix_ids, trees)
    total = outputs.new_zeros(())
    weights = 0.0
    for row, tree in zip(outputs, trees, strict=True):
        nats_N = critic.distribution.loss(row[: len(tree.tokens_N)], tree.rewards_N)
        weight_N = torch.where(tree.decides_N, 1.0, ONLY_WAY) * (tree.labels_N > 0)
        total = total + (nats_N * weight_N).sum()
        weights += float(weight_N.sum())
    return total / weights


@torch.inference_mode()
def validate(critic: Critic, prefix_ids: list[int], problems: list[list[Rollout]]) -> dict[str, float | None]:
    """Log-loss in nats over all labels, and how well the critic tells rollouts apart.

    `auc_middle` and `auc_last` are over whole rollouts, at their middle and their last token. `auc_branch` is over
    branches, at the token that was forced: what guidance asks.
    """
    nats = labels = 0.0
    at: dict[str, tuple[list[float], list[bool]]] = {k: ([], []) for k in ("middle", "last", "branch")}
    for start in range(0, len(problems), VALIDATION_TREES):
        some = problems[start : start + VALIDATION_TREES]
        trees = [build_tree(rollouts, len(prefix_ids)) for rollouts in some]
        scored = score_trees(critic, prefix_ids, trees)
        for rollouts, tree, padded in zip(some, trees, scored, strict=True):
            outputs = padded[: len(tree.tokens_N)]
            nats += float((critic.distribution.loss(outputs, tree.rewards_N) * tree.labels_N).sum())
            labels += float(tree.labels_N.sum())
            for rollout, path in zip(rollouts, tree.paths, strict=True):
                places = {"branch": rollout.given - 1} if rollout.given else {"middle": len(path) // 2, "last": -1}
                for name, place in places.items():
                    at[name][0].append(float(outputs[path[place], 0]))
                    at[name][1].append(rollout.reward > 0.5)
    curves = {f"auc_{name}": auc(np.array(x), np.array(y), np.ones(len(x))) for name, (x, y) in at.items() if x}
    return {"log_loss": nats / labels, **curves, "rollouts": float(sum(map(len, problems)))}


def validation_triples() -> set[sums.Problem]:
    """Twelve training triples whose rollouts only measure."""
    triples = sorted({sums.unordered(p) for p in sums.problems("train")})
    return set(random.Random(0).sample(triples, 12))
