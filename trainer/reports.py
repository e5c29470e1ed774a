"""Reports: what a command writes to disk as JSON, and a later program reads again.

Each report is a pydantic model beside the code that makes it: `training.report`, `evaluation.report`, `loop.report`,
`experiments.report`. A report that a later program reads says its `format`, so that a change of its fields is noticed.
"""

import json
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from qsharp_core.disk import whole_file
from qsharp_core.errors import QSharpError


class ReportError(QSharpError):
    """A report that cannot be read."""


class ReportPart(BaseModel):
    """A part of a report; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Report(ReportPart):
    """A report in a JSON file."""

    def write(self, path: Path) -> None:
        """Writes the file whole or not at all."""
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def read(cls, path: Path) -> Self:
        """The report in a file.

        Raises:
            ReportError: there is none, or it is not of this program's format.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ReportError(f"{path} cannot be read: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise ReportError(f"{path} is not a report of this program: {field}: {first['msg']}") from error


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON; the file is there whole or not at all."""
    with whole_file(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
