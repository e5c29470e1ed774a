"""The API process's picture of the loaded critics."""

import gc

import pytest

from qsharp_core.errors import NoCriticError, UnknownCriticError
from server.critics.catalog import Registry
from tests.test_server_schema import described, registry_of


class Owner:
    pass


def test_the_first_name_stays_the_default() -> None:
    registry = registry_of(described("a", "1"), described("b", "1"))
    registry.refresh([described("b", "1"), described("a", "2")])  # a@1 has gone, a@2 was activated
    assert registry.default == "a"
    assert registry.resolve(None).key == "a@2"


def test_leaving_versions_are_not_resolved_whatever_the_worker_still_says() -> None:
    registry = registry_of(described("a", "1"))
    registry.leave(registry.critics["a@1"])
    registry.refresh([described("a", "1")])
    with pytest.raises(NoCriticError):
        registry.resolve(None)
    registry.refresh([described("a", "1"), described("b", "1")])
    with pytest.raises(UnknownCriticError):
        registry.resolve("a@1")
    assert registry.refresh([described("b", "1")]) == ["a@1"]


def test_rolls_back_to_what_was_active_and_is_still_loaded() -> None:
    registry = Registry()
    for active in "123":
        before = registry.active.get("a")
        registry.refresh([described("a", v, active=v == active) for v in "123"])
        registry.activated("a", before)
    registry.refresh([described("a", "1", active=False), described("a", "3")])
    previous = registry.previous("a")
    assert previous is not None
    assert previous.key == "a@1"
    assert registry.previous("a") is None


def test_a_request_counts_until_it_is_released_or_forgotten() -> None:
    info = registry_of(described("a", "1")).critics["a@1"]
    first, second = Owner(), Owner()
    release = info.lease(first)
    info.lease(second)
    assert info.in_flight == 2
    release()
    release()
    assert info.in_flight == 1
    assert not info.idle.is_set()
    del second
    gc.collect()
    assert info.in_flight == 0
    assert info.idle.is_set()
