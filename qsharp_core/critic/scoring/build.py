"""The one place that chooses between the two scorers with a cache."""

import logging
from collections.abc import Collection
from concurrent.futures import Executor

from qsharp_core.critic.model import Critic
from qsharp_core.critic.scoring.backbone import CachedBackbone
from qsharp_core.critic.scoring.cached import CachedScorer
from qsharp_core.critic.scoring.fixed import FixedShapeScorer
from qsharp_core.critic.scoring.paged import PagedScorer
from qsharp_core.critic.scoring.prefix_attention import PrefixAttention

logger = logging.getLogger(__name__)


def build_scorer(
    critic: Critic,
    cache_tokens: int,
    block_size: int = 16,
    scratch_tokens: int = 1024,
    kernel: PrefixAttention | None = None,
    graphs: tuple[Collection[int], Collection[int]] = ((), ()),
    background: Executor | None = None,
) -> CachedScorer:
    """A scorer for a critic with a backbone of its own.

    It runs in fixed shapes if there is a kernel for them and the backbone can be run so; where it cannot, a warning
    says why, and the scorer is the paged one, which serves every backbone.

    Args:
        critic, cache_tokens, block_size, scratch_tokens: see `CachedBackbone`.
        kernel: attention for steps in fixed shapes; None on devices where these gain nothing.
        graphs: see `FixedShapeScorer`.
        background: see `PagedScorer`.

    Raises:
        CriticError: no scorer can run the backbone: its cached hidden states differ from those of a plain forward pass.
    """
    backbone = CachedBackbone(critic, cache_tokens, block_size, scratch_tokens)
    paged = PagedScorer(backbone, background)
    if kernel is None:
        return paged
    try:
        return FixedShapeScorer(backbone, kernel, graphs)
    except Exception as error:  # whatever a kernel raises
        logger.warning("critic without fixed shapes, each step waits for the device: %s", error)
        return paged
