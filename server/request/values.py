"""Values of fields: what a JSON number is, and how a wrong value is reported."""

import json
from typing import Annotated

from pydantic import Field, Strict

from qsharp_core.errors import GuidanceError

# No string, no bool, no NaN.
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]


def wrong(param: str, value: object, accepted: str) -> GuidanceError:
    """The error for a field whose value it does not accept.

    Args:
        param: the field's name, as the client writes it.
        value: what the request has there.
        accepted: what the field accepts, in words that follow "must be".
    """
    text = json.dumps(value, default=repr)
    return GuidanceError(f"{param} must be {accepted}; got {text if len(text) <= 100 else text[:97] + '...'}", param)
