"""What training starts from: the first layers of a Hugging Face decoder with a fresh head, or an earlier version."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

from qsharp_core.critic.checkpoint import CriticCard, load
from qsharp_core.critic.model import Critic, Head, HeadShape
from trainer.training.base import local_folder, quiet, tokenizer_fingerprint
from trainer.training.settings import TrainingError, TrainSettings


@dataclass(frozen=True)
class Start:
    """A critic to be trained, and where it comes from.

    Attributes:
        critic: in float32; what is trained requires gradients.
        parent: the card of the critic that is continued; None for a fresh one.
        borrows: whether the token embeddings are the reference's.
        tokenizer_fingerprint: of the tokenizer whose ids the critic reads; None if the base has no tokenizer.
    """

    critic: Critic
    parent: CriticCard | None
    borrows: bool
    tokenizer_fingerprint: str | None


def start(settings: TrainSettings) -> Start:
    """The critic that a run begins with, which is the same for the same settings.

    Raises:
        TrainingError, CriticError: the base, or the critic to continue, cannot be read.
    """
    torch.manual_seed(settings.seed)
    base = local_folder(settings.base) if settings.base else None
    if settings.continue_from is None:
        assert base is not None
        ids_of = local_folder(settings.tokenizer, weights=False) if settings.tokenizer else base
        return Start(_fresh(base, settings), None, settings.borrow_embeddings, tokenizer_fingerprint(ids_of))
    card, critic = load(settings.continue_from, reference=base)
    critic.requires_grad_(True)
    borrows = "input_embeddings" in card.borrow
    critic.backbone.get_input_embeddings().requires_grad_(not borrows)
    return Start(critic, card, borrows, card.tokenizer_fingerprint)


def _fresh(base: Path, settings: TrainSettings) -> Critic:
    try:
        config = AutoConfig.from_pretrained(base, local_files_only=True)
        if settings.layers is not None:
            _cut(config, settings.layers)
        with quiet():
            backbone, report = AutoModel.from_pretrained(
                base, config=config, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError) as error:
        raise TrainingError(f"{base} is no Hugging Face decoder: {error}") from error
    if report["missing_keys"]:
        raise TrainingError(f"{base}: weights are missing: {', '.join(sorted(report['missing_keys'])[:5])}")
    embeddings = backbone.get_input_embeddings()
    embeddings.requires_grad_(not settings.borrow_embeddings)
    returns = settings.returns
    shape = HeadShape(
        kind=settings.head,
        hidden=backbone.config.get_text_config().hidden_size,
        n_out=returns.n_out,
        vocab=embeddings.weight.shape[0],
        mlp=settings.mlp,
    )
    return Critic(backbone, Head(shape), returns)


def _cut(config: Any, layers: int) -> None:
    if layers > config.num_hidden_layers:
        raise TrainingError(f"the base has {config.num_hidden_layers} layers, --layers asks for {layers}")
    # Configurations that name each layer's kind check that there are as many names as layers.
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    config.num_hidden_layers = layers
