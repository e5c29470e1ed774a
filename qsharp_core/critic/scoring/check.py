"""Before a critic serves, its cached passes are compared with a plain forward pass."""

import torch
from torch import Tensor

from qsharp_core.critic.scoring.backbone import CachedBackbone
from qsharp_core.errors import CriticError

# Largest difference of a hidden state that is accepted, as a share of the state's largest entry.
TOLERANCE = {torch.float32: 1e-3}
TOLERANCE_16_BIT = 5e-2


class LoadCheck:
    """A history, a candidate behind it, and their hidden states by a plain forward pass.

    Args:
        backbone: of the critic that is checked.

    Attributes:
        history: random tokens that fill some blocks.
        candidate: the token behind them.
    """

    @torch.inference_mode()
    def __init__(self, backbone: CachedBackbone) -> None:
        length = min(backbone.capacity, 2 * backbone.blocks.block_size + 3)
        generator = torch.Generator().manual_seed(0)
        tokens: list[int] = torch.randint(backbone.critic.vocab, (length + 1,), generator=generator).tolist()
        self.history, self.candidate = tokens[:-1], tokens[-1]
        self._name = type(backbone.critic.backbone).__name__
        self._tolerance = TOLERANCE.get(backbone.dtype, TOLERANCE_16_BIT)
        self._plain_2D = backbone.hidden_plain(tokens)[-2:]

    def compare(self, hidden: Tensor) -> None:
        """Compares hidden states of a cached pass, `[…, 1, D]` or `[…, 2, D]`, with those of the plain pass.

        Args:
            hidden: of the last token of the history and, where there are two, of the candidate.

        Raises:
            CriticError: they differ by more than rounding.
        """
        plain = self._plain_2D[: hidden.shape[-2]]
        worst = ((hidden - plain).abs().amax(-1) / plain.abs().amax(-1)).max().item()
        if not worst < self._tolerance:
            raise CriticError(
                f"{self._name} cannot serve as a critic's backbone: with the paged cache its hidden states differ from "
                f"a plain forward pass by {worst:.2g} of their size"
            )
