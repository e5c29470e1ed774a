"""Ends a training when its seconds are spent, and keeps what it has done, so that it can go on."""

import json
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

CLOCK = "clock.json"
CHECKPOINT_SECONDS = 300
"""Between two checkpoints."""
WARMUP = 0.1
"""The share of the seconds in which the learning rate rises."""


class Budget(TrainerCallback):
    """The seconds of a training. Those in which checkpoints are written do not count.

    Args:
        seconds: that it may take, to the end of the step that passes them.
        spent: what it has taken before it was stopped.
        name: for the bar.
    """

    def __init__(self, seconds: float, spent: float, name: str) -> None:
        self.seconds = seconds
        self._spent = spent
        self._since: float | None = time.monotonic()
        self._saved = spent
        self._bar = tqdm(total=round(seconds), initial=round(spent), unit="s", desc=name)

    @property
    def spent(self) -> float:
        """Seconds until now."""
        return self._spent + (time.monotonic() - self._since if self._since is not None else 0.0)

    @property
    def rate(self) -> float:
        """The learning rate as a share of the greatest: it rises, and falls with the time until nothing is left."""
        share = min(self.spent / self.seconds, 1.0)
        return min(share / WARMUP, (1 - share) / (1 - WARMUP))

    def stop(self) -> None:
        """Stops the clock."""
        self._spent, self._since = self.spent, None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        spent = self.spent
        self._bar.update(min(round(spent), round(self.seconds)) - self._bar.n)
        self._bar.set_postfix(step=state.global_step)
        if spent >= self.seconds:
            self.stop()
            self._bar.close()
            control.should_training_stop = True
        elif spent - self._saved >= CHECKPOINT_SECONDS:
            self.stop()
            self._saved = spent
            control.should_save = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A checkpoint is whole when its clock is written."""
        assert args.output_dir is not None
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / CLOCK).write_text(json.dumps(self._spent))
        self._since = time.monotonic()


def last_checkpoint(folder: Path) -> tuple[Path | None, float]:
    """The newest whole checkpoint of a training, and the seconds spent until it; None and 0 if there is none."""
    whole = [clock.parent for clock in folder.glob(f"checkpoint-*/{CLOCK}")]
    if not whole:
        return None, 0.0
    newest = max(whole, key=lambda path: int(path.name.rpartition("-")[2]))
    return newest, float(json.loads((newest / CLOCK).read_text()))
