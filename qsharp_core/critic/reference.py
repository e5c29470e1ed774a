"""Which reference a critic was made for: told by its folder, cheaply, without loading the model.

What is compared are a few fields of the config and a hash over a slice of every weight. Weights are rounded to
bfloat16 first: a copy of a model in float32 and its copy in bfloat16 are the same reference.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qsharp_core.errors import CriticError

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
# Tensors that some writers leave out because others hold the same.
TIED = ("lm_head.weight",)


class Reference(BaseModel):
    """A reference model, as a critic that was made for it names it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    weights: str  # SHA-256, see `identify`

    @property
    def described(self) -> str:
        """For people."""
        return (
            f"{self.model_type}, {self.num_hidden_layers} layers of {self.hidden_size}, {self.vocab_size} tokens, "
            f"weights {self.weights[:12]}"
        )


def identify(folder: Path) -> Reference:
    """What a reference's folder holds.

    `weights` is the SHA-256 over all tensors in the order of their names: the name, a zero byte, and the bytes of a
    slice, which is the first row of a matrix and all of a vector, rounded to bfloat16 where they are floating-point.
    `lm_head.weight`, which may be tied or not, is left out.

    Raises:
        CriticError: there is no `config.json`, or no safetensors.
    """
    from transformers import AutoConfig  # heavy: only those who ask pay for it

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CriticError(f"{folder} is no Hugging Face model: {error}") from error
    text = config.get_text_config()  # of a model that reads more than text
    found = hashlib.sha256()
    for name, values in _slices(folder):
        found.update(name.encode() + b"\0" + values.contiguous().view(torch.uint8).numpy().tobytes())
    return Reference(
        model_type=config.model_type,
        hidden_size=text.hidden_size,
        num_hidden_layers=text.num_hidden_layers,
        vocab_size=text.vocab_size,
        weights=found.hexdigest(),
    )


def _slices(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """A slice of each tensor, in the order of names."""
    where = {name: path for path in weight_files(folder) for name in _names(path) if name not in TIED}
    files = {path: safe_open(path, "pt") for path in {*where.values()}}
    for name in sorted(where):
        stored = files[where[name]].get_slice(name)
        shape = stored.get_shape()
        values = stored[:] if len(shape) < 2 else stored[:1]
        yield name, values.to(torch.bfloat16) if values.is_floating_point() else values


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a model's folder consists of.

    Raises:
        CriticError: there are none.
    """
    if (folder / INDEX).is_file():
        names = {*json.loads((folder / INDEX).read_bytes())["weight_map"].values()}
        return [folder / name for name in sorted(names)]
    found = [folder / WHOLE] if (folder / WHOLE).is_file() else sorted(folder.glob("*.safetensors"))
    if not found:
        raise CriticError(f"{folder} holds no safetensors")
    return found


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, "pt") as tensors:
            return list(tensors.keys())
    except (OSError, SafetensorError) as error:
        raise CriticError(f"{path} cannot be read: {error}") from error
