"""The model of a separate critic: any Hugging Face decoder, and a head on its hidden states.

- `V` head: the outputs for `(x, y)` are read at the position of `y`, so candidates are run as tokens.
- `Q` head: the outputs for `(x, y)`, for all `y`, are read at the last position of `x`.

Shapes: B sequences, S tokens, K candidates, D hidden width, W width of the head's last layer (D, or the MLP's width),
V vocabulary.
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
    """Kind and sizes of a head.

    Attributes:
        kind: where outputs are read; see the module's docstring.
        hidden: width of the backbone's hidden states, D.
        n_out: number of outputs per prefix and token.
        vocab: number of tokens, V.
        mlp: width of the hidden layer; None without one.
    """

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
        """Inputs of the last layer: `[..., D] -> [..., W]`."""
        return hidden if self.hidden is None else F.gelu(self.hidden(hidden))

    def at_tokens(self, hidden: Tensor) -> Tensor:
        """Outputs of a V head, at each token's own position: `[..., D] -> [..., n_out]`."""
        return F.linear(self.features(hidden), self.weight, self.bias)

    def of_tokens(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Outputs `[..., K, n_out]` of a Q head.

        Args:
            hidden: hidden state of each prefix's last token, `[..., D]`.
            ids: next tokens, `[..., K]`.
        """
        # The weights of all asked tokens as one matrix, so that each prefix takes one product. `embedding` copies whole
        # rows at once.
        weight = F.embedding(ids, self.weight.flatten(1)).unflatten(-1, self.weight.shape[1:]).flatten(-3, -2)
        return (weight @ self.features(hidden)[..., None]).view(*ids.shape, -1) + self.bias[ids]


class Critic(nn.Module):
    """A backbone, a head, and what the head's outputs mean.

    Args:
        backbone: a decoder as `transformers.AutoModel` returns it, without a language-model head.
        head: reads the hidden states of the backbone.
        distribution: the return distribution that the outputs parametrise.
    """

    def __init__(self, backbone: Any, head: Head, distribution: ReturnDistribution) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.head = head
        self.distribution = distribution

    @property
    def max_length(self) -> int | None:
        """Number of positions that the backbone knows; None where it has no limit."""
        return getattr(self.backbone.config, "max_position_embeddings", None)

    @property
    def vocab(self) -> int:
        """The number of token ids that the backbone can embed: ids are below it."""
        return self.backbone.get_input_embeddings().weight.shape[0]

    def forward(self, input_ids: Tensor, **kwargs: object) -> Tensor:
        """Outputs of every token given the tokens before it, by a plain forward pass.

        Args:
            input_ids: `[B, S]`, int64.
            kwargs: passed on to the backbone (`attention_mask`, `position_ids`, …).

        Returns:
            `[B, S, n_out]`; entry `t` parametrises `Z(x = ids[:t], y = ids[t])`. With a Q head entry 0 is 0, because
            the first token has no prefix.
        """
        hidden = self.backbone(input_ids=input_ids, use_cache=False, **kwargs).last_hidden_state
        if self.head.shape.kind == "V":
            return self.head.at_tokens(hidden)
        outputs = self.head.of_tokens(hidden[:, :-1], input_ids[:, 1:, None])[:, :, 0]
        return F.pad(outputs, (0, 0, 1, 0))
