"""Makes critics of their files in this worker, with its settings and beside its reference model."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from qsharp_core.critic import checkpoint, native_checkpoint
from qsharp_core.critic.checkpoint import CriticFiles
from qsharp_core.critic.fetching import local_folder
from qsharp_core.critic.model import Critic
from qsharp_core.critic.scoring.build import build_scorer
from qsharp_core.errors import CriticError
from qsharp_core.vllm_plugin import cores, flash
from qsharp_core.vllm_plugin.registry import LoadedCritic, WorkerRegistry
from qsharp_core.vllm_plugin.settings import EngineSettings, parse_critic
from qsharp_core.wire.guidance import MAX_CANDIDATES

BLOCK_SIZE = 16
DEFAULT_CACHE_BYTES = 2 * 2**30


def load_registry(vllm_config: Any, device: torch.device) -> WorkerRegistry:
    """A registry with the critics that the engine is started with.

    Raises:
        CriticError: one of them cannot be used with this reference.
    """
    loader, settings = CriticLoader(vllm_config, device), EngineSettings.of(vllm_config)
    registry = WorkerRegistry(loader.read, loader.build, settings.load_seconds)
    for argument in settings.critics:
        name, path = parse_critic(argument)
        registry.add(registry.load(local_folder(path, settings.max_bytes), name))
    return registry


def empty_registry() -> WorkerRegistry:
    """The registry of a tensor-parallel rank that has no critics and is never asked to load one."""

    def read(path: Path) -> CriticFiles:
        raise CriticError(f"{path}: critics are loaded on the first tensor-parallel rank")

    def build(files: CriticFiles, name: str | None) -> LoadedCritic:
        raise AssertionError(files.folder)

    return WorkerRegistry(read, build, 0.0)


class CriticLoader:
    """Reads critics' folders, and makes critics of what it has read.

    Args:
        vllm_config: vLLM's configuration: the reference, the longest sequence, and our settings.
        device: where critics go.
    """

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        self._settings = EngineSettings.of(vllm_config)
        self._vllm_config, self._device = vllm_config, device
        self._model = vllm_config.model_config
        auto = torch.float32 if self._model.dtype == torch.float32 else torch.bfloat16
        self._dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(self._settings.dtype, auto)
        self._background = cores.critic_executor(vllm_config) if device.type == "cpu" else None

    def read(self, path: Path) -> CriticFiles:
        """Reads and checks a critic's folder, in any thread.

        Raises:
            CriticError: a file cannot be used.
        """
        return checkpoint.read(path, self._dtype, self._settings.max_bytes)

    def build(self, files: CriticFiles, name: str | None) -> LoadedCritic:
        """Makes a critic, in any thread, but one at a time.

        Args:
            files: of its folder.
            name: the name that requests use; None for the one on the card.

        Raises:
            CriticError: the critic cannot be used with this reference.
        """
        # The current device of a new thread is the first one, whichever device this worker has.
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            critic = self._build_native(files) if files.backbone is None else self._build_separate(files)
            if name is not None:
                critic.card = critic.card.model_copy(update={"name": name})
            if self._device.type == "cuda":  # steps run on another stream and use what this thread's stream computes
                torch.cuda.current_stream().synchronize()
            return critic

    def _build_native(self, files: CriticFiles) -> LoadedCritic:
        reference, card = _folder_of(self._model.model), files.card
        scorer = native_checkpoint.build(
            files, reference, dtype=self._dtype, device=self._device, max_bytes=self._settings.max_bytes
        )
        emitted = int(self._model.get_vocab_size())
        if scorer.vocab < emitted:
            raise CriticError(f"{card.key}: the reference embeds {scorer.vocab} token ids and emits {emitted}")
        return LoadedCritic(card, files.folder, scorer, self._model.max_model_len)

    def _build_separate(self, files: CriticFiles) -> LoadedCritic:
        model, device, card = self._model, self._device, files.card
        critic = checkpoint.build(files, dtype=self._dtype, device=device, reference=_folder_of(model.model))
        # Where there is a tokenizer it is compared instead: its table may be shorter than the reference's.
        emitted = int(model.get_vocab_size()) if model.skip_tokenizer_init else 0
        if critic.vocab < emitted:
            raise CriticError(f"{card.key} embeds {critic.vocab} token ids and the reference emits {emitted}")
        checkpoint.check_vocabulary(card, files.folder, critic, _tokenizer_of(model))
        most_rows = self._vllm_config.scheduler_config.max_num_seqs
        is_beside = cores.gains_beside(critic) if self._settings.beside is None else self._settings.beside
        scorer = build_scorer(
            critic,
            self._cache_tokens(card.key, critic),
            BLOCK_SIZE,
            self._settings.scratch_tokens or max(MAX_CANDIDATES, most_rows * 2 * BLOCK_SIZE),
            kernel=flash.kernel_for(self._vllm_config, device, self._dtype),
            graphs=flash.graph_shapes(self._vllm_config, device),
            background=self._background if is_beside else None,
        )
        return LoadedCritic(card, files.folder, scorer, scorer.capacity)

    def _cache_tokens(self, key: str, critic: Critic) -> int:
        """How many tokens the critic's cache holds: one sequence of the greatest length at least."""
        max_model_len = self._model.max_model_len
        longest = min(max_model_len, critic.max_length or max_model_len)
        token_bytes = _cache_bytes_per_token(critic, self._dtype)
        if self._settings.cache_gib is None:
            wanted = self._vllm_config.scheduler_config.max_num_seqs * (longest + BLOCK_SIZE)
            return max(longest, min(wanted, DEFAULT_CACHE_BYTES // token_bytes))
        tokens = int(self._settings.cache_gib * 2**30) // token_bytes
        if tokens < longest:
            raise CriticError(
                f"{key}: cache_gib = {self._settings.cache_gib:g} holds {tokens} tokens, and a sequence may have "
                f"{longest}: give at least {longest * token_bytes / 2**30:.3g} or a smaller max_model_len"
            )
        return tokens


def _folder_of(model: str) -> Path:
    """The reference's folder on disk; that of a hub id is in the local hub cache."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, local_files_only=True))


def _tokenizer_of(model: Any) -> Any | None:
    if model.skip_tokenizer_init:
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        model.tokenizer, revision=model.tokenizer_revision, trust_remote_code=model.trust_remote_code
    )


def _cache_bytes_per_token(critic: Critic, dtype: torch.dtype) -> int:
    config = critic.backbone.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * dtype.itemsize
