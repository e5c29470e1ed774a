"""Identifies a reference model by its folder, cheaply and without loading the model.

A reference is identified by a few fields of its config and a hash over a slice of every weight. Weights are rounded to
bfloat16 first, so that a copy of a model in float32 and its copy in bfloat16 are the same reference.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qsharp_core.critic.folder import INDEX, WHOLE
from qsharp_core.errors import CriticError

# Tensors that some writers leave out because another tensor holds the same values.
TIED = ("lm_head.weight",)


class ReferenceIdentity(BaseModel):
    """What identifies a reference model; the field `made_for` of a native critic's card."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    model_type: str = Field(max_length=64)
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    weights: str = Field(max_length=64)  # SHA-256, see `identify`

    @property
    def described(self) -> str:
        """A description for messages."""
        return (
            f"{self.model_type}, {self.num_hidden_layers} layers of {self.hidden_size}, {self.vocab_size} tokens, "
            f"weights {self.weights[:12]}"
        )


def identify(folder: Path) -> ReferenceIdentity:
    """The identity of the reference in a folder.

    Its `weights` is the SHA-256 over all tensors in the order of their names: the name, a zero byte, and the bytes of a
    slice, which is the first row of a matrix and all of a vector, rounded to bfloat16 where it is floating-point.
    `lm_head.weight`, which may be tied or not, is left out.

    Raises:
        CriticError: the folder has no `config.json` or no safetensors.
    """
    from transformers import AutoConfig  # slow to import: only callers pay for it

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CriticError(f"{folder} is no Hugging Face model: {error}") from error
    text_config = config.get_text_config()  # differs from `config` in multimodal models
    digest = hashlib.sha256()
    for name, values in _slices(folder):
        digest.update(name.encode() + b"\0" + values.contiguous().view(torch.uint8).numpy().tobytes())
    return ReferenceIdentity(
        model_type=config.model_type,
        hidden_size=text_config.hidden_size,
        num_hidden_layers=text_config.num_hidden_layers,
        vocab_size=text_config.vocab_size,
        weights=digest.hexdigest(),
    )


def _slices(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The name and a slice of each tensor, in the order of names."""
    file_of = {name: path for path in weight_files(folder) for name in _names(path) if name not in TIED}
    files = {path: safe_open(path, "pt") for path in {*file_of.values()}}
    for name in sorted(file_of):
        stored = files[file_of[name]].get_slice(name)
        shape = stored.get_shape()
        values = stored[:] if len(shape) < 2 else stored[:1]
        yield name, values.to(torch.bfloat16) if values.is_floating_point() else values


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder.

    Raises:
        CriticError: there are none.
    """
    if (folder / INDEX).is_file():
        names = {*json.loads((folder / INDEX).read_bytes())["weight_map"].values()}
        return [folder / name for name in sorted(names)]
    files = [folder / WHOLE] if (folder / WHOLE).is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise CriticError(f"{folder} holds no safetensors")
    return files


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, "pt") as tensors:
            return list(tensors.keys())
    except (OSError, SafetensorError) as error:
        raise CriticError(f"{path} cannot be read: {error}") from error
