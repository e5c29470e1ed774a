"""A separate critic, one with a backbone of its own, as a run trains it."""

from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from qsharp_core.critic.checkpoint import CriticCard, MLPCard, save
from trainer.training.heldout import Predictions
from trainer.training.outputs import Outputs
from trainer.training.plan import plan_of
from trainer.training.prepare import DataRequirements, Prepared
from trainer.training.publish import CardFields
from trainer.training.rollouts import Rollouts
from trainer.training.run import Progress, Run
from trainer.training.separate.batching import tokens_of
from trainer.training.separate.fit import Fit, fit
from trainer.training.separate.passes import Passes, passes_of
from trainer.training.separate.predict import predict
from trainer.training.separate.scorer import LabelScorer
from trainer.training.separate.start import start
from trainer.training.settings import TrainingError, TrainSettings
from trainer.training.sharded import is_asked_for, whole
from trainer.training.trainable import Evaluate, Watch


class SeparateTrainable:
    """A separate critic as `trainable.TrainableCritic`.

    Raises:
        TrainingError, CriticError: the base, or the critic to continue, cannot be read.
    """

    def __init__(self, settings: TrainSettings, outputs: Outputs, accelerator: Accelerator) -> None:
        if settings.max_seconds is not None and accelerator.num_processes > 1:
            raise TrainingError("--max-seconds is for one process: several would not end at the same step")
        self._sharded = is_asked_for(accelerator)
        self._settings = settings
        self._outputs = outputs
        self._accelerator = accelerator
        self._start = start(settings)
        self._critic = self._start.critic
        self._scorer = LabelScorer(self._critic).eval()
        self._passes = Passes(False, 1)  # until it is known which rollouts there are

    @property
    def requirements(self) -> DataRequirements:
        return DataRequirements(
            self._critic.distribution, self._critic.max_length, self._critic.vocab, self._start.parent
        )

    def begin(self, prepared: Prepared) -> str:
        self._critic.to(self._accelerator.device)
        passes = passes_of(self._settings, self._accelerator, self._critic, prepared.train)
        self._passes = replace(passes, level=self._sharded)
        way = "prefixes that rollouts share are run once" if self._passes.trees else "each rollout is run in full"
        if (processes := self._accelerator.num_processes) > 1:
            way += f"; {processes} processes" + (" that share the critic's weights" if self._sharded else "")
        return f"{way}; {plan_of(self._settings, tokens_of(prepared.train))}"

    def fit(self, prepared: Prepared, run: Run, evaluate: Evaluate, watch: Watch) -> Progress:
        job = Fit(
            scorer=self._scorer,
            sharded=self._sharded,
            returns=self._critic.distribution,
            rollouts=prepared.train,
            settings=self._settings,
            passes=self._passes,
            accelerator=self._accelerator,
            autocast=_autocast(self._settings, self._accelerator),
            evaluate=evaluate,
            watch=watch,
            checkpoint_every=self._outputs.checkpoint_every,
        )
        progress = fit(job, run)
        if self._sharded:
            self._gather()
        return progress

    def _gather(self) -> None:
        """Puts the weights together again, in every process: a critic as it began, with the weights that it has now."""
        critic = start(self._settings).critic.to(self._accelerator.device)
        scorer = LabelScorer(critic).eval()
        with torch.no_grad():
            for (name, ours), (same, theirs) in zip(
                scorer.named_parameters(), self._scorer.named_parameters(), strict=True
            ):
                assert name == same
                ours.copy_(whole(theirs))
        self._critic, self._scorer = critic, scorer

    def round_weights(self) -> None:
        self._critic.requires_grad_(False).to(self._outputs.dtype).float()

    def predict(self, rollouts: Rollouts) -> Predictions:
        return predict(self._scorer, rollouts, self._passes, self._accelerator)

    def card(self) -> CardFields:
        shape = self._critic.head.shape
        return {
            "head": shape.kind,
            "mlp": MLPCard(width=shape.mlp).model_dump() if shape.mlp else None,
            "borrow": ["input_embeddings"] if self._start.borrows else [],
            "tokenizer_fingerprint": self._start.tokenizer_fingerprint,
        }

    def save(self, folder: Path, card: CriticCard) -> None:
        # Of the architecture that is stored: the base's configuration names its language model.
        config = self._critic.backbone.config
        config.architectures = [type(self._critic.backbone).__name__]
        config.dtype = self._outputs.dtype
        save(folder, card, self._critic.cpu().to(self._outputs.dtype))


def _autocast(settings: TrainSettings, accelerator: Accelerator) -> torch.dtype | None:
    if settings.precision == "auto":
        able = accelerator.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if able else None
    return torch.bfloat16 if settings.precision == "bf16" else None
