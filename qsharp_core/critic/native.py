"""The model of a native critic: a small head on the reference's own hidden states, without a backbone of its own.

Before a token is drawn, the reference has read the prefix, so that `h(x)` is known: the hidden state that its
language-model head reads. The head's outputs for the candidate `y` follow from `h(x)`, from `y`'s input embedding
`e(y)` in the reference, and from `ln ref(y|x)`:

    outputs(x, y) = W_o · GELU(W_h · norm(h(x)) + W_e · norm(e(y)) + w_l · norm(ln ref(y|x)) + b) + b_o

where `norm` subtracts a mean and divides by a scale (docs/method.md, "Native critics"). The number of parameters does
not depend on the vocabulary.

Shapes: D width of the reference's hidden states, E width of its embeddings, W width of the head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class NativeShape:
    """Sizes of a native head.

    Attributes:
        hidden: width of the reference's hidden states, D.
        embed: width of the reference's input embeddings, E.
        width: width of the GELU layer, W.
        n_out: number of outputs per candidate.
    """

    hidden: int
    embed: int
    width: int
    n_out: int


class Standardised(nn.Module):
    """A linear map without bias of its standardised input: `weight @ ((input - mean) / scale)`.

    Tensors: buffers `mean` and `scale`, `[inputs]` (0 and 1 until they are set from data); parameter
    `weight [outputs, inputs]`.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)  # as `nn.Linear` does

    def normed(self, values: Tensor) -> Tensor:
        """The standardised input, `[..., inputs] -> [..., inputs]`, in the dtype of the weights."""
        return (values.to(self.weight.dtype) - self.mean) / self.scale

    def forward(self, values: Tensor) -> Tensor:
        return F.linear(self.normed(values), self.weight)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight `[outputs, inputs]` and bias `[outputs]`, float32, of the same map of the raw input."""
        weight = self.weight.double() / self.scale.double()
        return weight.float(), -(weight @ self.mean.double()).float()


class NativeHead(nn.Module):
    """The head as it is trained and stored: outputs for triples of hidden state, embedding and `ln ref`.

    `state_dict` holds `hidden.{mean,scale,weight}` of `[D]`, `[D]`, `[W, D]`; `token.{mean,scale,weight}` of `[E]`,
    `[E]`, `[W, E]`; `log_ref.{mean,scale,weight}` of `[1]`, `[1]`, `[W, 1]`; `log_ref.least []`; `bias [W]`;
    `out.weight [n_out, W]` and `out.bias [n_out]`. A smaller `ln ref` is raised to `log_ref.least`, the least that the
    head was trained on, so that it is never asked about a token less likely than it knows. Output weights begin at 0,
    the uniform prior: an untrained head does not steer.

    Args:
        shape: sizes of the head.
        input_dropout: probability with which each standardised input of `h` and `e` is dropped in training.
        dropout: probability with which each feature after the GELU layer is dropped in training.
    """

    def __init__(self, shape: NativeShape, input_dropout: float = 0.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.hidden = Standardised(shape.hidden, shape.width)
        self.token = Standardised(shape.embed, shape.width)
        self.log_ref = Standardised(1, shape.width)
        self.log_ref.register_buffer("least", torch.tensor(float("-inf")))
        self.bias = nn.Parameter(torch.zeros(shape.width))
        self.out = nn.Linear(shape.width, shape.n_out)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.input_dropout = nn.Dropout(input_dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, embedding: Tensor, log_ref: Tensor) -> Tensor:
        """Outputs `[..., n_out]` in the dtype of the weights; inputs may have any floating-point dtype.

        Args:
            hidden: `h(x)`, `[..., D]`: what the reference's language-model head reads after the prefix.
            embedding: `e(y)`, `[..., E]`: the row of the reference's input embedding matrix, as it is stored.
            log_ref: `ln ref(y|x)`, `[...]`, after masks and biases and at the sampling temperature.
        """
        least: Tensor = self.log_ref.least  # type: ignore[assignment]
        features = (
            F.linear(self.input_dropout(self.hidden.normed(hidden)), self.hidden.weight)
            + F.linear(self.input_dropout(self.token.normed(embedding)), self.token.weight)
            + self.log_ref(log_ref.maximum(least.to(log_ref.dtype))[..., None])
            + self.bias
        )
        return self.out(self.dropout(F.gelu(features)))
