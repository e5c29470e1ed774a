"""What an experiment writes: `report.json`."""

from typing import Literal

from pydantic import ConfigDict, JsonValue

from trainer.reports import Report, ReportPart


class MachineReport(ReportPart):
    """What a measurement was made on; `packages` are versions by name."""

    cpu: str
    cores: int | None
    gpus: list[str]
    python: str
    packages: dict[str, str]


class RunReport(Report):
    """The fields that every experiment's `report.json` has.

    Attributes:
        recipe: the recipe's name.
        kind: the recipe's kind.
        machine: what it ran on.
        settings: the recipe's fields.
    """

    format: Literal[1] = 1
    recipe: str
    kind: str
    machine: MachineReport
    settings: dict[str, JsonValue]


class Outcome(ReportPart):
    """What an experiment came to: the further fields of `report.json`, which each kind of recipe defines.

    It can be read from a whole `report.json`, so fields that it does not know are ignored.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)
