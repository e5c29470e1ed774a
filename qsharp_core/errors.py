"""Every error that this project raises on purpose.

    QSharpError
    ├── ConfigError            the server or the engine was started with settings that cannot work
    ├── CriticError            a critic cannot be used: unreadable, or made for another vocabulary or reference
    ├── GuidanceError          a request's guidance is wrong (HTTP 400); names the field
    │   ├── UnknownCriticError     it names a critic that is not loaded
    │   └── NoCriticError          it asks for guidance and none is loaded (HTTP 409)
    ├── CriticFailure          the critic failed while it scored this request (HTTP 500)
    ├── RolloutError           a rollout or a reward that the store cannot take (HTTP 400); names the field
    └── StoreError             the rollout store failed (HTTP 503)

`server.errors` alone maps them to HTTP. `GuidanceError` is a `ValueError`, because vLLM turns that into a 400 when a
request is admitted.
"""


class QSharpError(Exception):
    """The base class of all errors of this project."""


class ConfigError(QSharpError):
    """Settings that cannot work together; the message says what to change."""


class CriticError(QSharpError):
    """A critic that cannot be used; the message says which file or field, and why."""


class GuidanceError(QSharpError, ValueError):
    """A wrong field in a request.

    Args:
        message: what is wrong and what the field accepts.
        param: name of the field, as the client wrote it.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownCriticError(GuidanceError):
    """The request names a critic, or a version of it, that is not loaded."""


class NoCriticError(GuidanceError):
    """The request asks for guidance, and no critic is loaded."""


class CriticFailure(QSharpError):
    """The critic gave no usable score for a request.

    Args:
        message: what happened.
        reason: a metric's label.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class RolloutError(QSharpError, ValueError):
    """Data that cannot be a rollout or a reward.

    Args:
        message: what is wrong and what is accepted.
        param: name of the field.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class StoreError(QSharpError):
    """The rollout store failed. Nothing of what was to be written is in it.

    The message is for clients: it says why, and has no SQL, address or path in it.
    """
