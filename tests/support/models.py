"""References and critics written to disk by hand, as the format describes them, with none of the project's writers,
but for the hash over a reference's weights.

Everything is tiny and random. Heads are scaled so that scores spread over several units: a critic whose opinions all
agree would hide mistakes.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
)

from qsharp_core.critic.reference import identify

VOCAB = 192
CHARACTERS = [chr(c) for c in range(32, 127)] + ["\n"]
SPECIAL = ["<|start|>", "<|end|>", "<pad>"]
CHAT = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

# vLLM's CPU attention wants heads of 32 or 64.
BACKBONES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 1024,
    },
    "qwen2": {
        "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 1024,
    },
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 1024},  # learned positions
    "mistral": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "sliding_window": 24, "max_position_embeddings": 1024,
    },
    "opt": {
        "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
        "word_embed_proj_dim": 64, "max_position_embeddings": 1024,
    },
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, then filler tokens up to `VOCAB`."""
    names = SPECIAL + CHARACTERS
    vocabulary = {name: i for i, name in enumerate(names + [f"<{i}>" for i in range(len(names), VOCAB)])}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokens.decoder = decoders.Fuse()
    tokens.add_special_tokens(SPECIAL)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token="<|end|>", bos_token="<|start|>", pad_token="<pad>", unk_token="<pad>"
    )
    made.chat_template = CHAT
    return made


def _config(kind: str, **extra: Any) -> Any:
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return AutoConfig.for_model(kind, vocab_size=VOCAB, dtype="float32", **ids, **BACKBONES[kind], **extra)


def write_reference(folder: Path, kind: str = "llama", seed: int = 0, sharpness: float = 6.0) -> Path:
    """A random language model with a tokenizer; `sharpness` scales its logits, so that it has opinions."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_config(kind, tie_word_embeddings=False)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
        model.get_output_embeddings().weight.mul_(sharpness / 3.0)
        model.get_output_embeddings().weight[1] = 0.0  # the end token stays rare
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_critic(
    folder: Path,
    kind: str = "llama",
    head: str = "V",
    distribution: dict[str, Any] | None = None,
    reward_range: tuple[float, float] = (0.0, 1.0),
    name: str = "critic",
    version: str = "1",
    mlp: int | None = None,
    seed: int = 1,
    spread: float = 1.5,
) -> Path:
    """A random critic in the documented format."""
    torch.manual_seed(seed)
    distribution = distribution or {"kind": "bernoulli"}
    n_out = len(distribution.get("atoms", [0]))
    backbone = AutoModel.from_config(_config(kind)).float()
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    backbone.save_pretrained(folder / "backbone")
    hidden = backbone.config.hidden_size
    rows = (n_out,) if head == "V" else (VOCAB, n_out)
    weights = {
        "weight": torch.randn(*rows, mlp or hidden) * spread / (mlp or hidden) ** 0.5 * (3.0 if mlp else 1.0),
        "bias": torch.randn(*rows) * 0.3,
    }
    card: dict[str, Any] = {
        "format": 1,
        "name": name,
        "version": version,
        "head": head,
        "distribution": distribution,
        "reward_range": list(reward_range),
    }
    if mlp:
        card["mlp"] = {"width": mlp, "activation": "gelu"}
        weights["hidden.weight"] = torch.randn(mlp, hidden) / hidden**0.5
        weights["hidden.bias"] = torch.randn(mlp) * 0.1
    save_file(weights, folder / "head.safetensors")
    (folder / "critic.json").write_text(json.dumps(card))
    return folder


def write_native_critic(
    folder: Path,
    reference: Path,
    distribution: dict[str, Any] | None = None,
    reward_range: tuple[float, float] = (0.0, 1.0),
    name: str = "native",
    version: str = "1",
    width: int = 48,
    seed: int = 1,
    spread: float = 2.0,
) -> Path:
    """A random critic on the reference's hidden states, in the documented format."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    distribution = distribution or {"kind": "bernoulli"}
    n_out = len(distribution.get("atoms", [0]))
    model = AutoModelForCausalLM.from_pretrained(reference)
    embeddings = model.get_input_embeddings().weight.detach()
    hidden, embed = model.config.hidden_size, embeddings.shape[1]
    weights = {
        "hidden.mean": normal(hidden, scale=0.2),
        "hidden.scale": normal(hidden).abs() + 0.5,
        "hidden.weight": normal(width, hidden, scale=hidden**-0.5),
        "token.mean": embeddings.mean(0),
        "token.scale": embeddings.std(0),
        "token.weight": normal(width, embed, scale=embed**-0.5),
        "log_ref.mean": torch.tensor([-1.5]),
        "log_ref.scale": torch.tensor([1.2]),
        "log_ref.least": torch.tensor(-6.0),
        "log_ref.weight": normal(width, 1, scale=0.5),
        "bias": normal(width, scale=0.3),
        "out.weight": normal(n_out, width, scale=spread * width**-0.5 * 2),
        "out.bias": normal(n_out, scale=0.3),
    }
    folder.mkdir(parents=True)
    save_file(weights, folder / "head.safetensors")
    card = {
        "format": 1,
        "name": name,
        "version": version,
        "backbone": "reference",
        "head": "Q",
        "hidden": "last",
        "mlp": {"width": width},
        "distribution": distribution,
        "reward_range": list(reward_range),
        "made_for": identify(reference).model_dump(),
    }
    (folder / "critic.json").write_text(json.dumps(card))
    return folder
