"""Tensors in safetensors files that somebody else has written.

They are mapped and not read: a tensor takes memory when its values are looked at, and those are the file's own pages.
So shapes can be compared with what a model has before anything is taken. A mapped tensor changes if its file does: copy
what is kept.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qsharp_core.critic import files
from qsharp_core.critic.folder import INDEX, WEIGHTS, WHOLE
from qsharp_core.errors import CriticError

MOST_INDEX = 8 * 2**20
MOST_HEADER = 8 * 2**20
DTYPES = {"F64", "F32", "F16", "BF16"}

Tensors = Mapping[str, Tensor]


def mapped(path: Path) -> Tensors:
    """The tensors of a file, by name.

    Raises:
        CriticError: names the file, and the tensor if it is one that is wrong.
    """
    length = int.from_bytes(_beginning(path), "little")
    if length > MOST_HEADER:
        raise CriticError(f"{path}: its header says that it has {length} bytes; it may have {MOST_HEADER}")
    found: dict[str, Tensor] = {}
    try:
        with safe_open(path, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - not a dict
                dtype = stored.get_slice(name).get_dtype()
                if dtype not in DTYPES:
                    raise CriticError(f"{path}: {name!r:.120} has dtype {dtype}; wanted is one of {sorted(DTYPES)}")
                found[name] = stored.get_tensor(name)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise CriticError(f"{path} cannot be read: {error}") from error
    return found


def mapped_model(folder: Path) -> Tensors:
    """The tensors of a Hugging Face model's folder: of one file, or of those that an index names.

    Raises:
        CriticError: names the file, and the tensor if it is one that is wrong.
    """
    if (folder / WHOLE).exists() or not (folder / INDEX).exists():
        return mapped(folder / WHOLE)
    path = folder / INDEX
    file_of = files.read_object(path, MOST_INDEX).get("weight_map")
    if not isinstance(file_of, dict) or not file_of:
        raise CriticError(f"{path}: weight_map must name the file of each tensor")
    names = [*dict.fromkeys(map(_text, file_of.values()))]
    for name in names:
        if Path(name).name != name or not name.endswith(WEIGHTS) or not (folder / name).is_file():
            raise CriticError(f"{path}: weight_map names {name!r:.120}, which is no safetensors file of this folder")
    found: dict[str, Tensor] = {}
    for name in names:
        for key, value in mapped(folder / name).items():
            if file_of.get(key) != name:
                raise CriticError(f"{path}: weight_map does not say that {key!r:.120} is in {name}")
            found[key] = value
    if missing := file_of.keys() - found.keys():
        raise CriticError(f"{path}: weight_map names tensors that no file has: {_some(missing)}")
    return found


def check_finite(tensors: Tensors, dtype: torch.dtype, path: Path, may_be_minus_infinity: str | None = None) -> None:
    """Refuses values that are not finite, or would not be in the dtype that they are used in.

    Args:
        tensors: by name; all values are read.
        dtype: that they are used in.
        path: where they are from, for the message.
        may_be_minus_infinity: name of a tensor that may be `-inf`, too.

    Raises:
        CriticError: names the tensor.
    """
    most = torch.finfo(dtype).max
    for name, value in tensors.items():
        if value.numel() == 0:
            continue
        low, high = (bound.item() for bound in value.aminmax())  # NaN if one value is; takes no memory
        lowest = -torch.inf if name == may_be_minus_infinity else -most
        if not (lowest <= low <= high <= most):
            raise CriticError(f"{path}: {name!r:.120} is not finite in {str(dtype).removeprefix('torch.')}")


def check_shapes(expected: Mapping[str, torch.Size], tensors: Tensors, path: Path) -> None:
    """Refuses a file that lacks a tensor, has another one, or one of another shape.

    Raises:
        CriticError: names the tensor.
    """
    for what, names in (
        ("are missing", expected.keys() - tensors.keys()),
        ("are not wanted", tensors.keys() - expected.keys()),
    ):
        if names:
            raise CriticError(f"{path}: tensors {what}: {_some(names)}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise CriticError(f"{path}: {name} has shape {[*tensors[name].shape]}, wanted is {[*shape]}")


def _beginning(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(8)
    except (OSError, ValueError) as error:
        raise CriticError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _some(names: Iterator[str] | set[str]) -> str:
    first = sorted(names)[:5]
    return ", ".join(f"{name:.80}" for name in first)
