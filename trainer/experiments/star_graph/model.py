"""The reference: an ordinary Llama to vLLM and transformers, and a tokenizer in which each node is a token.

Commas are not tokens: the decoder puts them between nodes. `|` is a token. Without it only the parity of a node's
position would tell which node of an edge comes first, and a critic takes several times as long to learn that.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END, PAD, BAR, SLASH, EQUALS = "<end>", "<pad>", "|", "/", "="
HEAD = 32  # vLLM's attention on CPUs wants heads of 32 or 64


class SmallModel(BaseModel):
    """A Llama made for the task, in which each node is a token."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["small"] = "small"
    layers: int = Field(default=6, ge=1)
    width: int = Field(default=64, ge=HEAD, multiple_of=HEAD)
    mlp: int = Field(default=128, ge=1)
    positions: int = Field(default=128, ge=16)


class PretrainedModel(BaseModel):
    """A decoder from a folder or the hub with its own tokenizer, which reads the paper's text format."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["pretrained"]
    base: str


def build(spec: SmallModel | PretrainedModel, labels: int, seed: int) -> tuple[Any, Any]:
    """A model in float32 to be trained, and its tokenizer, which has an end and a padding token."""
    torch.manual_seed(seed)
    if isinstance(spec, PretrainedModel):
        tokens = AutoTokenizer.from_pretrained(spec.base)
        if tokens.pad_token_id is None:
            tokens.pad_token = tokens.eos_token
        return AutoModelForCausalLM.from_pretrained(spec.base, dtype=torch.float32), tokens
    tokens = node_tokenizer(labels)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=spec.width,
        intermediate_size=spec.mlp,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.width // HEAD,
        num_key_value_heads=spec.width // HEAD,
        max_position_embeddings=spec.positions,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        dtype="float32",
    )
    return LlamaForCausalLM(config).float(), tokens


def node_tokenizer(labels: int) -> PreTrainedTokenizerFast:
    """A tokenizer for graphs with nodes 0 … labels − 1; whatever else a text holds becomes padding."""
    words = [END, PAD, BAR, SLASH, EQUALS, *map(str, range(labels))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"[,\s]"), "removed"), pre_tokenizers.Split(Regex("[|/=]"), "isolated")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=False),  # puts a space before every token but the first
            decoders.Replace(" ", ","),
            decoders.Fuse(),
            *(decoders.Replace(a, b) for a, b in ((",|,", "|"), (",/,", "/"), (",=,", "="), (",=", "="))),
        ]
    )
    tokenizer.add_special_tokens([END, PAD])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, unk_token=PAD)


def save(folder: Path, model: Any, tokens: Any) -> None:
    """Writes a folder that vLLM loads."""
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
