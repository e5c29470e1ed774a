"""Who sent a request: the holder of the key that it carries."""

from dataclasses import dataclass

from starlette.requests import HTTPConnection

from qsharp_core.rollouts import records

SCOPE_KEY = "qsharp.principal"  # where the gate leaves it in the ASGI scope
UNNAMED = records.UNNAMED  # holds the keys of `--api-key`, and all that is sent to a server without user keys


@dataclass(frozen=True)
class Principal:
    """The holder of a key.

    Attributes:
        name: owns what is stored of its requests.
        admin: whether it may change critics, import rollouts, and see what belongs to others.
    """

    name: str
    admin: bool = False

    @property
    def sees(self) -> str | None:
        """The owner whose rollouts it may see and change; None means all owners."""
        return None if self.admin else self.name


def principal_of(connection: HTTPConnection) -> Principal:
    """Who sent this request.

    Raises:
        KeyError: the request did not come through the gate.
    """
    principal: Principal = connection.scope[SCOPE_KEY]
    return principal
