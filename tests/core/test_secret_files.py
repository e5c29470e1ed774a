import warnings
from pathlib import Path

import pytest

from qsharp_core import secret_files
from qsharp_core.errors import ConfigError
from qsharp_core.secret_files import secret
from server.access.install import key_ring
from server.access.keys import KeyRing
from server.access.principal import Principal
from server.commands import critics, serve
from server.settings import Settings
from trainer.commands import loop, options

NAMES = ("VLLM_API_KEY", "QSHARP_ADMIN_KEY", "QSHARP_ROLLOUTS", "QSHARP_SECRETS_DIR")


def started(*flags: str) -> tuple[Settings, KeyRing]:
    """What a server makes of them."""
    args = serve.parse(["model", *flags])
    settings = Settings.of(args)
    return settings, key_ring(args, settings)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Secret files as a container has them."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("QSHARP_SECRETS_DIR", str(tmp_path))
    (tmp_path / "vllm_api_key").write_text("user\n")
    (tmp_path / "qsharp_admin_key").write_text("admin")
    (tmp_path / "qsharp_rollouts").write_text("postgresql://qsharp:password@postgres/qsharp")
    return tmp_path


def test_the_server_reads_its_secrets(folder: Path) -> None:
    settings, ring = started()
    assert ring.find("user") == Principal("default")
    assert ring.find("admin") == Principal("admin", admin=True)
    assert settings.admin_key is not None
    assert settings.admin_key.get_secret_value() == "admin"
    assert settings.rollouts is not None
    assert settings.rollouts.get_secret_value() == "postgresql://qsharp:password@postgres/qsharp"
    (folder / "qsharp_admin_key").unlink()
    assert not started()[1].has_admin
    (folder / "vllm_api_key").unlink()
    assert not started()[1].guards_users


def test_other_commands_read_theirs(folder: Path) -> None:
    args = loop._parser().parse_args(["--run", "run"])
    assert (args.api_key, args.admin_key) == ("user", "admin")
    assert critics._parser().parse_args([]).admin_key == "admin"
    parser = options.parser("collect", None)
    options.add_server_arguments(parser)
    assert parser.parse_args([]).api_key == "user"
    assert parser.parse_args(["--api-key", "given"]).api_key == "given"


@pytest.mark.usefixtures("folder")
def test_the_environment_wins_over_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "other")
    monkeypatch.setenv("QSHARP_ADMIN_KEY", "another")
    _, ring = started()
    assert [key for key in ("user", "admin", "other", "another") if ring.find(key)] == ["other", "another"]
    monkeypatch.setenv("VLLM_API_KEY", "other")
    _, ring = started("--admin-key", "given")
    assert [key for key in ("admin", "another", "given", "other") if ring.find(key)] == ["given", "other"]


def test_what_is_empty_is_not_set(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_text("\n")
    settings, ring = started()
    assert not ring.guards_users
    assert not ring.has_admin
    assert ring.find("") is None
    assert settings.rollouts is None


def test_a_mounted_folder_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QSHARP_SECRETS_DIR")
    monkeypatch.setattr(secret_files, "MOUNTED", folder)
    assert secret("VLLM_API_KEY") == "user"
    monkeypatch.setattr(secret_files, "MOUNTED", folder / "nowhere")
    assert secret("VLLM_API_KEY") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Settings.of(serve.parse(["model"])).admin_key is None


def test_what_cannot_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "vllm_api_key").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="vllm_api_key cannot be read"):
        secret("VLLM_API_KEY")
    monkeypatch.setenv("QSHARP_SECRETS_DIR", str(folder / "nowhere"))
    with pytest.raises(ConfigError, match="QSHARP_SECRETS_DIR is no folder"):
        secret("VLLM_API_KEY")
