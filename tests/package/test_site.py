"""The documentation site is built strictly, has all pages, and needs nothing from elsewhere."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.package.conftest import ROOT

FETCHED = re.compile(r'<(?:script|img|link)[^>]+(?:src|href)="(https?://[^"]+)"')


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, str(ROOT / "package" / "site_pages.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def test_every_page_is_there_and_fetches_nothing(site: Path) -> None:
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "SECURITY.md", ROOT / "CHANGELOG.md"]:
        built = site / page.relative_to(ROOT).with_suffix("") / "index.html"
        assert built.is_file(), page
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    fetched = {(page.name, url) for page in pages for url in FETCHED.findall(page.read_text())}
    assert {(page, url) for page, url in fetched if not url.startswith("https://github.com")} == set()


def test_the_public_functions_are_described(site: Path) -> None:
    page = (site / "reference" / "python" / "index.html").read_text()
    for name in ("qsharp_core.policy.select_candidates", "trainer.tasks.base.Problem", "trainer.rewards.base.Case"):
        assert f'id="{name}"' in page


def test_the_routes_are_described(site: Path) -> None:
    described = json.loads((site / "reference" / "openapi.json").read_text())
    assert described["info"]["title"] == "qsharp-serve"
    assert {"/v1/completions", "/v1/critics/{name}/score", "/v1/rollouts"} <= described["paths"].keys()
    page = (site / "reference" / "http" / "index.html").read_text()
    for asset in ("swagger-ui.css", "swagger-ui-bundle.js", "openapi.json"):
        assert f'"../{asset}"' in page
        assert (site / "reference" / asset).is_file()
