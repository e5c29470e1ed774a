"""The models that are measured: the embedded default with its critic; a tiny pair, where bookkeeping dominates; and,
for GPUs, a pair of the size that the method's authors measured, in random weights.
"""

import json
import random
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from qsharp_core.critic import checkpoint, native_checkpoint
from qsharp_core.critic.checkpoint import BernoulliCard, CriticCard, MLPCard
from qsharp_core.critic.model import Critic
from qsharp_core.critic.native import NativeHead, NativeShape
from qsharp_core.critic.reference import identify
from qsharp_core.precision import fast_bfloat16
from server.presets.known import DEFAULT, PRESETS, SEPARATE
from trainer.tasks import sums

# One more than a multiple of BLOCK: of a prompt seen before, vLLM runs the last token alone again, and a wave of such
# prompts is decoding from its first step.
BLOCK, PROMPT_TOKENS, OWN_TOKENS, VOCABULARY = 32, 257, 16, 2048
Prompts = Literal["alike", "apart", "task"]
# Factor on the tiny model's output layer: its most likely tokens then have most of the mass, as language models'.
SURE = 30.0


@dataclass(frozen=True)
class Pair:
    """A reference and critics for it, on disk. Every side runs both in `dtype`.

    Attributes:
        critics: those with a backbone of their own, by head kind.
        native: one on the reference's hidden states.
        cache_gib, critic_gib: keys and values of the reference, and of each critic.
        engine: more of `vllm.LLM`'s arguments.
        device: of the critic, where it runs outside an engine.
        parts: what is measured of the pair.
        peers: whether other ways to guide are, too.
    """

    name: str
    reference: Path
    critics: dict[str, Path]
    native: Path
    vocabulary: int
    dtype: torch.dtype = torch.float32
    cache_gib: int = 1
    critic_gib: float = 0.5
    engine: dict[str, Any] = field(default_factory=lambda: {"enforce_eager": True})
    device: str = "cpu"
    parts: tuple[str, ...] = ("throughput", "http", "latency", "growth")
    peers: bool = True

    @property
    def dtype_name(self) -> str:
        """As vLLM's flags have it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def names(self) -> dict[str, str]:
        """The critics' exact versions, by head kind; `native` is one."""
        return {head: checkpoint.read_card(path).key for head, path in [*self.critics.items(), ("native", self.native)]}

    def critic(self, head: str) -> Critic:
        """A critic with a backbone, loaded as the engine does."""
        device = torch.device(self.device)
        return checkpoint.load(self.critics[head], dtype=self.dtype, device=device, reference=self.reference)[1]


def tiny(folder: Path) -> Pair:
    """Random models of two layers, 128 and 64 wide."""
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(_llama(128)).float()
    with (
        torch.no_grad()
    ):  # as sure of itself as language models are: its eight most likely tokens have 97 % of the mass
        reference.lm_head.weight *= SURE
    reference.save_pretrained(folder / "reference")
    _tokenizer().save_pretrained(folder / "reference")
    critics = {}
    for head in ("V", "Q"):
        backbone = AutoModel.from_config(_llama(64)).float()
        critics[head] = _write(folder / head, head, backbone, 64, VOCABULARY, [])
    native = _write_native(folder / "native", folder / "reference", 64)
    return Pair("tiny", folder / "reference", critics, native, VOCABULARY)


def default(folder: Path) -> Pair:
    """The embedded model with its critic; the separate critic of its task, and the same backbone with a Q head."""
    preset = PRESETS[DEFAULT]
    reference, shipped = preset.model(), PRESETS[SEPARATE].critic_folder
    _, critic = checkpoint.load(shipped, reference=reference)
    backbone = AutoModel.from_pretrained(shipped / "backbone")
    width, vocabulary = backbone.config.hidden_size, critic.vocab
    backbone.set_input_embeddings(critic.backbone.get_input_embeddings())
    q_head = _write(folder / "Q", "Q", backbone, width, vocabulary, ["input_embeddings"])
    dtype = torch.bfloat16 if fast_bfloat16() else torch.float32  # as it is served
    return Pair("default", reference, {"V": shipped, "Q": q_head}, preset.critic_folder, vocabulary, dtype)


def large(folder: Path) -> Pair:
    """Of the shapes of Llama 3.1 8B and, for critics, Llama 3.2 1B: what a step takes does not hang on weights."""
    same = {
        "vocab_size": 128_256, "num_key_value_heads": 8, "num_attention_heads": 32, "rope_theta": 500_000.0,
        "max_position_embeddings": 8192, "bos_token_id": 0, "eos_token_id": 1, "dtype": "bfloat16",
    }  # fmt: skip
    reference = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, architectures=["LlamaForCausalLM"], **same
    )
    reference.save_pretrained(folder / "reference")
    # Of the reference's weights, which vLLM makes up, a native critic wants these.
    embeddings = torch.randn(reference.vocab_size, reference.hidden_size, dtype=torch.bfloat16)
    save_file({"model.embed_tokens.weight": embeddings}, folder / "reference" / "model.safetensors")
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, tie_word_embeddings=True, **same
    )
    with torch.device("cuda"):
        backbone = AutoModel.from_config(config, dtype=torch.bfloat16)
    critics = {head: _write(folder / head, head, backbone, 2048, config.vocab_size, []) for head in ("V", "Q")}
    # A share for each of two engines, ours and plain vLLM.
    engine = {"load_format": "dummy", "gpu_memory_utilization": 0.45}
    return Pair(
        "large", folder / "reference", critics, _write_native(folder / "native", folder / "reference", 1024),
        config.vocab_size, torch.bfloat16, cache_gib=8, critic_gib=2.0,
        engine=engine, device="cuda", parts=("throughput", "captured"), peers=False,
    )  # fmt: skip


PAIRS = {"default": default, "tiny": tiny, "large": large}


def prompts(pair: Pair, rows: int, seed: int, kind: Prompts = "alike") -> list[list[int]]:
    """Token ids, of all rows as many.

    Args:
        kind: `alike` are random tokens, a prefix that all rows share, as few-shot prompts do, and an end of each row's
            own; `apart` share nothing; `task` are held-out problems of the default model's task.
    """
    if kind == "task":
        problems = random.Random(seed).sample(sums.problems("held_out"), rows)
        texts = [sums.prompt(problem) for problem in problems]
        ids: list[list[int]] = _tokenizer_of(pair.reference)(texts)["input_ids"]
        return ids
    own_tokens = PROMPT_TOKENS if kind == "apart" else OWN_TOKENS
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randint(
        3, pair.vocabulary, (PROMPT_TOKENS - own_tokens,), generator=torch.Generator().manual_seed(0)
    )
    own = torch.randint(3, pair.vocabulary, (rows, own_tokens), generator=generator)
    return [[*shared.tolist(), *ids] for ids in own.tolist()]


@cache
def _tokenizer_of(reference: Path) -> Any:
    return AutoTokenizer.from_pretrained(reference)


def _llama(width: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=width // 32, num_key_value_heads=1, max_position_embeddings=2048, dtype="float32",
        bos_token_id=0, eos_token_id=1, pad_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip


def _tokenizer() -> PreTrainedTokenizerFast:
    """A word per token id: servers want to write text."""
    names = ["<s>", "</s>", "<pad>", *(f"w{i}" for i in range(3, VOCABULARY))]
    words = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )


def _write(folder: Path, head: str, backbone: AutoModel, width: int, vocabulary: int, borrow: list[str]) -> Path:
    backbone.save_pretrained(folder / "backbone")
    if borrow:  # stored once, with the reference
        path = folder / "backbone" / "model.safetensors"
        kept = {k: v.contiguous() for k, v in backbone.state_dict().items() if "embed_tokens" not in k}
        save_file(kept, path, metadata={"format": "pt"})
    rows = (1,) if head == "V" else (vocabulary, 1)
    save_file(
        {"weight": torch.randn(*rows, width) / width**0.5, "bias": torch.zeros(*rows)}, folder / "head.safetensors"
    )
    card = {
        "format": 1, "name": head.lower(), "version": "1", "head": head, "distribution": {"kind": "bernoulli"},
        "reward_range": [0, 1], "borrow": borrow,
    }  # fmt: skip
    (folder / "critic.json").write_text(json.dumps(card))
    return folder


def _write_native(folder: Path, reference: Path, width: int) -> Path:
    identity, embed = identify(reference), checkpoint.input_embeddings(reference).shape[1]
    head = NativeHead(NativeShape(identity.hidden_size, embed, width, 1))
    nn.init.normal_(head.out.weight, std=width**-0.5)
    card = CriticCard(
        name="native", version="1", backbone="reference", head="Q", hidden="last", made_for=identity,
        distribution=BernoulliCard(kind="bernoulli"), mlp=MLPCard(width=width),
    )  # fmt: skip
    native_checkpoint.save(folder, card, head)
    return folder
