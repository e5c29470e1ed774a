"""What `qsharp serve` makes of its command line, before an engine is started."""

import os
from pathlib import Path

import pytest
import torch

from qsharp_core import cli
from qsharp_core.critic.digest import digest
from qsharp_core.errors import ConfigError, CriticError
from qsharp_core.locations import RemoteFolder
from qsharp_core.vllm_plugin import processors
from server import launch
from server.access import keys
from server.access.install import key_ring
from server.access.principal import Principal
from server.commands import serve
from server.plugin import WORKER_EXTENSION
from server.presets.known import DEFAULT, PRESETS
from server.settings import Settings
from tests.support.models import write_critic
from tests.support.object_store import object_store


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("QSHARP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")


def test_our_flags_become_vllms(tmp_path: Path) -> None:
    critic = write_critic(tmp_path / "a")
    flags = [
        "--critic",
        str(critic),
        "--critic",
        f"b={critic}",
        "--critic-cache-gib",
        "0.5",
        "--critic-dtype",
        "float32",
    ]
    args = serve.parse(["model", *flags, "--default-eta", "0.2", "--max_candidates", "8", "--admin-key", "k"])
    assert args.model == "model"
    assert args.logits_processors == [processors.V1]
    assert args.worker_extension_cls == WORKER_EXTENSION
    assert args.additional_config == {
        "qsharp": {"critics": [str(critic), f"b={critic}"], "cache_gib": 0.5, "dtype": "float32"}
    }
    assert args.generation_config == "vllm"
    settings = Settings.of(args)
    assert (settings.default_eta, settings.max_candidates) == (0.2, 8)
    assert settings.admin_key is not None
    assert settings.admin_key.get_secret_value() == "k"


def test_vllms_own_flags_are_kept() -> None:
    args = serve.parse(
        [
            "--model",
            "model",
            "--generation-config",
            "auto",
            "--additional-config",
            '{"x": 1, "qsharp": {"dtype": "auto"}}',
        ]
    )
    assert args.model == "model"
    assert args.generation_config == "auto"
    assert args.additional_config == {"x": 1, "qsharp": {"dtype": "auto"}}


def test_flags_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSHARP_DEFAULT_ETA", "3")
    monkeypatch.setenv("QSHARP_ADMIN_KEY", "")
    assert Settings.of(serve.parse(["model"])).default_eta == 3
    assert Settings.of(serve.parse(["model"])).admin_key is None
    assert Settings.of(serve.parse(["model", "--default-eta", "1"])).default_eta == 1


def test_the_gate_takes_vllms_keys_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "c")
    args = serve.parse(["model", "--admin-key", "k"])
    assert args.api_key is None
    assert "VLLM_API_KEY" not in os.environ
    assert "'c'" not in str(vars(args))
    ring = key_ring(args, Settings.of(args))
    assert ring.find("c") == Principal("default")
    assert ring.find("k") == Principal("admin", admin=True)
    args = serve.parse(["model", "--api-key", "a", "b", "--host", "0.0.0.0"])
    ring = key_ring(args, Settings.of(args))
    assert ring.find("a") == ring.find("b") == Principal("default")
    assert ring.find("c") is None


def test_a_server_without_keys_listens_to_this_host_alone(tmp_path: Path) -> None:
    assert serve.parse(["model"]).host == "127.0.0.1"
    assert serve.parse(["model", "--admin-key", "k"]).host == "127.0.0.1"
    assert serve.parse(["model", "--host", "localhost"]).host == "localhost"
    assert serve.parse(["model", "--no-auth"]).host is None
    assert serve.parse(["model", "--no-auth", "--host", "0.0.0.0"]).host == "0.0.0.0"
    assert serve.parse(["model", "--api-key", "a"]).host is None
    keys.add(tmp_path / "keys.json", "alice")
    assert serve.parse(["model", "--keys", str(tmp_path / "keys.json"), "--host", "::"]).host == "::"


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--default-eta", "0"], "--default-eta"),
        (["--default-eta", "nan"], "--default-eta"),
        (["--max-candidates", "0"], "--max-candidates"),
        (["--critic-cache-gib", "0"], "cache_gib"),
        (["--critic-max-gib", "0"], "max_gib"),
        (["--critic-load-seconds", "nan"], "load_seconds"),
        (["--critic", "x/y=critics/1"], "--critic: NAME must be"),
        (["--api-server-count", "2"], "one HTTP server"),
        (["--nnodes", "2"], "one engine cannot be spread over hosts"),
        (["--host", "0.0.0.0"], "--no-auth"),
        (["--host", "0.0.0.0", "--admin-key", "k"], "--no-auth"),
        (["--keys", "/nowhere/keys.json"], "cannot be read"),
        (["--rate-limit", "often"], "--rate-limit"),
        (["--max-body-mib", "0"], "--max-body-mib"),
        (["--worker-extension-cls", "a.B"], "is taken"),
    ],
)
def test_what_cannot_work_is_refused_at_once(flags: list[str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        serve.parse(["model", *flags])


def test_a_mistyped_critic_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(CriticError, match="cannot be read"):
        serve.parse(["model", "--critic", str(tmp_path)])


def test_our_plugin_is_named_beside_those_that_load_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "mine")
    launch.allow_plugin()
    assert os.environ["VLLM_PLUGINS"] == "mine,qsharp"
    monkeypatch.delenv("VLLM_PLUGINS")
    launch.allow_plugin()
    assert "qsharp" in os.environ["VLLM_PLUGINS"].split(",")


def test_help_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    assert "qsharp serve" in capsys.readouterr().out
    assert cli.main(["nothing"]) == 2
    assert cli.main(["critics", "--url", "http://127.0.0.1:9", "list"]) == 1
    assert "cannot be reached" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    assert "--critic [NAME=]PATH" in capsys.readouterr().out


def test_the_embedded_model_without_its_critic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setattr("server.presets.smollm2.ensure_smollm2", lambda: tmp_path)
    args = serve.parse(["--no-critic"])
    assert args.model == str(tmp_path)
    assert "critics" not in args.additional_config["qsharp"]
    assert "Ready: requests go to port 8000" in args.qsharp_hint
    named = serve.parse([]).additional_config["qsharp"]["critics"]
    assert named == [f"{PRESETS[DEFAULT].critic}={PRESETS[DEFAULT].critic_folder}"]
    # One that is named takes its place.
    other = PRESETS["star-graph"].critic_folder
    assert serve.parse(["--critic", str(other)]).additional_config["qsharp"]["critics"] == [str(other)]


def test_star_graph_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    args = serve.parse(["star-graph", "--port", "8123"])
    preset = PRESETS["star-graph"]
    assert args.model == str(preset.model())
    assert args.additional_config["qsharp"]["critics"] == [f"star-graph={preset.critic_folder}"]
    assert args.served_model_name == ["star-graph"]
    assert ":8123/" in args.qsharp_hint
    monkeypatch.chdir(tmp_path)
    (tmp_path / "star-graph").mkdir()
    assert serve.parse(["star-graph"]).model == "star-graph"


NATIVE = processors.V2 if torch.cuda.is_available() else processors.V1


@pytest.mark.parametrize(("given", "processor"), [(None, NATIVE), ("0", processors.V1), ("1", processors.V2)])
def test_the_processor_is_that_of_the_runner(
    monkeypatch: pytest.MonkeyPatch, given: str | None, processor: str
) -> None:
    if given is None:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "")  # is put back at the end
        monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER")
    else:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", given)
    processors.settle_runner()
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == ("1" if processor == processors.V2 else "0")
    assert processors.settled() == processor


def test_a_critic_at_a_url_is_fetched_before_the_engine_starts(tmp_path: Path) -> None:
    critic = write_critic(tmp_path / "a")
    with object_store() as store:
        url = str(store.upload(critic, store.root / "sums" / "1"))
        flags = ["--critic", url, "--critic", f"b={url}", "--critic", f"c=file://{critic}"]
        root = ["--critic-root", "s3://bucket/x", "--critic-root", str(tmp_path)]
        args = serve.parse(["model", *flags, *root, "--critic-cache-folder", str(tmp_path / "cache")])
        assert Settings.of(args).critic_root == (RemoteFolder("s3", ("bucket", "x")), tmp_path)
        assert Settings.of(args).critic_cache_folder == tmp_path / "cache"
        kept = tmp_path / "cache" / digest(critic)
        assert args.additional_config["qsharp"]["critics"] == [str(kept), f"b={kept}", f"c={critic}"]
        assert args.qsharp_fetched == {str(kept): url}
        with pytest.raises(CriticError, match=r"sums/2 has no critic\.json"):
            serve.parse(["model", "--critic", url[:-1] + "2"])
        with pytest.raises(CriticError, match="--critic-max-gib"):
            serve.parse(["model", "--critic", url, "--critic-max-gib", "1e-6"])


@pytest.mark.parametrize(
    ("flag", "url", "says"),
    [
        ("--critic", "s3://bucket/../x", r"--critic: .* is no name in a URL"),
        ("--critic-root", "s3://bucket//x", r"--critic-root.*two slashes"),
        ("--critic-root", "file://x", r"--critic-root.*three slashes"),
        ("--critic", "nope://bucket/x", "fsspec knows no protocol 'nope'"),
    ],
)
def test_a_url_that_is_none(flag: str, url: str, says: str) -> None:
    with pytest.raises(ConfigError if "nope" not in url else CriticError, match=says):
        serve.parse(["model", flag, url])
