"""A critic as a module: any Hugging Face decoder and a head over its hidden states.

- `V` head: the outputs of `(x, y)` are read at `y`'s own position, so candidates are run as tokens.
- `Q` head: the outputs of every `(x, y)` are read at the last position of `x`.

Shapes: B sequences, S tokens, D hidden width, W width the head reads (D, or the MLP's), V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsharp_core.returns import ReturnDistribution

HeadKind = Literal["V", "Q"]


@dataclass(frozen=True)
class HeadShape:
    """What a head is made of; `mlp` is the width of an optional hidden layer."""

    kind: HeadKind
    hidden: int
    n_out: int
    vocab: int
    mlp: int | None = None


class Head(nn.Module):
    """Linear map from hidden states to outputs, after an optional GELU layer.

    Parameters: `weight`, `bias`, of shape `[n_out, W]`, `[n_out]` (V) or `[V, n_out, W]`, `[V, n_out]` (Q), and
    `hidden.weight [W, D]`, `hidden.bias [W]` where there is an MLP.
    """

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.shape = shape
        self.hidden = nn.Linear(shape.hidden, shape.mlp) if shape.mlp else None
        rows = (shape.n_out,) if shape.kind == "V" else (shape.vocab, shape.n_out)
        # Zero outputs are the uniform prior: an untrained head does not steer.
        self.weight = nn.Parameter(torch.zeros(*rows, shape.mlp or shape.hidden))
        self.bias = nn.Parameter(torch.zeros(*rows))

    def features(self, hidden: Tensor) -> Tensor:
        """What the last layer reads: `[..., D] -> [..., W]`."""
        return hidden if self.hidden is None else F.gelu(self.hidden(hidden))

    def at_tokens(self, hidden: Tensor) -> Tensor:
        """V head: outputs at each token's own position, `[..., D] -> [..., n_out]`."""
        return F.linear(self.features(hidden), self.weight, self.bias)

    def of_tokens(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Q head: outputs `[..., K, n_out]` of the next tokens `ids [..., K]` after prefixes ending in `[..., D]`."""
        # Of all asked tokens as one matrix: one product for each prefix. Looked up as an embedding, whole rows at once.
        weight = F.embedding(ids, self.weight.flatten(1)).unflatten(-1, self.weight.shape[1:]).flatten(-3, -2)
        return (weight @ self.features(hidden)[..., None]).view(*ids.shape, -1) + self.bias[ids]


class Critic(nn.Module):
    """Backbone, head and return distribution.

    Args:
        backbone: a decoder as `transformers.AutoModel` gives it, without a language-model head.
        head: its head.
        distribution: what the head's outputs mean.
    """

    def __init__(self, backbone: Any, head: Head, distribution: ReturnDistribution) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.head = head
        self.distribution = distribution

    @property
    def max_length(self) -> int | None:
        """Positions the backbone knows, or None where it has no limit."""
        return getattr(self.backbone.config, "max_position_embeddings", None)

    @property
    def vocab(self) -> int:
        """Token ids the backbone can embed are below this."""
        return self.backbone.get_input_embeddings().weight.shape[0]

    def forward(self, input_ids: Tensor, **kwargs: object) -> Tensor:
        """Outputs for every token given the tokens before it, by a plain forward pass.

        Args:
            input_ids: `[B, S]`.
            kwargs: for the backbone (`attention_mask`, `position_ids`, …).

        Returns:
            `[B, S, n_out]`, entry `t` about `Z(x = ids[:t], y = ids[t])`. With a Q head entry 0 is 0: a first
            token has no prefix to read.
        """
        hidden = self.backbone(input_ids=input_ids, use_cache=False, **kwargs).last_hidden_state
        if self.head.shape.kind == "V":
            return self.head.at_tokens(hidden)
        outputs = self.head.of_tokens(hidden[:, :-1], input_ids[:, 1:, None])[:, :, 0]
        return F.pad(outputs, (0, 0, 1, 0))
