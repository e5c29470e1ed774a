"""Reads the backbone of a separate critic, `backbone/` in its folder, without trusting it.

Transformers gets the content of the files and never the folder. So nothing in `config.json` makes it read another file,
ask a hub, run code or fetch a kernel. A model is built on the `meta` device first, where it takes no memory, and every
shape is compared with the files.
"""

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from qsharp_core.critic import files
from qsharp_core.critic.folder import CONFIG
from qsharp_core.critic.tensors import Tensors, check_finite, mapped_model
from qsharp_core.errors import CriticError

MOST_CONFIG = 2**20
MOST_LAYERS = 1024
MOST_POSITIONS = 2**32
MOST_OTHER = 2**20
MOST_BUFFERS = 2**28  # bytes of what a model computes for itself, rotations for instance
MODULES_OF_A_TENSOR = 32

# What transformers would act on, and the critic does not say: they are set here, or have no meaning for a backbone.
NOT_THE_CRITICS = {
    "attn_implementation", "auto_map", "custom_pipelines", "distributed_config", "experts_implementation",
    "fusion_config", "id2label", "kernel_config", "label2id", "name_or_path", "num_labels", "per_layer_config",
    "transformers_weights", "trust_remote_code",
}  # fmt: skip
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_LAYERS = re.compile(r"(^|_)layers?$")
_POSITIONS = re.compile(r"position|length|seq|window|ctx|context|theta|base")


@dataclass(frozen=True)
class BackboneFiles:
    """What a backbone's files say.

    Attributes:
        folder: for messages.
        config: `config.json`, without what is not the critic's to say.
        weights: mapped.
    """

    folder: Path
    config: Mapping[str, JsonValue]
    weights: Tensors


def read(folder: Path, dtype: torch.dtype) -> BackboneFiles:
    """Reads and checks the files. This may wait for a disk, and runs none of transformers' code.

    Args:
        folder: `backbone/` of a critic.
        dtype: that the weights will have.

    Raises:
        CriticError: names the file and the field or tensor.
    """
    path = folder / CONFIG
    config = _cleaned(files.read_object(path, MOST_CONFIG), path)
    weights = mapped_model(folder)
    check_finite(weights, dtype, folder)
    return BackboneFiles(folder, config, weights)


def build(read_files: BackboneFiles, dtype: torch.dtype, borrows_embeddings: bool) -> nn.Module:
    """The backbone, on the CPU; its weights are copies. One call at a time: transformers changes global state.

    Args:
        read_files: its files.
        dtype: of its weights.
        borrows_embeddings: whether the token embeddings are not stored; they are uninitialised then.

    Raises:
        CriticError: names the file and the field or tensor.
    """
    path = read_files.folder / CONFIG
    with _refused(path):
        model_class, config = _model_class(read_files.config, path)
    on_meta = {name: tensor.to("meta") for name, tensor in read_files.weights.items()}
    with _refused(path), _few_modules(MODULES_OF_A_TENSOR * len(on_meta) + 256):
        dry, report = _from_tensors(model_class, config, on_meta, dtype, device_map={"": "meta"})
    _check_report(report, dry, read_files.folder, borrows_embeddings)
    computed = sum(buffer.nbytes for buffer in dry.buffers())
    if computed > MOST_BUFFERS:
        raise CriticError(f"{path} asks for {computed / 2**30:.3g} GiB beside the weights")
    del dry
    with _refused(path):
        backbone, _ = _from_tensors(model_class, config, dict(read_files.weights), dtype)
    _own(backbone, read_files.weights)
    check_finite(dict(_floating_buffers(backbone)), dtype, path)
    return backbone


def _cleaned(config: Mapping[str, JsonValue], path: Path) -> dict[str, JsonValue]:
    """The config without what is not the critic's to say; its numbers are of a size that a backbone can have."""
    if config.get("quantization_config") is not None:
        raise CriticError(f"{path}: quantization_config: a critic's weights are not quantised")
    kept: dict[str, JsonValue] = {}
    for key, value in config.items():
        if key.startswith("_") or key in NOT_THE_CRITICS:
            continue
        if isinstance(value, int | float) and not isinstance(value, bool):
            most = MOST_LAYERS if _LAYERS.search(key) else MOST_POSITIONS if _POSITIONS.search(key) else MOST_OTHER
            if abs(value) > most:
                raise CriticError(f"{path}: {key:.80}: {value!r:.30} is not within {most}")
        if key in SIZES:
            _check_size(key, value, 1, path)
        kept[key] = _cleaned(value, path) if isinstance(value, dict) else value
    return kept


def _check_size(field: str, value: object, least: int, path: Path) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise CriticError(f"{path}: {field} must be an integer of at least {least}; got {value!r:.80}")


def _model_class(config: Mapping[str, JsonValue], path: Path) -> tuple[Any, Any]:
    """The class of the model and its config, as `AutoModel` chooses them."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING  # slow to import

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise CriticError(f"{path}: model_type: {kind!r:.80} is no architecture that transformers knows")
    config_class = CONFIG_MAPPING[kind]
    model_class: Any = MODEL_MAPPING.get(config_class, None)
    if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING or not getattr(
        model_class, "_supports_attention_backend", False
    ):
        raise CriticError(
            f"{path}: model_type: {kind} cannot serve as a critic's backbone: it is no decoder whose attention goes "
            "through transformers' AttentionInterface"
        )
    made = config_class.from_dict(dict(config))
    text_class = config_class.sub_configs.get("text_config")
    if text_class is not None and model_class.config_class is text_class:
        made = made.get_text_config()
    text = made.get_text_config()
    for field in SIZES:  # an architecture may call them otherwise in the file
        _check_size(field, getattr(text, field, None), 1, path)
    if (positions := getattr(text, "max_position_embeddings", None)) is not None:
        _check_size("max_position_embeddings", positions, 2, path)
    return model_class, made


def _from_tensors(
    model_class: Any, config: Any, weights: dict[str, torch.Tensor], dtype: torch.dtype, **options: Any
) -> tuple[nn.Module, Mapping[str, Any]]:
    """A model from a config and tensors alone, and what transformers says of their names and shapes."""
    attention = "sdpa" if model_class._supports_sdpa else "eager"
    made: tuple[nn.Module, Mapping[str, Any]] = model_class.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=dtype,
        attn_implementation=attention,
        trust_remote_code=False,
        local_files_only=True,
        use_kernels=False,
        ignore_mismatched_sizes=True,  # they are in the report
        output_loading_info=True,
        **options,
    )
    return made


def _check_report(report: Mapping[str, Any], dry: nn.Module, folder: Path, borrows_embeddings: bool) -> None:
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        raise CriticError(f"{folder}: {name} has shape {[*stored]}, and {CONFIG} says {[*wanted]}")
    missing = set(report["missing_keys"])
    if borrows_embeddings:
        embeddings = dry.get_input_embeddings().weight  # type: ignore[operator]
        missing -= {name for name, parameter in dry.named_parameters() if parameter is embeddings}
    if missing:
        raise CriticError(f"{folder}: weights are missing: {', '.join(sorted(missing)[:5])}")
    # A language model's head is no part of its backbone.
    extra = [name for name in sorted(report["unexpected_keys"]) if not name.startswith(("lm_head.", "embed_out."))]
    if extra:
        raise CriticError(f"{folder}: {CONFIG} has no place for weights: {', '.join(extra[:5])}")
    for message in report["error_msgs"]:
        raise CriticError(f"{folder}: {message}")


def _own(model: nn.Module, weights: Tensors) -> None:
    """Copies what is still pages of a file, one after the other."""
    maps = {tensor.untyped_storage().data_ptr() for tensor in weights.values()}
    for held in (*model.parameters(), *model.buffers()):
        if held.untyped_storage().data_ptr() in maps:
            held.data = held.data.clone()


def _floating_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, buffer) for name, buffer in model.named_buffers() if buffer.is_floating_point())


@contextmanager
def _few_modules(most: int) -> Iterator[None]:
    """Ends what builds more modules than this in this thread, whichever field of its config says so."""
    thread, count = threading.get_ident(), 0

    def counted(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        nonlocal count
        if threading.get_ident() == thread:
            count += 1
            if count > most:
                raise CriticError(f"its model has more than {most} parts, far more than there are weights")

    hook = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Whatever transformers does not take in a config is the config's fault.

    It has some hundred architectures, each with code of its own that runs on the fields, and they raise what happens to
    go wrong: TypeError, KeyError, ZeroDivisionError, AttributeError, …
    """
    try:
        yield
    except CriticError as error:
        raise error if str(path.parent) in str(error) else CriticError(f"{path}: {error}") from error
    except Exception as error:
        raise CriticError(f"{path} is no config of a model: {type(error).__name__}: {str(error)[:500]}") from error
