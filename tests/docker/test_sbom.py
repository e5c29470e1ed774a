"""The bill of materials, made from what is installed here."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from tests.support.compose import DOCKER


def test_it_is_valid_and_complete(tmp_path: Path) -> None:
    out = tmp_path / "sbom.json"
    command = [sys.executable, str(DOCKER / "sbom.py"), str(DOCKER.parent / "pyproject.toml"), str(out)]
    subprocess.run(command, check=True)
    text = out.read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert bill["metadata"]["component"]["name"] == "qsharp-serve"
    purls = {component["name"]: component.get("purl") for component in bill["components"]}
    for name in ("fastapi", "pydantic", "safetensors", "transformers"):
        assert purls[name] == f"pkg:pypi/{name}@{version(name)}"
    (needs,) = [each["dependsOn"] for each in bill["dependencies"] if each["ref"] == "root-component"]
    assert f"fastapi=={version('fastapi')}" in needs


def test_the_tools_are_not_described(tmp_path: Path) -> None:
    """In the image they are in a folder of their own, which the list leaves out."""
    tools = tmp_path / "tools"
    about = tools / "only_a_tool-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: only-a-tool\nVersion: 1.0\n")
    out = tmp_path / "sbom.json"
    project = tmp_path / "pyproject.toml"
    project.write_text('[project]\nname = "something"\nversion = "1"\n')
    subprocess.run([sys.executable, str(DOCKER / "sbom.py"), str(project), str(out), str(tools)], check=True)
    assert "only-a-tool" not in {component["name"] for component in json.loads(out.read_text())["components"]}
