"""What models here are trained with: Muon for the matrices of the layers, AdamW for all else; or AdamW alone."""

from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn


class OptimizerSpec(BaseModel):
    """An optimizer and its schedule: a linear warm-up, then constant, then linearly to zero.

    Attributes:
        learning_rate: of `kind`.
        other_learning_rate: AdamW's, beside Muon.
        warmup, cooldown: parts of the steps.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["muon", "adamw"] = "muon"
    learning_rate: float = Field(default=3e-3, gt=0)
    other_learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup: float = Field(default=0.02, ge=0, lt=1)
    cooldown: float = Field(default=0.3, ge=0, le=1)
    clip: float = Field(default=1.0, gt=0)

    def factor(self, done: float) -> float:
        """Of the learning rate, when a part of all steps is done."""
        rising = (done + 1e-3) / self.warmup if done < self.warmup else 1.0
        falling = (1 - done) / self.cooldown if done > 1 - self.cooldown else 1.0
        return min(rising, falling, 1.0)


class Optimizer:
    """Steps a module's parameters.

    Args:
        layers: the module whose matrices Muon is for: a backbone, its embeddings left out.
        everything: modules whose parameters are trained.
        spec: how.
        steps: how many there will be.
    """

    def __init__(self, layers: nn.Module, everything: Iterable[nn.Module], spec: OptimizerSpec, steps: int) -> None:
        self._spec, self._steps, self._done = spec, steps, 0
        self._parameters = list({id(p): p for m in everything for p in m.parameters() if p.requires_grad}.values())
        embeddings = {id(p) for m in layers.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        inner = {id(p) for p in layers.parameters() if p.ndim == 2} - embeddings
        matrices = [p for p in self._parameters if id(p) in inner] if spec.kind == "muon" else []
        chosen = {id(p) for p in matrices}
        others = [p for p in self._parameters if id(p) not in chosen]
        rate = spec.other_learning_rate if spec.kind == "muon" else spec.learning_rate
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=spec.weight_decay)
        ]
        if matrices:
            self._optimizers.append(torch.optim.Muon(matrices, lr=spec.learning_rate, weight_decay=spec.weight_decay))
        self._rates = [[group["lr"] for group in o.param_groups] for o in self._optimizers]

    def step(self) -> None:
        """One step along the gradients, which are zeroed."""
        torch.nn.utils.clip_grad_norm_(self._parameters, self._spec.clip)
        factor = self._spec.factor(self._done / self._steps)
        for optimizer, rates in zip(self._optimizers, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._done += 1
