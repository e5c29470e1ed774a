"""The memory of a critic's cache: keys and values of every layer, slot by slot."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class KVPool:
    """Keys and values of every layer: `[slots, G, D]` each, with slot = block · block_size + offset.

    Shapes: G key heads, D head width; both may differ by layer, and between keys and values.

    Attributes:
        keys, values: one tensor per layer.
        stacked: the same memory, tensors of equal shape together: `[…, slots, G, D]`.
    """

    keys: list[Tensor]
    values: list[Tensor]
    stacked: list[Tensor]

    @classmethod
    def zeros(cls, slots: int, shapes: list[tuple[torch.Size, torch.Size]], like: Tensor) -> "KVPool":
        """A pool of zeros.

        Args:
            slots: number of slots.
            shapes: `(G, D)` of the keys and of the values of each layer.
            like: a tensor of the pool's dtype and device.
        """
        every = [shape for layer in shapes for shape in layer]
        stacked = {shape: like.new_zeros(every.count(shape), slots, *shape) for shape in dict.fromkeys(every)}
        parts = {shape: iter(tensor) for shape, tensor in stacked.items()}
        tensors = [next(parts[shape]) for shape in every]
        return cls(tensors[::2], tensors[1::2], [*stacked.values()])

    def move(self, source_N: Tensor, target_N: Tensor) -> None:
        """Copies N slots to other ones, in every layer."""
        for tensor in self.stacked:
            tensor.index_copy_(1, target_N, tensor.index_select(1, source_N))

    def wipe(self, slots_N: Tensor) -> None:
        """Sets N slots to zero, in every layer."""
        for tensor in self.stacked:
            tensor.index_fill_(1, slots_N, 0)
