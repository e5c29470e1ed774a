"""Which package may import which: the contracts of docs/architecture.md, checked over all imports, lazy ones, too."""

from itertools import permutations

import grimp
import pytest

import qsharp
from qsharp_core import cli

PACKAGES = ("qsharp", "qsharp_core", "server", "trainer")
ALLOWED = {("server", "qsharp_core"), ("trainer", "qsharp_core"), ("qsharp", "qsharp_core")}
USE_VLLM = ("qsharp_core.vllm_plugin", "server")


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph(
        *PACKAGES, include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None
    )


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


@pytest.mark.parametrize(("importer", "imported"), [*permutations(PACKAGES, 2)])
def test_packages_import_the_core_alone(graph: grimp.ImportGraph, importer: str, imported: str) -> None:
    imports = {
        (module, other)
        for module in graph.modules
        if inside(module, importer)
        for other in graph.find_modules_directly_imported_by(module)
        if inside(other, imported)
    }
    if (importer, imported) in ALLOWED:
        assert imports
    else:
        assert imports == set()


def test_vllm_is_imported_in_the_plugin_and_the_server_alone(graph: grimp.ImportGraph) -> None:
    importers = graph.find_modules_that_directly_import("vllm")
    assert {module for module in importers if not any(inside(module, package) for package in USE_VLLM)} == set()
    assert importers


def test_no_package_has_a_cycle_among_what_it_contains(graph: grimp.ImportGraph) -> None:
    packages = [m for m in graph.modules if not graph.is_module_squashed(m) and graph.find_children(m)]
    assert {*PACKAGES} - {"qsharp"} < {*packages}  # which is a single module
    cycles = {(package, *link) for package in packages for link in graph.nominate_cycle_breakers(package)}
    assert {(importer, imported) for _, importer, imported in cycles} == set()


def test_every_command_has_its_module(graph: grimp.ImportGraph) -> None:
    assert {module for module, _ in cli.COMMANDS.values()} <= graph.modules


def test_the_public_package_takes_what_it_exports_from_the_trainer(graph: grimp.ImportGraph) -> None:
    """It imports that when it is asked for, so that no import of it is in the graph."""
    assert {*qsharp._HOMES} | {"QSharpError"} == {*qsharp.__all__}
    assert {*qsharp._HOMES.values()} <= graph.modules
    assert all(inside(module, "trainer") for module in qsharp._HOMES.values())
    assert all(getattr(qsharp, name) is not None for name in qsharp.__all__)
