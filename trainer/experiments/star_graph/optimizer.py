"""What models here are trained with: Muon for the matrices of the layers, AdamW for all else; or AdamW alone."""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from trainer.training.optimisation import Optimisation


class OptimizerSpec(BaseModel):
    """An optimizer and its schedule: a linear warm-up, then constant, then linearly to zero.

    Attributes:
        kind: the optimizer; with Muon, AdamW trains what Muon is not for.
        learning_rate: of `kind`.
        other_learning_rate: of AdamW beside Muon.
        weight_decay: of all parameters.
        warmup, cooldown: fractions of the steps.
        clip: the greatest norm of the gradient.
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
        """The factor of the learning rate when a fraction `done` of all steps is made."""
        rising = (done + 1e-3) / self.warmup if done < self.warmup else 1.0
        falling = (1 - done) / self.cooldown if done > 1 - self.cooldown else 1.0
        return min(rising, falling, 1.0)


def optimizers(layers: nn.Module, modules: Iterable[nn.Module], spec: OptimizerSpec) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon beside it if `spec` says so.

    Args:
        layers: the module whose matrices Muon is for: a backbone. Its embeddings are left to AdamW.
        modules: whose parameters are trained.
        spec: the kind of optimizer and its learning rates.
    """
    everything = trained_parameters(modules)
    embeddings = {id(p) for m in layers.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    inner = {id(p) for p in layers.parameters() if p.ndim == 2} - embeddings
    matrices = [p for p in everything if id(p) in inner] if spec.kind == "muon" else []
    chosen = {id(p) for p in matrices}
    others = [p for p in everything if id(p) not in chosen]
    rate = spec.other_learning_rate if spec.kind == "muon" else spec.learning_rate
    chosen_optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=spec.weight_decay)
    ]
    if matrices:
        chosen_optimizers.append(torch.optim.Muon(matrices, lr=spec.learning_rate, weight_decay=spec.weight_decay))
    return chosen_optimizers


def trained_parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters of modules that require gradients, each once."""
    return list({id(p): p for module in modules for p in module.parameters() if p.requires_grad}.values())


def optimisation(
    modules: Sequence[nn.Module],
    chosen: Sequence[torch.optim.Optimizer],
    spec: OptimizerSpec,
    steps: int,
    description: str,
    done: int = 0,
) -> Optimisation:
    """The training loop of `modules` by the optimizers `chosen`; see `training.optimisation`."""
    return Optimisation(
        trained_parameters(modules),
        chosen,
        lambda step, greatest: greatest * spec.factor((step - 1) / steps),
        clip=spec.clip,
        steps=steps,
        done=done,
        description=description,
    )
