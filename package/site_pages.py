"""The documentation site: the repository's own pages, the public Python functions, and the HTTP interface.

    python package/site_pages.py FOLDER     builds it into FOLDER, as `make docs` does

Pages are taken as they stand, in a copy of the folders around them, so that the same links work there and here. What
MkDocs warns about ends the build.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE", "NOTICE")
FOLDERS = ("docs", "examples")
# The public Python functions, by heading.
MODULES = {
    "For notebooks": (
        "qsharp",
        "trainer.api.client",
        "trainer.api.collect",
        "trainer.api.reward",
        "trainer.api.export",
        "trainer.api.train",
        "trainer.api.evaluate",
        "trainer.api.score",
    ),
    "The method": ("qsharp_core.policy", "qsharp_core.returns", "qsharp_core.residual"),
    "Tasks and verifiers": ("trainer.tasks.base", "trainer.rewards.base", "trainer.reports"),
    "Rollouts": ("qsharp_core.rollouts.records", "qsharp_core.rollouts.parquet"),
    "Errors": ("qsharp_core.errors",),
}
HTTP = """# HTTP

All routes of the server, as it describes them itself on `/openapi.json`; [reference](../docs/reference.md) says in
words what is ours.

<link rel="stylesheet" href="../swagger-ui.css">
<div id="swagger"></div>
<script src="../swagger-ui-bundle.js"></script>
<script>SwaggerUIBundle({url: "../openapi.json", dom_id: "#swagger", supportedSubmitMethods: []})</script>
"""


def python_reference() -> str:
    """The page of the public Python functions, which mkdocstrings fills."""
    parts = ["# Python\n\nIn an installed package `trainer` and `server` are `qsharp_serve.trainer` and "
             "`qsharp_serve.server`.\n"]  # fmt: skip
    for heading, names in MODULES.items():
        parts += [f"## {heading}\n", *(f"::: {name}\n" for name in names)]
    return "\n".join(parts)


def openapi() -> object:
    """What the server says of its routes; no engine is started for it."""
    os.environ.pop("VLLM_PLUGINS", None)
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    from vllm.entrypoints.launchers.app import build_app

    from server import launch
    from server.commands import serve

    launch.allow_plugin()
    app = build_app(serve.parse(["model"]), ("generate",), None)
    return app.openapi()


def stage(folder: Path) -> None:
    """Puts all pages into a folder."""
    from server.api.docs import ASSETS

    for name in PAGES:
        shutil.copy(ROOT / name, folder / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name)
    reference = folder / "reference"
    reference.mkdir()
    (reference / "python.md").write_text(python_reference())
    (reference / "http.md").write_text(HTTP)
    (reference / "openapi.json").write_text(json.dumps(openapi()))
    for asset in ("swagger-ui.css", "swagger-ui-bundle.js"):
        shutil.copy(ASSETS / asset, reference / asset)


def build(out: Path) -> None:
    """Builds the site into a folder.

    Raises:
        subprocess.CalledProcessError: MkDocs failed, or warned.
    """
    with tempfile.TemporaryDirectory() as folder:
        pages = Path(folder) / "pages"
        pages.mkdir()
        stage(pages)
        environment = {**os.environ, "QSHARP_PAGES": str(pages), "NO_MKDOCS_2_WARNING": "1"}
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(ROOT / "mkdocs.yml")]
        subprocess.run([*command, "--site-dir", str(out.resolve())], env=environment, check=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
