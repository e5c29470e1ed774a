"""The tree of `trainer.tasks.tree_mdp` as a language model.

Every node is a token of its own, so the tree's law is that of a model which looks at the last token only. The folder
that `write_model` makes is an ordinary Llama to vLLM and transformers.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trainer.tasks.tree_mdp import END, FIGURE_4, Node

PAD = "<pad>"
HIDDEN = 64  # vLLM's attention on CPUs wants heads of 32
# A float32 softmax gives a token this far down less than 1e-17.
NEVER = -40.0


def token_ids(root: Node) -> dict[str, int]:
    """Token ids of the end token, the padding and every node, by name."""
    names = [END, PAD, *(n.name for n in root.nodes())]
    assert len(set(names)) == len(names) <= HIDDEN, names
    return {name: i for i, name in enumerate(names)}


def reward_of(root: Node, completion: Sequence[int]) -> float | None:
    """The reward of the leaf that a completion of token ids ends in; None if it ends in none."""
    ids = token_ids(root)
    tokens = [t for t in completion if t != ids[END]]
    leaves = {ids[n.name]: n.reward for n in root.nodes() if n.reward is not None}
    return leaves.get(tokens[-1]) if tokens else None


def write_model(folder: Path, root: Node = FIGURE_4) -> Path:
    """Writes a Llama with a tokenizer whose next-token law after each node's token is the tree's.

    A leaf is followed by the end token. The prompt is the root's token.

    Returns:
        The folder.
    """
    ids = token_ids(root)
    config = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=ids[END],
        pad_token_id=ids[PAD],
        dtype="float32",
    )
    model = LlamaForCausalLM(config).float()
    layer = model.model.layers[0]
    with torch.no_grad():
        # The residual stream is the last token's unit vector: attention and MLP write nothing into it.
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(ids), HIDDEN))
        model.model.norm.weight.fill_(1.0)
        scale = math.sqrt(1 / HIDDEN + config.rms_norm_eps)  # what the last norm divides by
        model.lm_head.weight.fill_(NEVER * scale)
        for node in root.nodes():
            following = {ids[c.name]: c.chance for c in node.children} or {ids[END]: 1.0}
            for token, chance in following.items():
                model.lm_head.weight[token, ids[node.name]] = math.log(chance) * scale
    model.save_pretrained(folder)
    tokens = Tokenizer(models.WordLevel(ids, unk_token=PAD))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token=END, pad_token=PAD, unk_token=PAD).save_pretrained(
        folder
    )
    return folder
