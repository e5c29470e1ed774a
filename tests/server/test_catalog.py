"""The API process's picture of the loaded critics."""

import gc

import pytest

from qsharp_core.errors import NoCriticError, UnknownCriticError
from server.critics.catalog import CriticCatalog
from tests.server.test_schema import catalog_of, described


class Owner:
    pass


def test_the_first_name_stays_the_default() -> None:
    catalog = catalog_of(described("a", "1"), described("b", "1"))
    catalog.refresh([described("b", "1"), described("a", "2")])  # a@1 has gone, a@2 was activated
    assert catalog.default == "a"
    assert catalog.resolve(None).key == "a@2"


def test_leaving_versions_are_not_resolved_whatever_the_worker_still_says() -> None:
    catalog = catalog_of(described("a", "1"))
    catalog.leave(catalog.critics["a@1"])
    catalog.refresh([described("a", "1")])
    with pytest.raises(NoCriticError):
        catalog.resolve(None)
    catalog.refresh([described("a", "1"), described("b", "1")])
    with pytest.raises(UnknownCriticError):
        catalog.resolve("a@1")
    assert catalog.refresh([described("b", "1")]) == ["a@1"]


def test_rolls_back_to_what_was_active_and_is_still_loaded() -> None:
    catalog = CriticCatalog()
    for active in "123":
        before = catalog.active.get("a")
        catalog.refresh([described("a", v, active=v == active) for v in "123"])
        catalog.activated("a", before)
    catalog.refresh([described("a", "1", active=False), described("a", "3")])
    previous = catalog.previous("a")
    assert previous is not None
    assert previous.key == "a@1"
    assert catalog.previous("a") is None


def test_a_request_counts_until_it_is_released_or_forgotten() -> None:
    info = catalog_of(described("a", "1")).critics["a@1"]
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
