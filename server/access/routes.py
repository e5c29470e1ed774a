"""What each route of the app is open to. A route that is not listed here is the admin's alone.

The table names every route that vLLM and this project mount, so that one which is new is noticed
(`tests/server/test_gate.py` walks the running app's).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from starlette.routing import Match
from starlette.types import Scope


class Access(Enum):
    """Who may use a route."""

    OPEN = auto()  # everyone, without a key
    METRICS = auto()  # as OPEN where the server opens it, else as USER
    DOCS = auto()  # the same
    USER = auto()  # holders of any key
    ADMIN = auto()  # the admin
    CLOSED = auto()  # nobody: as if it were not there


class Body(Enum):
    """How a route's body is taken in."""

    WHOLE = auto()  # read before the route is called, up to the usual limit
    STREAM = auto()  # read by the route, which has a limit of its own


@dataclass(frozen=True)
class Rule:
    """What holds for one route."""

    access: Access
    body: Body = Body.WHOLE


_OPEN, _USER, _ADMIN, _CLOSED = Rule(Access.OPEN), Rule(Access.USER), Rule(Access.ADMIN), Rule(Access.CLOSED)
_METRICS, _DOCS = Rule(Access.METRICS), Rule(Access.DOCS)
_CHAT = "/v1/chat/completions"

# By path as the app has it; then by method, or one rule for all methods.
RULES: Mapping[str, Rule | Mapping[str, Rule]] = {
    "/health": _OPEN,
    "/liveness": _OPEN,
    "/version": _OPEN,
    "/metrics": _METRICS,
    "/docs": _DOCS,
    "/docs/oauth2-redirect": _DOCS,
    "/openapi.json": _DOCS,
    "/static": _DOCS,
    "/": _OPEN,
    "/playground": _OPEN,
    "/load": _USER,
    "/v1/models": _USER,
    "/tokenize": _USER,
    "/detokenize": _USER,
    "/v1/completions": _USER,
    _CHAT: _USER,
    f"{_CHAT}/batch": _USER,
    "/v1/responses": _USER,
    "/v1/messages": _USER,
    "/v1/messages/count_tokens": _USER,
    "/v1/systemone": _USER,
    "/generative_scoring": _USER,
    "/inference/v1/generate": _USER,
    f"{_CHAT}/render": _USER,
    "/v1/completions/render": _USER,
    "/v1/messages/render": _USER,
    "/v1/responses/render": _USER,
    f"{_CHAT}/derender": _USER,
    "/v1/completions/derender": _USER,
    "/v1/critics": {"GET": _USER, "POST": _ADMIN},
    "/v1/critics/{name}": _USER,
    "/v1/critics/{name}/score": _USER,
    "/v1/critics/{name}/activate": _ADMIN,
    "/v1/critics/{name}/rollback": _ADMIN,
    "/v1/critics/{name}/{version}": _ADMIN,
    "/v1/rollouts": {"GET": _USER, "DELETE": _ADMIN},
    "/v1/rollouts/count": _USER,
    "/v1/rollouts/export": _USER,
    "/v1/rollouts/import": Rule(Access.ADMIN, Body.STREAM),
    "/v1/rollouts/rewards": _USER,
    "/v1/rollouts/{rollout_id}": _USER,
    "/v1/rollouts/{rollout_id}/reward": _USER,
    f"{_CHAT}/chatcmpl-{{rest}}": _USER,
    f"{_CHAT}/chatcmpl-{{rest}}/messages": _USER,
    # vLLM keeps responses without an owner, and ends requests by an id that anybody may guess.
    "/v1/responses/{response_id}": _ADMIN,
    "/v1/responses/{response_id}/cancel": _ADMIN,
    "/inference/v1/abort_requests": _ADMIN,
    # These change the engine, or tell how it is built.
    "/scale_elastic_ep": _ADMIN,
    "/is_scaling_elastic_ep": _ADMIN,
    "/kv_event_sources": _ADMIN,
    # SageMaker's: one tries every kind of request in turn, and what it takes a body for is hard to foresee.
    "/invocations": _CLOSED,
    "/ping": _CLOSED,
}


def rule_of(path: str, method: str) -> Rule:
    """The rule of the route with this path, as the app has it, for this method."""
    rule = RULES.get(path, _ADMIN)
    return rule if isinstance(rule, Rule) else rule.get(method, _ADMIN)


def find_rule(routes: Iterable[Any], scope: Scope) -> Rule:
    """The rule for a connection, by the route that the app's own router will choose for it.

    What no route takes needs a key, and is then answered with a 404 or 405 by the app.
    """
    for route in routes:
        match, _ = route.matches(scope)
        if match is Match.FULL:
            return rule_of(route.path, scope.get("method", "GET"))
    return _USER
