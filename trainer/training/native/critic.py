"""A native critic, a head on the reference's hidden states, as a run trains it."""

from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoConfig

from qsharp_core.critic.checkpoint import CriticCard, MLPCard, input_embeddings
from qsharp_core.critic.native import NativeHead, NativeShape
from qsharp_core.critic.native_checkpoint import load_head, save
from qsharp_core.critic.reference import identify
from trainer.training.base import local_folder, tokenizer_fingerprint
from trainer.training.features.known import Features
from trainer.training.heldout import Predictions
from trainer.training.native.fit import fit_head, standardise
from trainer.training.native.nodes import Labels, Targets, read_labels, read_targets
from trainer.training.native.predict import predict_labels
from trainer.training.native.reference import reference_of, store_of
from trainer.training.outputs import Outputs
from trainer.training.plan import plan_of
from trainer.training.prepare import DataRequirements, Prepared
from trainer.training.publish import CardFields
from trainer.training.rollouts import Rollouts
from trainer.training.run import Progress, Run
from trainer.training.settings import TrainingError, TrainSettings
from trainer.training.trainable import Evaluate, Watch


class NativeTrainable:
    """A native critic as `trainable.TrainableCritic`. It is trained in one process, on one device.

    Raises:
        TrainingError, CriticError: the reference or the critic to continue cannot be read.
    """

    def __init__(self, settings: TrainSettings, outputs: Outputs, accelerator: Accelerator) -> None:
        if accelerator.num_processes > 1:
            raise TrainingError(
                f"a head on the reference's hidden states is trained by one process, not {accelerator.num_processes}: "
                "have the launcher start one, or train a critic with a backbone of its own (--layers, for instance)"
            )
        assert settings.base is not None
        self._settings = settings
        self._outputs = outputs
        self._accelerator = accelerator
        self._base = local_folder(settings.base)
        self._made_for = identify(self._base)
        self._embeddings = input_embeddings(self._base)
        self._continues: CriticCard | None = None
        dropout = {"input_dropout": settings.input_dropout, "dropout": settings.dropout}
        torch.manual_seed(settings.seed)
        if settings.continue_from is None:
            assert settings.mlp is not None
            self._returns = settings.returns
            width, embed = self._made_for.hidden_size, self._embeddings.shape[1]
            self._head = NativeHead(NativeShape(width, embed, settings.mlp, self._returns.n_out), **dropout)
        else:
            self._continues, known = load_head(settings.continue_from, self._base)
            self._returns = self._continues.returns()
            self._head = NativeHead(known.shape, **dropout)
            self._head.load_state_dict(known.state_dict())
        self._train: tuple[Features, Targets] | None = None
        self._held_out: tuple[Features, Labels] | None = None

    @property
    def requirements(self) -> DataRequirements:
        config = AutoConfig.from_pretrained(self._base, local_files_only=True).get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        return DataRequirements(self._returns, limit, len(self._embeddings), self._continues)

    def begin(self, prepared: Prepared) -> str:
        reference = reference_of(self._base, self._settings, prepared, self._accelerator.device)
        store = store_of(reference, self._outputs)
        known = sum(len(shard.keys_E) for shard in store.shards)
        self._train = read_targets(reference, store, prepared.train, self._returns)
        if len(prepared.held_out):
            self._held_out = read_labels(reference, store, prepared.held_out)
        new = sum(len(shard.keys_E) for shard in store.shards) - known
        nodes = len(self._train[0]) + (len(self._held_out[0]) if self._held_out else 0)
        return (
            f"{nodes} distinct prefixes to judge; the reference was run for {new} of them, the others were known; "
            f"{plan_of(self._settings, len(self._train[0]))}"
        )

    def fit(self, prepared: Prepared, run: Run, evaluate: Evaluate, watch: Watch) -> Progress:
        assert self._train is not None
        features, targets = self._train
        if self._continues is None:
            standardise(self._head, features, self._embeddings)
        self._head.to(self._accelerator.device)
        run.forget_after(0)  # of a run that was killed
        return fit_head(
            self._head, self._returns, features, targets, self._embeddings, self._settings, run, evaluate, watch
        )

    def round_weights(self) -> None:
        # What is standardised with stays exact: it is little, and a mean may be many times its scale.
        for parameter in self._head.requires_grad_(False).parameters():
            parameter.copy_(parameter.to(self._outputs.dtype))

    def predict(self, rollouts: Rollouts) -> Predictions:
        assert self._held_out is not None
        return predict_labels(self._head, self._returns, *self._held_out, self._embeddings, rollouts)

    def card(self) -> CardFields:
        return {
            "backbone": "reference",
            "head": "Q",
            "hidden": "last",
            "mlp": MLPCard(width=self._head.shape.width).model_dump(),
            "made_for": self._made_for.model_dump(),
            "tokenizer_fingerprint": tokenizer_fingerprint(self._base),
        }

    def save(self, folder: Path, card: CriticCard) -> None:
        head = self._head.cpu()
        for parameter in head.parameters():
            parameter.data = parameter.data.to(self._outputs.dtype)
        save(folder, card, head)
