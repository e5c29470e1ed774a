"""Critics loaded in this worker: versions, which is active, who still uses them.

A request keeps the version it began with. A version that was told to go is freed when its last request ends.
"""

import gc
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qsharp_core.critic import checkpoint, native_checkpoint
from qsharp_core.critic.cache import Sequence
from qsharp_core.critic.checkpoint import CriticCard
from qsharp_core.critic.engine import CriticEngine
from qsharp_core.critic.scorer import Scorer
from qsharp_core.errors import CriticError, NoCriticError, UnknownCriticError
from qsharp_core.vllm_plugin import cores, flash
from qsharp_core.vllm_plugin.settings import EngineSettings, parse_critic
from qsharp_core.wire.critics import CriticStatus
from qsharp_core.wire.guidance import MAX_CANDIDATES

BLOCK_SIZE = 16
DEFAULT_CACHE_BYTES = 2 * 2**30


@dataclass(eq=False)
class LoadedCritic:
    """A version in memory.

    Attributes:
        max_length: the longest history, in tokens, that can be scored.
    """

    card: CriticCard
    path: Path
    scorer: Scorer
    max_length: int
    users: int = 0
    leaving: bool = False

    @property
    def engine(self) -> CriticEngine | None:
        """Runs the critic's own backbone; None for a critic on the reference's hidden states."""
        return self.scorer if isinstance(self.scorer, CriticEngine) else None

    def open(self) -> Sequence | None:
        """A request begins to use this version, which keeps it alive; its handle, where the critic has a cache."""
        self.users += 1
        return self.engine.open() if self.engine else None

    def close(self, sequence: Sequence | None) -> None:
        """Ends a request's use; `sequence` is what `open` gave."""
        self.users -= 1
        if self.engine is not None and sequence is not None:
            self.engine.close(sequence)


class Registry:
    """The worker's critics, by `name@version`.

    Args:
        load: reads a critic's folder: `(path, name or None) -> LoadedCritic`.
    """

    def __init__(self, load: Callable[[Path, str | None], LoadedCritic]) -> None:
        self._load = load
        self._loading = threading.Lock()
        self.critics: dict[str, LoadedCritic] = {}
        self.active: dict[str, str] = {}  # name -> key; the first name is the default

    def load(self, path: Path, name: str | None) -> LoadedCritic:
        """Reads a critic's folder. One at a time: a process can capture one CUDA graph at a time."""
        with self._loading:
            return self._load(path, name)

    def add(self, critic: LoadedCritic) -> str:
        """Makes a loaded critic available; the first version of a name becomes the active one."""
        key = critic.card.key
        present = self.critics.get(key)
        if present is not None and not present.leaving:
            raise CriticError(f"{key} is loaded already")
        if present is not None:
            raise CriticError(f"{key} is being unloaded: it is still used by {present.users} requests")
        self.critics[key] = critic
        self.active.setdefault(critic.card.name, key)
        return key

    def resolve(self, name: str | None) -> LoadedCritic:
        """The critic a request means: None is the default's active version.

        Raises:
            NoCriticError, UnknownCriticError.
        """
        if not self.active:
            raise NoCriticError("guidance was asked for and no critic is loaded", "critic")
        key = next(iter(self.active.values())) if name is None else self.active.get(name, name)
        critic = self.critics.get(key)
        if critic is None or critic.leaving:
            raise UnknownCriticError(f"critic {name!r} is not loaded", "critic")
        return critic

    def activate(self, key: str) -> None:
        """Requests that name no version get this one from now on."""
        critic = self.critics.get(key)
        if critic is None or critic.leaving:
            raise UnknownCriticError(f"critic {key!r} is not loaded", "critic")
        self.active[critic.card.name] = key

    def unload(self, key: str) -> None:
        """No new request gets this version; it is freed as soon as none uses it."""
        critic = self.critics.get(key)
        if critic is None:
            raise UnknownCriticError(f"critic {key!r} is not loaded", "critic")
        critic.leaving = True
        if self.active.get(critic.card.name) == key:
            del self.active[critic.card.name]
        self.collect()

    def collect(self) -> None:
        """Frees versions that were told to go and that nobody uses."""
        done = [key for key, critic in self.critics.items() if critic.leaving and critic.users == 0]
        for key in done:
            del self.critics[key]
        if done:
            gc.collect()  # modules and their hooks form cycles; their tensors are large
            # Not while another critic is loaded: its graphs may be in capture, which this would break.
            if torch.cuda.is_available() and self._loading.acquire(blocking=False):
                torch.cuda.empty_cache()
                self._loading.release()

    def describe(self) -> list[CriticStatus]:
        """What the API process is told: one entry for each loaded version."""
        return [
            CriticStatus(
                name=critic.card.name,
                version=critic.card.version,
                path=str(critic.path),
                active=self.active.get(critic.card.name) == key,
                leaving=critic.leaving,
                users=critic.users,
                max_length=critic.max_length,
                native=critic.card.backbone == "reference",
                reward_range=critic.card.reward_range,
                kv_blocks=critic.engine.blocks.blocks if critic.engine else None,
                kv_blocks_used=critic.engine.blocks.used if critic.engine else None,
                card=critic.card.model_dump(mode="json", exclude_none=True),
            )
            for key, critic in self.critics.items()
        ]


def loader(vllm_config: Any, device: torch.device) -> Callable[[Path, str | None], LoadedCritic]:
    """How this worker reads a critic's folder, from its settings and the reference model's.

    Raises (the function it returns):
        CriticError: the folder cannot be used with this reference.
    """
    settings = EngineSettings.of(vllm_config)
    model = vllm_config.model_config
    theirs = torch.float32 if model.dtype == torch.float32 else torch.bfloat16
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(settings.dtype, theirs)
    aside = cores.beside(vllm_config) if device.type == "cpu" else None

    def read(path: Path, name: str | None) -> LoadedCritic:
        native = checkpoint.read_card(path).backbone == "reference"
        return read_native(path, name) if native else read_separate(path, name)

    def read_native(path: Path, name: str | None) -> LoadedCritic:
        card, critic = native_checkpoint.load(path, _folder(model.model), dtype=dtype, device=device)
        if name is not None:
            card = card.model_copy(update={"name": name})
        if critic.vocab < (least := int(model.get_vocab_size())):
            raise CriticError(f"{card.key}: the reference embeds {critic.vocab} token ids and emits {least}")
        return LoadedCritic(card, path, critic, model.max_model_len)

    def read_separate(path: Path, name: str | None) -> LoadedCritic:
        card, critic = checkpoint.load(path, dtype=dtype, device=device, reference=_folder(model.model))
        if name is not None:
            card = card.model_copy(update={"name": name})
        if critic.vocab < (least := _least_vocabulary(model)):
            raise CriticError(f"{card.key} embeds {critic.vocab} token ids and the reference emits {least}")
        checkpoint.check_vocabulary(card, path, critic, _tokenizer(model))
        longest = min(model.max_model_len, critic.max_length or model.max_model_len)
        token_bytes = _cache_bytes_per_token(critic, dtype)
        if settings.cache_gib is None:
            wanted = vllm_config.scheduler_config.max_num_seqs * (longest + BLOCK_SIZE)
            tokens = max(longest, min(wanted, DEFAULT_CACHE_BYTES // token_bytes))
        else:
            tokens = int(settings.cache_gib * 2**30) // token_bytes
            if tokens < longest:
                raise CriticError(
                    f"{card.key}: cache_gib = {settings.cache_gib:g} holds {tokens} tokens, and a sequence may have "
                    f"{longest}: give at least {longest * token_bytes / 2**30:.3g} or a smaller max_model_len"
                )
        prefix = flash.prefix_attention(vllm_config, device, dtype)
        usual = max(MAX_CANDIDATES, vllm_config.scheduler_config.max_num_seqs * 2 * BLOCK_SIZE)
        scratch = settings.scratch_tokens or usual
        graphs = flash.graph_shapes(vllm_config, device)
        gains = cores.gains(critic) if settings.beside is None else settings.beside
        engine = CriticEngine(critic, tokens, BLOCK_SIZE, scratch, prefix, graphs, aside if gains else None)
        return LoadedCritic(card, path, engine, engine.capacity)

    def load(path: Path, name: str | None) -> LoadedCritic:
        # A new thread's current device is the first one, whichever this worker's is.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            critic = read(path, name)
            if device.type == "cuda":  # what this thread's stream still computes, the engine's will use
                torch.cuda.current_stream().synchronize()
            return critic

    return load


def build(vllm_config: Any, device: torch.device) -> Registry:
    """The registry with the critics that the engine is started with."""
    registry = Registry(loader(vllm_config, device))
    for argument in EngineSettings.of(vllm_config).critics:
        name, path = parse_critic(argument)
        registry.add(registry.load(path, name))
    return registry


def empty() -> Registry:
    """The registry of a tensor-parallel rank that has no critics: it is never asked."""

    def load(path: Path, name: str | None) -> LoadedCritic:
        raise CriticError(f"{path}: critics are loaded on the first tensor-parallel rank")

    return Registry(load)


def _folder(model: str) -> Path:
    """The reference's folder on disk; a hub id's is in the local hub cache."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, local_files_only=True))


def _tokenizer(model: Any) -> Any | None:
    if model.skip_tokenizer_init:
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        model.tokenizer, revision=model.tokenizer_revision, trust_remote_code=model.trust_remote_code
    )


def _least_vocabulary(model: Any) -> int:
    """Token ids that a critic must embed; where there is a tokenizer it is asked instead (its table may be shorter)."""
    return int(model.get_vocab_size()) if model.skip_tokenizer_init else 0


def _cache_bytes_per_token(critic: Any, dtype: torch.dtype) -> int:
    config = critic.backbone.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * dtype.itemsize
