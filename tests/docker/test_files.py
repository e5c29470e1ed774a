"""The files in `docker/`; `test_http_check.py` uses what they start, and `make compose-check` the containers, too."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import http_check
import make_secrets
from server.access import keys
from server.commands import serve
from server.presets import smollm2
from tests.docker.test_locks import locked
from tests.support.compose import DOCKER, filled_in, load, merged
from trainer.commands import loop as loop

ROOT = Path(__file__).parents[2]
DASHBOARDS = sorted((DOCKER / "grafana" / "dashboards").glob("*.json"))


def rules() -> list[dict[str, Any]]:
    return [rule for group in load("prometheus/rules.yml")["groups"] for rule in group["rules"]]


ALONE, SCALED = ("compose.yaml",), ("compose.yaml", "compose.scale.yaml")
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


SECRET_WORDS = {"KEY", "PASSWORD", "TOKEN", "SECRET"}
SECRET_FILES = {
    "server": {"vllm_api_key", "qsharp_admin_key", "qsharp_rollouts", "hf_token"},
    "trainer": {"qsharp_admin_key"},
    "postgres": {"postgres_password"},
    "prometheus": {"vllm_api_key"},
    "grafana": {"grafana_password"},
    "balancer": set(),
}
NETWORKS = {
    "server": {"front", "learning", "scraping", "store"},
    "trainer": {"learning"},
    "postgres": {"store"},
    "prometheus": {"scraping", "panels"},
    "grafana": {"panels"},
}
BEHIND_ONE_PORT = {
    **NETWORKS,
    "server": {*NETWORKS["server"], "serving"},
    "balancer": {"entry", "learning", "serving", "scraping"},
}


@pytest.mark.parametrize("paths", [ALONE, SCALED])
def test_services_are_closed(paths: tuple[str, ...]) -> None:
    compose = merged(*paths)
    services = compose["services"]
    entry = "balancer" if paths is SCALED else "server"
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == "unless-stopped", name
        assert {"mem_limit", "pids_limit", "healthcheck" if name != "server" else "build"} <= service.keys(), name
        assert all("size=" in filled_in(each) for each in service.get("tmpfs", [])), name
        for volume in service.get("volumes", []):
            source, _, *mode = volume.split(":")
            assert source in compose["volumes"] or (source.startswith("./") and mode == ["ro"]), name
    ports = {name: [filled_in(port) for port in service.get("ports", [])] for name, service in services.items()}
    assert ports.pop(entry) == ["127.0.0.1:8000:8000"]
    assert ports.pop("server", []) == []
    assert ports == {
        "trainer": [],
        "postgres": [],
        "prometheus": ["127.0.0.1:9090:9090"],
        "grafana": ["127.0.0.1:3000:3000"],
    }
    assert [name for name in services if "BIND" in str(services[name].get("ports"))] == [entry]
    critics = {name: [v for v in services[name]["volumes"] if v.startswith("critics:")] for name in SHARING}
    assert critics == SHARING
    assert load("compose.gpu.yaml")["services"].keys() <= services.keys()


@pytest.mark.parametrize(("paths", "reached"), [(ALONE, NETWORKS), (SCALED, BEHIND_ONE_PORT)])
def test_networks_are_apart(paths: tuple[str, ...], reached: dict[str, set[str]]) -> None:
    compose = merged(*paths)
    assert {name: set(service["networks"]) for name, service in compose["services"].items()} == reached
    networks = compose["networks"]
    internal = {name for name, network in networks.items() if network and network.get("internal")}
    ways_out = set().union(*reached.values()) - internal
    assert internal == {"learning", "scraping", "store", "serving"} & networks.keys()
    assert ways_out == {"front", "panels", "entry"} & networks.keys()
    for name in ways_out - {"front"}:
        (_, masquerade), *others = networks[name]["driver_opts"].items()
        assert (masquerade, others) == ("false", [])


def test_the_balancer_is_found_and_finds_the_servers() -> None:
    services = merged(*SCALED)["services"]
    balancer, server = services["balancer"], services["server"]
    settings = dict(re.findall(r"presetenv (\w+) (\S+)", (DOCKER / "haproxy" / "haproxy.cfg").read_text()))
    assert (settings["LISTEN"], settings["DNS"]) == ("*:8000", "127.0.0.11:53")  # Docker's own name server
    assert balancer["ports"] == load("compose.yaml")["services"]["server"]["ports"]
    alias, _, port = settings["SERVERS_AT"].partition(":")
    assert (server["networks"]["serving"], port) == ({"aliases": [alias]}, "8000")
    assert f"http://127.0.0.1{settings['WATCH'].removeprefix('*')}/ready" in balancer["healthcheck"]["test"]
    assert load("haproxy/targets/balancer.yml") == [{"targets": [f"balancer{settings['WATCH'].removeprefix('*')}"]}]
    assert f":{Path(balancer['command'][-1]).parent}/" in f":{balancer['volumes'][0].partition(':')[2]}"
    (mounted,) = [volume for volume in services["prometheus"]["volumes"] if "haproxy" in volume]
    _, job = load("prometheus/prometheus.yml")["scrape_configs"]
    assert job["file_sd_configs"] == [{"files": [f"{mounted.split(':')[1]}/*.yml"]}]
    assert balancer["stop_grace_period"] == server["stop_grace_period"]


def test_secrets_are_files() -> None:
    """None is in the environment or on a command line, which `docker inspect` shows."""
    compose = merged(*SCALED)
    assert {name: set(service.get("secrets", [])) for name, service in compose["services"].items()} == SECRET_FILES
    for path in ("compose.yaml", "compose.gpu.yaml", "compose.scale.yaml"):
        for name, service in load(path)["services"].items():
            for variable, value in service.get("environment", {}).items():
                if SECRET_WORDS & set(variable.split("_")):
                    assert value.removeprefix("/run/secrets/") in SECRET_FILES[name], variable
                assert variable != "QSHARP_ROLLOUTS"  # has the password
            command = service.get("command", [])
            flags = command.split() if isinstance(command, str) else command
            assert [flag for flag in flags if re.match("--(api-key|admin-key|rollouts|hf-token)", flag)] == [], name
    used = set(re.findall(r"\$\{(\w+)", (DOCKER / "compose.yaml").read_text()))
    assert [name for name in used if SECRET_WORDS & set(name.split("_"))] == []
    for name, secret in compose["secrets"].items():
        assert secret == {"file": f"${{SECRETS:-./secrets}}/{name}"}
    job, balancer = load("prometheus/prometheus.yml")["scrape_configs"]
    assert job["authorization"] == {"credentials_file": "/run/secrets/vllm_api_key"}
    assert "authorization" not in balancer
    assert "docker/secrets/\n" in (ROOT / ".gitignore").read_text()


def test_images_are_named_in_one_file() -> None:
    images, compose = load("images.yaml")["services"], merged(*SCALED)["services"]
    for name, service in compose.items():
        if name in ("server", "trainer"):
            assert service["image"] == "qsharp-serve:cpu"
        else:
            assert "image" not in service
            assert images[name].keys() == {"image"}
        if name in images:
            assert service["extends"] == {"file": "images.yaml", "service": name}
    text = (DOCKER / "Dockerfile").read_text()
    bases = images["server"]["build"]["args"]
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", text, re.MULTILINE))
    bases_used = set(re.findall(r"^FROM (\S+) AS", text, re.MULTILINE)) - stages - {"${CONVERTER}"}
    assert bases_used == {f"${{{name}}}" for name in bases}
    assert set(re.findall(r"^ARG (\w+)$", text, re.MULTILINE)) == set(bases)


def test_what_can_be_set_is_in_the_example() -> None:
    text = "".join((DOCKER / f"compose{kind}.yaml").read_text() for kind in ("", ".gpu", ".scale"))
    used = set(re.findall(r"\$\{(\w+)", text))
    example = dict(re.findall(r"^(\w+)=(.*)$", (DOCKER / ".env.example").read_text(), re.MULTILINE))
    assert used == example.keys()
    assert re.findall(r"\$\{(\w+):\?", text) == []  # all has a default
    for name, default in re.findall(r"\$\{(\w+):-([^}]*)\}", "".join((DOCKER / path).read_text() for path in SCALED)):
        assert example[name] == default, name


def test_the_image_begins_with_nobodys_keys() -> None:
    """A new volume takes the file over from the image."""
    server, text = load("compose.yaml")["services"]["server"], (DOCKER / "Dockerfile").read_text()
    path = Path(server["environment"]["QSHARP_KEYS"])
    assert f"keys:{path.parent}" in server["volumes"]
    assert text.count(f"COPY --chown=qsharp:qsharp --chmod=600 docker/{path.name} {path.parent}/\n") == 2  # both images
    assert keys.read(DOCKER / path.name) == keys.KeyFile()


def test_the_drain_fits_into_the_grace_period() -> None:
    server = load("compose.yaml")["services"]["server"]
    words = filled_in(server["command"]).split()
    assert int(words[words.index("--shutdown-timeout") + 1]) < int(filled_in(server["stop_grace_period"])[:-1])


@pytest.mark.parametrize("path", ["compose.yaml", "compose.gpu.yaml"])
def test_the_server_takes_its_flags(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    make_secrets.make(tmp_path)
    monkeypatch.setenv("QSHARP_SECRETS_DIR", str(tmp_path))
    name, *flags = filled_in(load(path)["services"]["server"]["command"]).split()
    args = serve.parse([*flags, "model"])
    assert (name, args.host, args.port, args.shutdown_timeout) == ("serve", "0.0.0.0", 8000, 60)


@pytest.mark.parametrize(("paths", "url"), [(ALONE, "http://server:8000"), (SCALED, "http://balancer:8000")])
def test_the_trainer_takes_its_flags(paths: tuple[str, ...], url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, *flags = filled_in(merged(*paths)["services"]["trainer"]["command"]).split()
    ours, training = loop._split(flags)
    monkeypatch.setenv("QSHARP_URL", merged(*paths)["services"]["trainer"]["environment"]["QSHARP_URL"])
    args = loop._parser().parse_args(ours)
    assert (name, args.watch, args.url) == ("loop", True, url)
    assert str(args.out) == "/var/lib/qsharp/critics"
    assert loop._training_parser("name").parse_args(training).backbone == "reference"


def test_the_wheel_is_made_of_all_that_it_takes() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    text = (DOCKER / "Dockerfile").read_text()
    stage = text[text.index(" AS wheel\n") : text.index(" AS cpu-sbom\n")]
    assert {name for name in packages | {"package"} if f"COPY {name} {name}\n" not in stage} == set()
    sent = set(re.findall(r"^!(\S+)$", (DOCKER / "Dockerfile.dockerignore").read_text(), re.MULTILINE))
    assert {*packages, "package", "NOTICE", "LICENSE", "README.md", "pyproject.toml"} <= sent


def test_the_images_are_of_the_pinned_versions_and_not_roots() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (torch,) = [each for each in project["dependencies"] if each.startswith("torch==")]
    (vllm,) = project["optional-dependencies"]["cuda"]
    makefile = (ROOT / "Makefile").read_text()
    model = f"{smollm2.PACKAGE}=={smollm2.PACKAGE_VERSION}"
    assert locked("torch") == {"torch": f"{torch}+cpu".partition("==")[2]}
    assert locked("model") == {smollm2.PACKAGE: smollm2.PACKAGE_VERSION}
    for package in (torch, model):
        assert f" {package}\n" in makefile
    base = load("images.yaml")["services"]["server"]["build"]["args"]["CUDA_BASE"].partition("@")[0]
    assert base == f"vllm/vllm-openai:v{vllm.partition('==')[2]}"
    for target in ("cpu", "cuda"):
        stage = re.split(r"^FROM .* AS \w+$", text.partition(f" AS {target}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
        assert re.findall(r"^USER (\w+)$", stage, re.MULTILINE) == ["qsharp"]
        assert "HEALTHCHECK" in stage
    assert not re.search(r"^# syntax=|<<", text, re.MULTILINE)  # neither is to be had without a registry
