"""A critic on the reference's own hidden states: a small head, and no backbone of its own.

Before a token is drawn, the reference has read the prefix: `h(x)`, the hidden state that its language-model head
reads, is there. The head's outputs for the candidate `y` follow from `h(x)`, from `y`'s input embedding `e(y)` in the
reference, and from `ln ref(y|x)`:

    outputs(x, y) = W_o · GELU(W_h · norm(h(x)) + W_e · norm(e(y)) + w_l · norm(ln ref(y|x)) + b) + b_o

where `norm` subtracts a mean and divides by a scale. Parameters do not depend on the vocabulary. The first layer is a
sum, so a server tables `W_e · norm(e(y))` once for all tokens (`NativeCritic`); what a step then costs is one product
for each row, and an activation and a dot product for each candidate.

Shapes: R rows, K candidates, D hidden states, E embeddings (both of the reference), W the head's width, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsharp_core.critic.scorer import Question
from qsharp_core.returns import ReturnDistribution

TABLED_AT_ONCE = 8192  # tokens whose part of the first layer is computed together


@dataclass(frozen=True)
class NativeShape:
    """What a native head is made of.

    Attributes:
        hidden: width of the reference's hidden states, D.
        embed: width of its input embeddings, E.
        width: of the GELU layer, W.
        n_out: outputs for each candidate.
    """

    hidden: int
    embed: int
    width: int
    n_out: int


class Standardised(nn.Module):
    """A linear map, without bias, of its input less `mean`, divided by `scale`.

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
        """`[..., inputs]`, standardised, in the dtype of the weights."""
        return (values.to(self.weight.dtype) - self.mean) / self.scale

    def forward(self, values: Tensor) -> Tensor:
        return F.linear(self.normed(values), self.weight)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias, float32, of the same map as one product with what is not standardised."""
        weight = self.weight.double() / self.scale.double()
        return weight.float(), -(weight @ self.mean.double()).float()


class NativeHead(nn.Module):
    """The head as it is trained and stored: a forward pass of (hidden state, embedding, `ln ref`) triples.

    `state_dict` holds `hidden.{mean,scale,weight}` of `[D]`, `[D]`, `[W, D]`; `token.{mean,scale,weight}` of `[E]`,
    `[E]`, `[W, E]`; `log_ref.{mean,scale,weight}` of `[1]`, `[1]`, `[W, 1]`; `log_ref.least []`; `bias [W]`;
    `out.weight [n_out, W]` and `out.bias [n_out]`. `log_ref.least` is a bound below which `ln ref` is raised to it:
    the least that the head was trained on, so that it is asked about no more unlikely tokens than it knows. Output
    weights begin at 0, the uniform prior: an untrained head does not steer.

    Args:
        shape: see there.
        input_dropout: probability with which standardised inputs of `h` and `e` are dropped in training.
        dropout: the same after the GELU layer.
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
        """Outputs `[..., n_out]`, of any floating inputs, in the dtype of the weights.

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


class NativeCritic:
    """A native head as it is served, beside one reference: with its table of all tokens.

    Args:
        head: on any device.
        distribution: what the head's outputs mean.
        embeddings: the reference's input embeddings, `[V, E]`.
        dtype: of the table. All else is float32: it is little.
        device: of the table and of what `score` is given.
    """

    def __init__(
        self,
        head: NativeHead,
        distribution: ReturnDistribution,
        embeddings: Tensor,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.distribution = distribution
        self.shape = head.shape
        with torch.no_grad():
            weight_WE, constant_W = head.token.folded()
            self._table_VW = _table(embeddings, weight_WE.to(device), dtype)
            self._hidden_WD, hidden_W = (part.to(device) for part in head.hidden.folded())
            log_ref_W1, log_ref_W = head.log_ref.folded()
            self._log_ref_W = log_ref_W1[:, 0].to(device)
            # One constant for every row, whichever part of the sum it comes from.
            self._bias_W = (head.bias.float() + constant_W + log_ref_W).to(device) + hidden_W
            self._least = float(head.log_ref.least)  # type: ignore[arg-type]
            self._out_OW = head.out.weight.detach().float().to(device)
            self._out_O = head.out.bias.detach().float().to(device)

    @property
    def vocab(self) -> int:
        """Token ids that can be scored are below this."""
        return self._table_VW.shape[0]

    @property
    def table_bytes(self) -> int:
        """Memory that the table takes."""
        return self._table_VW.nbytes

    def answer(self, question: Question) -> Tensor:
        """Outputs for every candidate of every row, `[R, K, n_out]`, float32."""
        return self.score(question.hidden(), question.ids_RK, question.log_ref_RK)

    @torch.inference_mode()
    def score(self, hidden_RD: Tensor, ids_RK: Tensor, log_ref_RK: Tensor) -> Tensor:
        """Outputs of every candidate of every row, float32 `[R, K, n_out]`; waits for no device.

        Args:
            hidden_RD: `h(x)` of each row, of any floating dtype.
            ids_RK: candidates, int64.
            log_ref_RK: their `ln ref(y|x)`.
        """
        row_RW = F.linear(hidden_RD.float(), self._hidden_WD, self._bias_W)
        features_RKW = F.embedding(ids_RK, self._table_VW).float()
        features_RKW += row_RW[:, None]
        features_RKW.addcmul_(log_ref_RK.clamp(min=self._least).float()[..., None], self._log_ref_W)
        # In place: what is read and written here are megabytes, and a cache holds them.
        return F.linear(torch.ops.aten.gelu_(features_RKW), self._out_OW, self._out_O)


def _table(embeddings: Tensor, weight_WE: Tensor, dtype: torch.dtype) -> Tensor:
    """`[V, W]`: each token's part of the first layer, but for what is the same for all."""
    vocab, width = len(embeddings), len(weight_WE)
    table_VW = torch.empty(vocab, width, dtype=dtype, device=weight_WE.device)
    for start in range(0, vocab, TABLED_AT_ONCE):
        part = embeddings[start : start + TABLED_AT_ONCE].to(weight_WE.device).float()
        table_VW[start : start + TABLED_AT_ONCE] = part @ weight_WE.T
    return table_VW
