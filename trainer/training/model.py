"""A critic to start from: the first layers of a Hugging Face decoder with a fresh head, or an earlier version."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging

from qsharp_core.critic.checkpoint import CriticCard, fingerprint, load
from qsharp_core.critic.model import Critic, Head, HeadShape
from trainer.training.settings import TrainingError, TrainSettings


@dataclass(frozen=True)
class Start:
    """A critic in float32 with the gradients that its training needs, and where it comes from."""

    critic: Critic
    parent: CriticCard | None
    borrows: bool
    tokenizer_fingerprint: str | None


def start(settings: TrainSettings) -> Start:
    """The critic that a run begins with; the same for the same settings.

    Raises:
        TrainingError, CriticError: what it starts from cannot be read.
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


def local_folder(base: str, weights: bool = True) -> Path:
    """A folder as it is; a hub id is downloaded, `weights` with it.

    Raises:
        TrainingError: neither.
    """
    if Path(base).is_dir():
        return Path(base)
    patterns = ["*.json", "*.model", "*.txt", "*.jinja", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(base, allow_patterns=patterns))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise TrainingError(f"{base} is neither a folder nor a model that the hub gives: {error}") from error


def tokenizer_fingerprint(folder: Path) -> str | None:
    """Of the tokenizer in a model's folder, None where there is none."""
    if not (folder / "tokenizer_config.json").is_file() and not (folder / "tokenizer.json").is_file():
        return None
    return fingerprint(AutoTokenizer.from_pretrained(folder, local_files_only=True))


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' table of the weights that are left out on purpose."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # it takes a second, and the run has bars of its own
    try:
        yield
    finally:
        logging.set_verbosity(before)
