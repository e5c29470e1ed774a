"""A private random generator for code that cannot be told which generator to use.

Each of vLLM's tensor-parallel ranks samples on its own, from generators that were seeded alike. A critic is loaded on
one rank only, perhaps in a thread beside a running step. If its initialisation drew from the process's generator, that
rank would sample other tokens than the others.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class PrivateRandomness(TorchDispatchMode):
    """While it is entered, random operations of this thread on CPU tensors do not touch PyTorch's default generator."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        takes_generator = any(argument.name == "generator" for argument in func._schema.arguments)
        if takes_generator and kwargs.get("generator") is None and args[0].device.type == "cpu":
            kwargs["generator"] = self._generator
        return func(*args, **kwargs)
