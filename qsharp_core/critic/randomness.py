"""Random numbers of one's own, for code that cannot be told which generator to use.

vLLM's tensor-parallel ranks draw their samples each for itself, from generators that were seeded alike. A critic lives
on one rank and may be loaded by a thread beside a running step: a number that its initialisation drew from the common
generator would leave that rank's samples behind the others'.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class PrivateRandomness(TorchDispatchMode):
    """While entered, this thread's random operations on CPU tensors leave PyTorch's default generator alone."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        takes_one = any(argument.name == "generator" for argument in func._schema.arguments)
        if takes_one and kwargs.get("generator") is None and args[0].device.type == "cpu":
            kwargs["generator"] = self._generator
        return func(*args, **kwargs)
