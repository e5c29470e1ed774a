"""What vLLM and transformers log while they load weights, without the lines that alarm people for nothing.

vLLM warns of every weight whose file has another dtype than the model is served in: 122 lines for the default model,
which is stored in float32 and served in bfloat16 because that was asked for. What differs is said once, by vLLM itself
("Casting torch.float32 to torch.bfloat16").
"""

import logging

LOADER = "vllm.model_executor.models.utils"
"""The logger of vLLM's loader of weights."""
CAST = "Attempted to load weight %s with dtype %s into "


class _WithoutCasts(logging.Filter):
    """Keeps everything but the message that a weight is cast."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(CAST)


def without_casts() -> None:
    """Leaves those lines out in this process; called twice it does nothing more."""
    logger = logging.getLogger(LOADER)
    if not any(isinstance(one, _WithoutCasts) for one in logger.filters):
        logger.addFilter(_WithoutCasts())
