"""The folder of a native critic on disk: read, checked and written.

critic.json          `CriticCard` with `"backbone": "reference"`, `"head": "Q"`, `"hidden": "last"`,
                     `"mlp": {"width": W}`, and `"made_for"`, the reference (`qsharp_core.critic.reference`)
head.safetensors     the tensors of `NativeHead`
"""

from pathlib import Path

import torch

from qsharp_core.critic import checkpoint
from qsharp_core.critic.checkpoint import CriticCard, CriticFiles
from qsharp_core.critic.folder import DEFAULT_MAX_BYTES, HEAD
from qsharp_core.critic.native import NativeHead, NativeShape
from qsharp_core.critic.reference import identify
from qsharp_core.critic.scoring.native import NativeScorer
from qsharp_core.disk import whole_folder
from qsharp_core.errors import CriticError


def save(folder: Path, card: CriticCard, head: NativeHead) -> None:
    """Writes a native critic's folder. It is there as a whole or not at all.

    Args:
        folder: must not exist.
        card: describes the head; `made_for` is `identify(reference_folder)`.
        head: stored in the dtype it has.

    Raises:
        FileExistsError: the folder exists; versions are never overwritten.
    """
    assert card.backbone == "reference"
    assert card.mlp is not None
    assert (head.shape.width, head.shape.n_out) == (card.mlp.width, card.returns().n_out), (head.shape, card)
    with whole_folder(folder) as temporary:
        checkpoint.write_card_and_head(temporary, card, head)


def load_head(folder: Path, reference: Path) -> tuple[CriticCard, NativeHead]:
    """The card and the head of a native critic, for further training. Does not touch the process's random state.

    Args:
        folder: folder of the critic.
        reference: folder of the reference that the critic is to be used with.

    Returns:
        The card, and the head in float32, in evaluation mode.

    Raises:
        CriticError: a file cannot be used, or the critic was made for another reference; the message says which.
    """
    read_files = checkpoint.read(folder)
    return read_files.card, _build_head(read_files, reference, checkpoint.input_embeddings(reference))


def load(
    folder: Path,
    reference: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[CriticCard, NativeScorer]:
    """The card of a native critic, and the critic as it is served.

    Args:
        folder: folder of the critic.
        reference: folder of the reference that the critic is to be used with.
        dtype: dtype of the table of tokens.
        device: where the critic is to score.

    Raises:
        CriticError: a file cannot be used, the critic was made for another reference, or there is no memory for the
            table.
    """
    read_files = checkpoint.read(folder)
    return read_files.card, build(read_files, reference, dtype=dtype, device=device)


def build(
    read_files: CriticFiles,
    reference: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> NativeScorer:
    """Builds a native critic, as it is served, from its files.

    Args:
        read_files: of the critic.
        reference: folder of the reference that the critic is to be used with.
        dtype: dtype of the table of tokens.
        device: where the critic is to score.
        max_bytes: that the table may have.

    Raises:
        CriticError: the files do not fit together, the critic was made for another reference, or there is no memory for
            the table.
    """
    card, embeddings = read_files.card, checkpoint.input_embeddings(reference)
    head = _build_head(read_files, reference, embeddings)
    size = len(embeddings) * head.shape.width * dtype.itemsize
    if size > max_bytes:
        raise CriticError(
            f"{card.key}: its table of tokens has {size / 2**30:.3g} GiB, and a critic may have "
            f"{max_bytes / 2**30:.3g}: see --critic-max-gib"
        )
    try:
        return NativeScorer(head, card.returns(), embeddings, dtype, device)
    except torch.OutOfMemoryError as error:
        raise CriticError(f"{card.key}: no room for its table of tokens, {size / 2**20:.0f} MiB on {device}") from error


def _build_head(read_files: CriticFiles, reference: Path, embeddings: torch.Tensor) -> NativeHead:
    folder, card = read_files.folder, read_files.card
    if card.backbone != "reference":
        raise CriticError(f"{folder} has a backbone of its own: it is no head on a reference's hidden states")
    assert card.made_for is not None
    assert card.mlp is not None
    served = identify(reference)
    if card.made_for != served:
        raise CriticError(
            f"{card.key} was made for another reference: for {card.made_for.described}; {reference} is "
            f"{served.described}"
        )
    with torch.device("meta"):
        head = NativeHead(NativeShape(served.hidden_size, embeddings.shape[1], card.mlp.width, card.returns().n_out))
    checkpoint.load_head(head, read_files.head, folder)
    for name, value in head.state_dict().items():
        if name.endswith(".scale") and not (value > 0).all():
            raise CriticError(f"{folder / HEAD}: {name} is not positive")
    return head.requires_grad_(False).eval()
