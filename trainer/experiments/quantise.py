"""A reference of fewer bits as an ordinary model: its weights are rounded, and stored in the dtype that they had.

Every matrix is rounded to `2^bits - 1` levels that are symmetric around 0, with a scale for each group of inputs. The
model computes what a quantised model computes, without its speed.
"""

import json
import shutil
from pathlib import Path

import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from trainer.experiments.fields import RecipeFields

MARKER = "quantised.json"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "lm_head.weight")


class Quantise(RecipeFields):
    """How weights are rounded.

    Attributes:
        bits: of a weight.
        group: the number of inputs that share a scale; a row's last group may have fewer.
        embeddings: whether the token embeddings are rounded, too.
    """

    bits: int = Field(default=4, ge=2, le=8)
    group: int = Field(default=64, ge=1)
    embeddings: bool = True


def rounded(weight: Tensor, bits: int, group: int) -> Tensor:
    """The nearest weights `[rows, inputs]` that can be stored in so many bits."""
    rows, inputs = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -inputs % group)).view(rows, -1, group)
    levels = 2 ** (bits - 1) - 1
    scale = padded.abs().amax(-1, keepdim=True).clamp_min(1e-12) / levels
    return ((padded / scale).round() * scale).view(rows, -1)[:, :inputs].to(weight.dtype)


def write_quantised(source: Path, folder: Path, how: Quantise) -> float:
    """Writes a copy of a model's folder with rounded weights; nothing happens if it is there.

    Returns:
        Relative error: the norm of what rounding changed, over the norm of the rounded matrices.
    """
    marker = folder / MARKER
    if marker.is_file():
        return float(json.loads(marker.read_text())["relative_error"])
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source, part, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "*.gguf"))
    changed = total = 0.0
    for path in tqdm(sorted(source.glob("*.safetensors")), desc="quantise", unit="file"):
        tensors = {}
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                before = file.get_tensor(name)
                skip = before.ndim != 2 or (name.endswith(EMBEDDINGS) and not how.embeddings)
                after = before if skip else rounded(before, how.bits, how.group)
                if not skip:
                    changed += float((after.float() - before.float()).square().sum())
                    total += float(before.float().square().sum())
                tensors[name] = after.contiguous()
        save_file(tensors, part / path.name, metadata={"format": "pt"})
    error = (changed / total) ** 0.5
    (part / MARKER).write_text(json.dumps({**how.model_dump(), "relative_error": error}))
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return error
