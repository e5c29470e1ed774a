"""A tree whose every `Q*` is known, as a language model: the tabular check of the whole method.

In the paper's Figure 4 the left branch earns 0.1 for sure and the right one 1 with probability 0.05. Controlled
Decoding, which goes by expected rewards, turns left however small `eta` is; the optimal policy turns right.

Every node is a token of its own, so the tree's law is that of a model which looks at the last token only. The folder
that `write_model` makes is an ordinary Llama to vLLM and transformers.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trainer.tasks.base import Problem, SamplingDefaults, Task

END, PAD = "<end>", "<pad>"
HIDDEN = 64  # vLLM's attention on CPUs wants heads of 32
# A float32 softmax gives a token this far down less than 1e-17.
NEVER = -40.0


@dataclass(frozen=True)
class Node:
    """A node; a leaf has a reward and no children.

    Attributes:
        name: its token, unique in the tree.
        chance: of the reference going here from the node's parent.
    """

    name: str
    chance: float = 1.0
    reward: float | None = None
    children: tuple["Node", ...] = ()

    def __post_init__(self) -> None:
        assert (self.reward is None) == bool(self.children), self.name
        assert not self.children or math.isclose(sum(c.chance for c in self.children), 1.0), self.name

    def nodes(self) -> Iterator["Node"]:
        """This one and all below, parents first."""
        yield self
        for child in self.children:
            yield from child.nodes()

    def outcomes(self) -> dict[float, float]:
        """Law of the reward of a reference rollout from here: reward -> probability."""
        if self.reward is not None:
            return {self.reward: 1.0}
        law: dict[float, float] = {}
        for child in self.children:
            for reward, p in child.outcomes().items():
                law[reward] = law.get(reward, 0.0) + child.chance * p
        return law

    def optimal_q(self, eta: float) -> float:
        """`Q* = eta ln E[exp(z / eta)]` (Theorem 2.2), in units of reward."""
        law = self.outcomes()
        best = max(law)
        return best + eta * math.log(sum(p * math.exp((z - best) / eta) for z, p in law.items()))

    def mean(self) -> float:
        """Expected reward of a reference rollout: what Controlled Decoding goes by."""
        return sum(z * p for z, p in self.outcomes().items())


@dataclass(frozen=True)
class Guided:
    """What following a policy from the root brings: expected reward, and KL to the reference in nats."""

    value: float
    kl: float


def guided(node: Node, eta: float, method: str) -> Guided:
    """The exact law of guidance, `pi(child) ∝ chance · exp(A)`.

    Args:
        method: `qsharp` has `A = Q* / eta`, `cd` has `A = E[z] / eta`.
    """
    if node.reward is not None:
        return Guided(node.reward, 0.0)
    tilts = [(child.optimal_q(eta) if method == "qsharp" else child.mean()) / eta for child in node.children]
    highest = max(tilts)
    weights = [child.chance * math.exp(tilt - highest) for child, tilt in zip(node.children, tilts, strict=True)]
    law = [weight / sum(weights) for weight in weights]
    below = [guided(child, eta, method) for child in node.children]
    step = sum(p * math.log(p / child.chance) for p, child in zip(law, node.children, strict=True) if p > 0)
    return Guided(
        sum(p * one.value for p, one in zip(law, below, strict=True)),
        step + sum(p * one.kl for p, one in zip(law, below, strict=True)),
    )


FIGURE_4 = Node(
    "root",
    children=(
        Node("left", 0.5, children=(Node("sure", 1.0, reward=0.1),)),
        Node("right", 0.5, children=(Node("win", 0.05, reward=1.0), Node("lose", 0.95, reward=0.0))),
    ),
)


def token_ids(root: Node) -> dict[str, int]:
    """Ids of the end token, the padding and every node."""
    names = [END, PAD, *(n.name for n in root.nodes())]
    assert len(set(names)) == len(names) <= HIDDEN, names
    return {name: i for i, name in enumerate(names)}


def reward_of(root: Node, completion: Sequence[int]) -> float | None:
    """Reward of the leaf that a completion ends in (before its end token); None if it ends in none."""
    ids = token_ids(root)
    tokens = [t for t in completion if t != ids[END]]
    leaves = {ids[n.name]: n.reward for n in root.nodes() if n.reward is not None}
    return leaves.get(tokens[-1]) if tokens else None


def write_model(folder: Path, root: Node = FIGURE_4) -> Path:
    """A Llama with a tokenizer, and the tree's law after each node's token; a leaf is followed by the end token.

    The prompt is the root's token.
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


def _reward(_: Problem, text: str) -> float | None:
    """Of the last node that a completion names; None if that is no leaf."""
    leaves = {node.name: node.reward for node in FIGURE_4.nodes() if node.reward is not None}
    words = text.replace(END, "").split()
    return leaves.get(words[-1]) if words else None


TASK = Task(
    name="tree_mdp",
    splits=("train",),
    problems=lambda _: [Problem(id="figure-4", prompt=FIGURE_4.name)],
    sampling=SamplingDefaults(max_tokens=4),
    reward=_reward,
)
