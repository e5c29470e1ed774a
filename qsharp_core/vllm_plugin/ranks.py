"""Tensor parallelism: one rank asks the critics, and all ranks tilt by its answer.

Every tensor-parallel rank has the same gathered logits and samples from them on its own. Ranks whose guided logits
differ by one bit may sample different tokens, and would from then on compute different requests together. Therefore
only rank 0 holds critics. It broadcasts all that the guided policy of a step follows from: the candidates, their tilts,
the tilt of the tail and the greatest reward. A row that failed has no candidates; the others need not know more.

Whether a step has this exchange, and of what shape, follows from the requests' parameters, which every rank has.

Shapes: R rows, V vocabulary, K most candidates of any row.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from qsharp_core.policy import Candidates
from qsharp_core.vllm_plugin import upstream


class Ranks:
    """The tensor-parallel ranks of this engine, seen from one of them.

    Args:
        group: the ranks' process group, of a backend that takes tensors on `device`; None if there is one rank.
        device: of the tensors that are exchanged.
    """

    def __init__(self, group: ProcessGroup | None, device: torch.device) -> None:
        self._group = group
        if group is not None:
            # Backends reserve memory at their first call: here, where vLLM counts it.
            torch.distributed.broadcast(torch.zeros(1, device=device), group=group, group_src=0)

    @classmethod
    def of(cls, vllm_config: Any, device: torch.device) -> "Ranks":
        """The ranks, seen from the vLLM worker that this runs in."""
        return cls(upstream.tensor_parallel_group(vllm_config), device)

    @property
    def leads(self) -> bool:
        """Whether this rank has the critics."""
        return self._group is None or self._group.rank() == 0

    def agree(self, candidates: Candidates, tilt_RK: Tensor, bounds_R2: Tensor) -> tuple[Candidates, Tensor, Tensor]:
        """Returns the arguments of rank 0, on every rank. Does not wait for the device.

        Args:
            candidates: chosen on every rank from the same logits. Their ids are sent, too, because `topk` returns tied
                tokens in any order.
            tilt_RK: relative tilts, float64; read on rank 0 alone.
            bounds_R2: the tilt of each row's tail, and the greatest reward, float64; read on rank 0 alone.
        """
        if self._group is None:
            return candidates, tilt_RK, bounds_R2
        most = tilt_RK.shape[1]
        # Token ids are exact in float64, so that one message is enough.
        message = torch.cat([candidates.ids_RK.double(), candidates.mask_RK.double(), tilt_RK, bounds_R2], dim=1)
        torch.distributed.broadcast(message, group=self._group, group_src=0)
        ids_RK, mask_RK, tilt_RK, bounds_R2 = message.split([most, most, most, 2], dim=1)
        ids_RK = ids_RK.long()
        log_ref_RK = candidates.log_ref_RV.gather(1, ids_RK).double()
        return Candidates(candidates.log_ref_RV, ids_RK, log_ref_RK, mask_RK.bool()), tilt_RK, bounds_R2
