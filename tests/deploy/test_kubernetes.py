"""The objects in `deploy/kubernetes`: each by Kubernetes' own schema, and all of them together."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

import make_secrets
import prometheus_rule
from server.commands import serve
from tests.docker.test_files import SECRET_FILES, rules
from tests.support.compose import filled_in, load
from trainer.commands import loop

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
OLDEST = "1.30"  # has the `sleep` of preStop
OURS = "qsharp-serve"
CUSTOM = {"ServiceMonitor", "PrometheusRule"}  # of the Prometheus Operator: no schemas of Kubernetes
NOT_OBJECTS = {"adapter.yaml", "kustomization.yaml"}


def resources(folder: Path) -> Iterator[Path]:
    """The files that a kustomization names, those of others that it names included."""
    for name in yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]:
        path = (folder / name).resolve()
        yield from resources(path) if path.is_dir() else (path,)


def documents() -> list[dict[str, Any]]:
    return [one for path in resources(KUBERNETES) for one in yaml.safe_load_all(path.read_text())]


def named(kind: str, name: str) -> dict[str, Any]:
    (found,) = [one for one in documents() if one["kind"] == kind and one["metadata"]["name"] == name]
    return found


SERVER, TRAINER = (named("Deployment", f"qsharp-{name}")["spec"] for name in ("server", "trainer"))


def pod(deployment: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = deployment["template"]["spec"]
    return found


def container(deployment: dict[str, Any]) -> dict[str, Any]:
    (found,) = pod(deployment)["containers"]
    return dict(found)


def volumes(deployment: dict[str, Any]) -> dict[str, Any]:
    return {volume["name"]: volume for volume in pod(deployment)["volumes"]}


def rendered(folder: Path) -> list[dict[str, Any]]:
    program = shutil.which("kubectl")
    if program is None:
        pytest.skip("there is no kubectl to render with")
    done = subprocess.run([program, "kustomize", str(folder)], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


def test_every_file_is_used() -> None:
    files = {path for path in KUBERNETES.rglob("*.yaml") if path.name not in NOT_OBJECTS}
    assert files == set(resources(KUBERNETES))
    keys = [(one["kind"], one["metadata"]["name"]) for one in documents()]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
@pytest.mark.parametrize("one", documents(), ids=lambda one: f"{one['kind']}/{one['metadata']['name']}")
def test_objects_are_as_their_schema_says(one: dict[str, Any], version: str) -> None:
    if one["kind"] in CUSTOM:
        assert one["apiVersion"] == "monitoring.coreos.com/v1"
        return
    kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.parametrize("folder", [KUBERNETES, KUBERNETES / "base", KUBERNETES / "gpu"], ids=lambda path: path.name)
def test_what_is_applied_is_right(folder: Path) -> None:
    objects = rendered(folder)
    for one in objects:
        assert one["metadata"]["labels"]["app.kubernetes.io/part-of"] == OURS
        if one["kind"] not in CUSTOM:
            kubernetes_validate.validate(one, OLDEST, strict=True)
    assert len(objects) == sum(1 for _ in documents()) - (0 if folder == KUBERNETES else len(CUSTOM))
    for deployment in (one["spec"] for one in objects if one["kind"] == "Deployment"):
        gpu = folder.name == "gpu"
        assert container(deployment)["image"] == f"{OURS}:{'cuda' if gpu else 'cpu'}"
        assert ("nvidia.com/gpu" in container(deployment)["resources"]["limits"]) == gpu


def test_selectors_find_what_they_are_for() -> None:
    labels = SERVER["template"]["metadata"]["labels"]
    other = TRAINER["template"]["metadata"]["labels"]
    assert labels != other
    assert SERVER["selector"]["matchLabels"] == labels
    assert TRAINER["selector"]["matchLabels"] == other
    service, monitor = named("Service", "qsharp"), named("ServiceMonitor", "qsharp")["spec"]
    assert service["spec"]["selector"] == labels
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert named("PodDisruptionBudget", "qsharp-server")["spec"]["selector"]["matchLabels"] == labels
    (spread,) = pod(SERVER)["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == labels
    policy = named("NetworkPolicy", "qsharp-trainer")["spec"]
    assert policy["podSelector"]["matchLabels"] == other
    assert policy["egress"][0]["to"] == [{"podSelector": {"matchLabels": labels}}]
    target = named("HorizontalPodAutoscaler", "qsharp-server")["spec"]["scaleTargetRef"]
    assert named(target["kind"], target["name"])["apiVersion"] == target["apiVersion"]
    assert "replicas" not in SERVER  # applying it again would undo what the autoscaler did


def test_ports_have_one_name() -> None:
    server, service = container(SERVER), named("Service", "qsharp")["spec"]
    (port,) = server["ports"]
    assert (service["ports"][0]["targetPort"], service["ports"][0]["port"]) == (port["name"], port["containerPort"])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["httpGet"]["port"] == port["name"]
    (endpoint,) = named("ServiceMonitor", "qsharp")["spec"]["endpoints"]
    assert endpoint["port"] == service["ports"][0]["name"]
    assert named("NetworkPolicy", "qsharp-trainer")["spec"]["egress"][0]["ports"][0]["port"] == port["name"]
    (url,) = [entry["value"] for entry in container(TRAINER)["env"] if entry["name"] == "QSHARP_URL"]
    assert url == f"http://qsharp:{service['ports'][0]['port']}"


def test_volumes_are_claimed_and_mounted_as_in_compose() -> None:
    claims = {one["metadata"]["name"]: one["spec"] for one in documents() if one["kind"] == "PersistentVolumeClaim"}
    used = set()
    for name, deployment in (("server", SERVER), ("trainer", TRAINER)):
        mounts = {mount["name"]: mount for mount in container(deployment)["volumeMounts"]}
        assert mounts.keys() == volumes(deployment).keys()
        paths = {mount["mountPath"]: mount.get("readOnly", False) for mount in mounts.values()}
        for volume in load("compose.yaml")["services"][name]["volumes"]:
            source, path, *mode = volume.split(":")
            assert paths[path] == (mode == ["ro"] or source == "keys")
        used |= {
            v["persistentVolumeClaim"]["claimName"]
            for v in volumes(deployment).values()
            if "persistentVolumeClaim" in v
        }
        for memory in ("tmp", "shm"):
            assert volumes(deployment)[memory]["emptyDir"].keys() == {"medium", "sizeLimit"}
    assert used == claims.keys()
    shared = {name for name, claim in claims.items() if claim["accessModes"] == ["ReadWriteMany"]}
    assert shared == {"qsharp-critics", "qsharp-cache"}
    assert TRAINER["replicas"] == 1
    assert TRAINER["strategy"] == {"type": "Recreate"}


def test_secrets_are_those_of_compose() -> None:
    for name, deployment in (("server", SERVER), ("trainer", TRAINER)):
        secret = volumes(deployment)["secrets"]["secret"]
        assert {item["key"] for item in secret["items"]} == SECRET_FILES[name]
        assert all(item["key"] == item["path"] for item in secret["items"])
        assert secret["secretName"] == "qsharp"
    credentials = named("ServiceMonitor", "qsharp")["spec"]["endpoints"][0]["authorization"]["credentials"]
    assert credentials == {"name": "qsharp", "key": "vllm_api_key"}
    assert {one["kind"] for one in documents()} & {"Secret", "ConfigMap"} == set()
    guide = (ROOT / "docs" / "kubernetes.md").read_text()
    for secret in ("qsharp", "qsharp-keys"):
        assert f"create secret generic {secret} " in guide


def test_pods_are_closed() -> None:
    for deployment in (SERVER, TRAINER):
        spec, one = pod(deployment), container(deployment)
        assert spec["automountServiceAccountToken"] is spec["enableServiceLinks"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == spec["securityContext"]["fsGroup"] == 10001
        assert f"useradd --uid {spec['securityContext']['runAsUser']} " in (ROOT / "docker" / "Dockerfile").read_text()
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert one["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        assert "memory" in one["resources"]["limits"]


def test_the_server_takes_its_flags_and_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    make_secrets.make(tmp_path)
    monkeypatch.setenv("QSHARP_SECRETS_DIR", str(tmp_path))
    name, *flags = container(SERVER)["args"]
    args = serve.parse(["model", *flags])
    assert (name, args.host, args.port) == ("serve", "0.0.0.0", 8000)
    sleep = container(SERVER)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert sleep + args.shutdown_timeout + 15 <= pod(SERVER)["terminationGracePeriodSeconds"]
    compose = serve.parse(["model", *filled_in(load("compose.yaml")["services"]["server"]["command"]).split()[1:]])
    assert args.shutdown_timeout == compose.shutdown_timeout
    assert args.qsharp_critic_root == compose.qsharp_critic_root
    # A start may take as long as in compose, and a worker that hangs is noticed as there.
    probe = container(SERVER)["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 600
    assert container(SERVER)["readinessProbe"]["httpGet"]["path"] == "/health"
    assert container(SERVER)["livenessProbe"]["httpGet"]["path"] == "/liveness"
    assert container(SERVER)["livenessProbe"]["timeoutSeconds"] > 10


def test_the_trainer_is_that_of_compose() -> None:
    def parsed(words: list[str]) -> tuple[Any, Any]:
        ours, training = loop._split(words[1:])
        return loop._parser().parse_args(ours), loop._training_parser("name").parse_args(training)

    compose = load("compose.yaml")["services"]["trainer"]
    assert parsed(container(TRAINER)["args"]) == parsed(filled_in(compose["command"]).split())
    given = {entry["name"]: entry["value"] for entry in container(TRAINER)["env"]}
    assert given.keys() == compose["environment"].keys()


def test_alerts_are_those_of_compose() -> None:
    assert prometheus_rule.TARGET.read_text() == prometheus_rule.made(), "make kubernetes-rules"
    groups = named("PrometheusRule", "qsharp")["spec"]["groups"]
    assert [rule for group in groups for rule in group["rules"]] == rules()
    (endpoint,) = named("ServiceMonitor", "qsharp")["spec"]["endpoints"]
    (job, *_) = load("prometheus/prometheus.yml")["scrape_configs"]
    assert endpoint["relabelings"] == [{"targetLabel": "job", "replacement": job["job_name"]}]


def test_the_autoscaler_asks_for_what_the_adapter_has() -> None:
    (metric,) = named("HorizontalPodAutoscaler", "qsharp-server")["spec"]["metrics"]
    (rule,) = yaml.safe_load((KUBERNETES / "monitoring" / "adapter.yaml").read_text())["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    series = rule["seriesQuery"].partition("{")[0]
    dashboards = json.loads((ROOT / "docker" / "grafana" / "dashboards" / "traffic.json").read_text())
    assert series in json.dumps(dashboards)  # whose metrics test_http_check.py finds on a running server
