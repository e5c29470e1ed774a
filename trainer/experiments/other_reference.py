"""A critic's folder for another reference than the one that it was trained with."""

import shutil
from pathlib import Path

from qsharp_core.critic import native_checkpoint
from qsharp_core.critic.checkpoint import load, save
from qsharp_core.critic.folder import BACKBONE
from qsharp_core.critic.reference import identify


def with_own_embeddings(critic: Path, reference: Path, folder: Path) -> Path:
    """Writes a copy of a critic that has the token embeddings it borrowed, so that it may guide other references.

    Args:
        critic: its folder.
        reference: the folder of the reference that it was trained with.
        folder: of the copy; nothing happens if it is there.

    Returns:
        The copy's folder.
    """
    if not folder.exists():
        card, loaded = load(critic, reference=reference)
        save(folder, card.model_copy(update={"borrow": []}), loaded)
        tokenizer = [p for p in (critic / BACKBONE).iterdir() if p.name not in ("config.json", "model.safetensors")]
        for path in tokenizer:
            shutil.copy(path, folder / BACKBONE / path.name)
    return folder


def made_for_another(critic: Path, reference: Path, other: Path, folder: Path) -> Path:
    """Writes a copy of a native critic that says it was made for another reference of the same shape.

    A server refuses a native critic of another reference, because its hidden states differ. The copy lets it be tried.

    Args:
        critic: its folder.
        reference: the folder of the reference that it was trained with.
        other: the folder of the reference that it is to guide.
        folder: of the copy; nothing happens if it is there.

    Returns:
        The copy's folder.
    """
    if not folder.exists():
        card, head = native_checkpoint.load_head(critic, reference)
        native_checkpoint.save(folder, card.model_copy(update={"made_for": identify(other)}), head)
    return folder
