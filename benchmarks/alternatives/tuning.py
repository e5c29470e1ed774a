"""Fine-tunes a model by TRL, all of its parameters, for so many seconds."""

import json
import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from benchmarks.alternatives.budget import Budget, last_checkpoint
from benchmarks.alternatives.examples import Drawn, examples, pairs
from qsharp_core.precision import fast_bfloat16
from trainer.reports import write_json
from trainer.training.settings import TrainingError

RESULT = "training.json"
TOGETHER = 2
"""Examples, or pairs, in memory at once: what a step remembers of more takes several gigabytes."""
UNLIMITED = 10**9  # steps: seconds end a training


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """A way to fine-tune.

    Attributes:
        method: `rft` imitates the model's own successful samples, `dpo` prefers right ones to wrong ones.
        lr: the greatest learning rate.
        budget: seconds that it may take.
        seed: of the order of examples, and of pairs.
        batch: examples, or pairs, of a step.
        beta: of DPO: how dear it is to leave the reference.
    """

    method: Literal["rft", "dpo"]
    lr: float
    budget: float
    seed: int
    batch: int
    beta: float

    @property
    def name(self) -> str:
        """Of its folder."""
        beta = f"-beta{self.beta:g}" if self.method == "dpo" else ""
        return f"{self.method}{beta}-lr{self.lr:g}-batch{self.batch}-{self.budget:.0f}s-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What a training came to.

    Attributes:
        examples: that there were, or pairs.
        seconds: that it took, from the loading of the model to the last step.
        steps: that it made.
        passes: over the examples.
        loss: the mean over the last `LOGGED` steps.
        threads: of the processor.
        bf16: whether the arithmetic was bfloat16's (weights are float32).
    """

    examples: int
    seconds: float
    steps: int
    passes: float
    loss: float
    threads: int
    bf16: bool


LOGGED = 5


class _TokenisedDPO(DPOTrainer):
    """Takes pairs as the tokens that were drawn: text that is tokenised again may come to others."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def tune(tuning: Tuning, base: Path, rollouts: Sequence[Drawn], folder: Path) -> tuple[Path, Tuned]:
    """Fine-tunes a copy of the model; what is there is not made again, and what was begun goes on.

    Args:
        tuning: how.
        base: folder of the model.
        rollouts: what it learns from.
        folder: for models.

    Returns:
        The fine-tuned model's folder, and what the training came to.

    Raises:
        TrainingError: the rollouts have nothing that can be learned from.
    """
    run = folder / tuning.name
    model, result = run / "model", run / RESULT
    if not result.exists():
        made = _train(tuning, base, rollouts, run, model)
        write_json(result, asdict(made))
        for checkpoint in run.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    return model, Tuned(**json.loads(result.read_text()))


def _train(tuning: Tuning, base: Path, rollouts: Sequence[Drawn], run: Path, out: Path) -> Tuned:
    rows = examples(rollouts) if tuning.method == "rft" else pairs(rollouts, tuning.seed)
    if not rows:
        kind = "right completion" if tuning.method == "rft" else "prompt with a right and a wrong completion"
        raise TrainingError(f"{tuning.method}: among {len(rollouts)} rollouts there is no {kind}")
    checkpoint, spent = last_checkpoint(run)
    budget = Budget(tuning.budget, spent, tuning.name)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model, data, half = _load(base), Dataset.from_list(rows), fast_bfloat16()
    together = math.gcd(tuning.batch, TOGETHER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=tuning.lr, weight_decay=0.0)
    settings: dict[str, Any] = {
        "output_dir": str(run), "max_steps": UNLIMITED,
        "per_device_train_batch_size": together, "gradient_accumulation_steps": tuning.batch // together,
        "max_length": None, "seed": tuning.seed, "bf16": half, "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False, "save_strategy": "no", "save_total_limit": 1, "logging_steps": LOGGED,
        "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    given: dict[str, Any] = {
        "train_dataset": data,
        "processing_class": tokenizer,
        "callbacks": [budget],
        "optimizers": (optimizer, LambdaLR(optimizer, lambda _: budget.rate)),
    }
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if tuning.method == "rft":
        trainer = SFTTrainer(model, SFTConfig(**settings), **given)
    else:
        trainer = _TokenisedDPO(model, _load(base), DPOConfig(beta=tuning.beta, **settings), **given)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model(str(out))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Tuned(
        examples=len(rows),
        seconds=budget.spent,
        steps=trainer.state.global_step,
        passes=trainer.state.global_step * tuning.batch / len(rows),
        loss=losses[-1] if losses else trainer.state.log_history[-1]["train_loss"],
        threads=torch.get_num_threads(),
        bf16=half,
    )


def _load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
