"""Folders of base models: where they are, their tokenizers, and loading without noise."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoTokenizer
from transformers.utils import logging

from qsharp_core.critic.checkpoint import fingerprint
from trainer.training.settings import TrainingError


def local_folder(base: str, weights: bool = True) -> Path:
    """The folder of a base model; a model that is named by its hub id is downloaded.

    Args:
        base: a folder or a hub id.
        weights: whether weights are downloaded, too.

    Raises:
        TrainingError: it is neither.
    """
    if Path(base).is_dir():
        return Path(base)
    patterns = ["*.json", "*.model", "*.txt", "*.jinja", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(base, allow_patterns=patterns))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise TrainingError(f"{base} is neither a folder nor a model that the hub gives: {error}") from error


def tokenizer_fingerprint(folder: Path) -> str | None:
    """The fingerprint of the tokenizer in a model's folder; None if there is no tokenizer."""
    if not (folder / "tokenizer_config.json").is_file() and not (folder / "tokenizer.json").is_file():
        return None
    return fingerprint(AutoTokenizer.from_pretrained(folder, local_files_only=True))


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' table of the weights that are left out on purpose, and its progress bar."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # it takes a second, and the run has bars of its own
    try:
        yield
    finally:
        logging.set_verbosity(before)
