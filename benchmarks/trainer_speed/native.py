"""A native critic: the reference's pass over all rollouts, then as many steps of the head on all sides.

`qsharp train` learns from distinct prefixes, the others from labels: a step of theirs has as many more labels as there
are more of them.
"""

from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.trainer_speed.ours import fresh_run, pausing
from benchmarks.trainer_speed.peers import Rates, Steps, peer
from benchmarks.trainer_speed.states import HeadLoss, States, label_batch, padded_states
from benchmarks.trainer_speed.turns import Pause, Turn
from qsharp_core.critic.checkpoint import input_embeddings
from qsharp_core.critic.native import NativeHead, NativeShape
from qsharp_core.precision import fast_bfloat16
from trainer.training.base import local_folder
from trainer.training.data import merge_rollouts
from trainer.training.features.extract import ReferenceModel
from trainer.training.features.known import Features
from trainer.training.native.fit import fit_head, standardise
from trainer.training.native.nodes import Targets, read_targets
from trainer.training.native.reference import store_of
from trainer.training.plan import Plan, plan_of
from trainer.training.rollouts import Rollouts
from trainer.training.settings import TrainSettings


@dataclass(frozen=True)
class NativeTraining:
    """Some epochs over some rollouts.

    Attributes:
        settings: of the training; with a number of epochs or steps.
        rollouts: what is learned from.
        folder: for what trainings write.
        head: what all sides start from, standardisation included; None is what the settings say.
    """

    settings: TrainSettings
    rollouts: Rollouts
    folder: Path
    head: NativeHead | None = None

    @cached_property
    def reference(self) -> ReferenceModel:
        """The reference, in the precision that `qsharp train` reads it in."""
        return reference_of(self.settings)

    @cached_property
    def embeddings(self) -> Tensor:
        """The reference's."""
        assert self.settings.base is not None
        return input_embeddings(local_folder(self.settings.base))

    @cached_property
    def nodes(self) -> int:
        """The number of distinct prefixes with a label."""
        _, labelled = merge_rollouts(self.rollouts)
        return len(np.unique(np.concatenate(labelled)))

    @cached_property
    def plan(self) -> Plan:
        """Steps, and their sizes in distinct prefixes."""
        return plan_of(self.settings, self.nodes)

    def read(self) -> tuple[Features, Targets]:
        """The reference's pass as `qsharp train` makes it: prefixes once, features onto the disk."""
        _, outputs = fresh_run(self.folder / "qsharp", self.settings)
        torch.use_deterministic_algorithms(True)
        try:
            return read_targets(self.reference, store_of(self.reference, outputs), self.rollouts, self.settings.returns)
        finally:
            torch.use_deterministic_algorithms(False)

    def read_rows(self) -> States:
        """The reference's pass as the others make it."""
        return padded_states(self.reference, self.rollouts)

    def ours(self, features: Features, targets: Targets) -> Turn:
        """The training of the head by `qsharp train`."""
        return Turn(partial(self._fit, self._begun(features), features, targets), deterministic=True)

    def peer(self, side: str, states: States) -> Turn:
        """The training of the head by another side."""
        steps = Steps(self._draws(len(states)), partial(label_batch, states, self.embeddings))
        return peer(side, self.folder, HeadLoss(self._begun(states)), steps, Rates.of(self.settings, self.plan))

    def _begun(self, inputs: Features | States) -> NativeHead:
        if self.head is not None:
            head = deepcopy(self.head)
            head.input_dropout.p, head.dropout.p = self.settings.input_dropout, self.settings.dropout
            return head
        assert self.settings.mlp is not None
        torch.manual_seed(self.settings.seed)
        shape = NativeShape(inputs.hidden(torch.tensor([0])).shape[1], self.embeddings.shape[1], self.settings.mlp, 1)
        head = NativeHead(shape, self.settings.input_dropout, self.settings.dropout)
        standardise(head, inputs, self.embeddings)  # type: ignore[arg-type]
        return head

    def _fit(self, head: NativeHead, features: Features, targets: Targets, pause: Pause) -> None:
        run, _ = fresh_run(self.folder / "head", self.settings)
        fit_head(
            head, self.settings.returns, features, targets, self.embeddings, self.settings, run,
            lambda step, part: None, pausing(pause),
        )  # fmt: skip

    def _draws(self, labels: int) -> list[Tensor]:
        """The labels of each step, in one random order of all labels after another."""
        size = max(round(self.plan.batch * labels / self.nodes), 1)
        generator = torch.Generator().manual_seed(self.settings.seed)
        orders = [torch.randperm(labels, generator=generator) for _ in range(self.plan.steps * size // labels + 1)]
        return list(torch.cat(orders).split(size)[: self.plan.steps])


def reference_of(settings: TrainSettings) -> ReferenceModel:
    """The reference that a run reads, loaded."""
    assert settings.base is not None
    half = fast_bfloat16() if settings.precision == "auto" else settings.precision == "bf16"
    reference = ReferenceModel(
        local_folder(settings.base), torch.bfloat16 if half else torch.float32, torch.device("cpu")
    )
    assert reference.model is not None
    return reference
