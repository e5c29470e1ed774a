"""Scores candidates with a native critic: a head on the reference's hidden states, with a table of all tokens.

The first layer of `NativeHead` is a sum, of which one part, `W_e · norm(e(y))`, depends on the token alone. It is
tabled once for all tokens. A step then costs one matrix product per row, and an activation and a dot product per
candidate.

Shapes: R rows, K candidates, D width of the reference's hidden states, E width of its embeddings, W width of the head,
O outputs per candidate, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qsharp_core.critic.native import NativeHead
from qsharp_core.critic.scoring.base import Question
from qsharp_core.returns import ReturnDistribution

TABLED_AT_ONCE = 8192  # tokens whose entries of the table are computed in one product


class NativeScorer:
    """A native head as it is served beside one reference.

    Args:
        head: on any device.
        distribution: what the head's outputs mean.
        embeddings: the reference's input embeddings, `[V, E]`.
        dtype: dtype of the table. Everything else is small, and float32.
        device: where the table is, and the tensors that `score` is given.
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
            # The constants of all parts of the sum, together.
            self._bias_W = (head.bias.float() + constant_W + log_ref_W).to(device) + hidden_W
            self._least = float(head.log_ref.least)  # type: ignore[arg-type]
            self._out_OW = head.out.weight.detach().float().to(device)
            self._out_O = head.out.bias.detach().float().to(device)

    @property
    def vocab(self) -> int:
        """The number of token ids that the critic knows: ids are below it."""
        return self._table_VW.shape[0]

    @property
    def table_bytes(self) -> int:
        """Size of the table in bytes."""
        return self._table_VW.nbytes

    def answer(self, question: Question) -> Tensor:
        """Outputs `[R, K, n_out]` of every candidate of every row, float32, whether it is asked for or not."""
        return self.score(question.hidden(), question.ids_RK, question.log_ref_RK)

    @torch.inference_mode()
    def score(self, hidden_RD: Tensor, ids_RK: Tensor, log_ref_RK: Tensor) -> Tensor:
        """Outputs `[R, K, n_out]` of every candidate of every row, float32. Does not wait for the device.

        Args:
            hidden_RD: `h(x)` of each row, in any floating-point dtype.
            ids_RK: candidates, int64.
            log_ref_RK: `ln ref(y|x)` of the candidates.
        """
        row_RW = F.linear(hidden_RD.float(), self._hidden_WD, self._bias_W)
        features_RKW = F.embedding(ids_RK, self._table_VW).float()
        features_RKW += row_RW[:, None]
        features_RKW.addcmul_(log_ref_RK.clamp(min=self._least).float()[..., None], self._log_ref_W)
        # In place: these are megabytes, which the CPU's cache then holds once, not twice.
        return F.linear(torch.ops.aten.gelu_(features_RKW), self._out_OW, self._out_O)


def _table(embeddings: Tensor, weight_WE: Tensor, dtype: torch.dtype) -> Tensor:
    """The table `[V, W]`: the part of the first layer that depends on the token alone, without constants."""
    vocab, width = len(embeddings), len(weight_WE)
    table_VW = torch.empty(vocab, width, dtype=dtype, device=weight_WE.device)
    for start in range(0, vocab, TABLED_AT_ONCE):
        part = embeddings[start : start + TABLED_AT_ONCE].to(weight_WE.device).float()
        table_VW[start : start + TABLED_AT_ONCE] = part @ weight_WE.T
    return table_VW
