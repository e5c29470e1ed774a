"""Every error of the tree has its status, and OpenAI's shape."""

import json

import pytest
from vllm.exceptions import GenerationError

from qsharp_core.errors import (
    ConfigError,
    CriticError,
    CriticFailure,
    GuidanceError,
    NoCriticError,
    QSharpError,
    StoreError,
    UnknownCriticError,
)
from server.errors import (
    ConflictError,
    ForbiddenError,
    NotFoundError,
    SampleFailure,
    UnauthorizedError,
    UnavailableError,
    response_of,
)


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (GuidanceError("m", "eta"), 400, "BadRequestError"),
        (UnknownCriticError("m", "guidance.critic"), 400, "BadRequestError"),
        (NoCriticError("m", "eta"), 409, "ConflictError"),
        (CriticError("m"), 400, "BadRequestError"),
        (CriticFailure("m", "not_finite"), 500, "InternalServerError"),
        (SampleFailure("m", "not_finite"), 500, "InternalServerError"),
        (ConfigError("m"), 500, "InternalServerError"),
        (StoreError("m"), 503, "ServiceUnavailableError"),
        (UnauthorizedError("m"), 401, "AuthenticationError"),
        (ForbiddenError("m"), 403, "PermissionDeniedError"),
        (NotFoundError("m"), 404, "NotFoundError"),
        (ConflictError("m"), 409, "ConflictError"),
        (UnavailableError("m"), 503, "ServiceUnavailableError"),
    ],
)
def test_status_and_shape(error: QSharpError, status: int, kind: str) -> None:
    response = response_of(error)
    assert response.status_code == status
    assert json.loads(bytes(response.body)) == {
        "error": {"message": "m", "type": kind, "param": getattr(error, "param", None), "code": status}
    }


def test_a_missing_key_is_challenged() -> None:
    assert response_of(UnauthorizedError("m")).headers["www-authenticate"] == "Bearer"


def test_vllm_writes_a_failing_sample_into_streams_as_a_500() -> None:
    failure = SampleFailure("m", "not_finite")
    assert isinstance(failure, GenerationError)
    assert failure.status_code == 500
    assert failure.reason == "not_finite"
