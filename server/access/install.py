"""Puts the gate in front of the app, as the command line and the environment say."""

import os
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import SecretStr

from qsharp_core.errors import ConfigError
from qsharp_core.secret_files import secret
from server.access.gate import LOOPBACK, MIB, Gate, Policy
from server.access.keys import KeyRing
from server.access.quotas import Quotas
from server.settings import Settings


def install_gate(app: FastAPI, args: Namespace) -> None:
    """Wraps everything that the app will consist of, middleware that is added later included.

    Raises:
        ConfigError: names the setting that cannot work.
    """
    policy = policy_of(args, Settings.of(args))
    build = app.build_middleware_stack

    def guarded() -> Any:
        return Gate(build(), app, policy)

    app.build_middleware_stack = guarded  # type: ignore[method-assign]


def policy_of(args: Namespace, settings: Settings) -> Policy:
    """What the gate lets pass.

    Raises:
        ConfigError: names the setting that cannot work.
    """
    keys = key_ring(args, settings)
    keyless = not keys.guards_users
    hosts = {*LOOPBACK, args.host} - {None, ""} if keyless and settings.auth and args.uds is None else None
    return Policy(
        keys=keys,
        quotas=Quotas(settings.rate_limit, settings.max_concurrent),
        max_body=int(settings.max_body_mib * MIB),
        open=settings.open,
        origins=args.allowed_origins,
        hosts=hosts,
    )


def key_ring(args: Namespace, settings: Settings) -> KeyRing:
    """Who holds which key.

    Raises:
        ConfigError: the file of keys cannot be read.
    """
    # A plain `vllm serve` guards its own routes with these besides; of ours `settle_keys` has taken them.
    plain = [] if hasattr(args, "qsharp_api_keys") else _plain_keys(args)
    users = [*plain, *(key.get_secret_value() for key in settings.api_keys)]
    admin = settings.admin_key.get_secret_value() if settings.admin_key is not None else None
    return KeyRing([key for key in users if key != admin], admin, settings.keys)


def _plain_keys(args: Namespace) -> Sequence[str]:
    return [key for key in args.api_key or [secret("VLLM_API_KEY")] if key]


def settle_keys(args: Namespace) -> None:
    """Takes vLLM's keys over, so that the gate alone asks for them, and has a server without any listen to this host
    alone.

    Raises:
        ConfigError: it would be open to others.
    """
    args.qsharp_api_keys = [SecretStr(key) for key in _plain_keys(args)]
    args.api_key = None
    os.environ.pop("VLLM_API_KEY", None)
    settings = Settings.of(args)
    if policy_of(args, settings).keys.guards_users or not settings.auth or args.uds is not None:
        return
    if args.host is None:
        args.host = "127.0.0.1"
    elif args.host not in LOOPBACK:
        raise ConfigError(
            f"--host {args.host} opens this server to others, and it has no keys: give it some with --api-key or "
            "--keys, or say --no-auth"
        )
