"""Critics' folders from anybody: each is refused by file and field, at once, and without taking memory."""

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from qsharp_core.critic import checkpoint, native_checkpoint
from qsharp_core.errors import CriticError
from tests.support import bad_critics, models
from tests.support.bad_critics import CARD, CONFIG, Fault


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference and a good critic of each kind."""
    root = tmp_path_factory.mktemp("hostile")
    models.write_reference(root / "reference")
    models.write_critic(root / "separate", mlp=8)
    models.write_native_critic(root / "native", root / "reference", width=8)
    return root


@pytest.fixture
def separate(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root / "separate", tmp_path / "separate"))


@pytest.fixture
def native(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root / "native", tmp_path / "native"))


def test_there_are_many_kinds() -> None:
    for faults in (bad_critics.SEPARATE, bad_critics.NATIVE):
        assert len({fault.name for fault in faults}) == len(faults) > 100


@pytest.mark.parametrize("fault", bad_critics.SEPARATE, ids=lambda fault: fault.name)
def test_a_separate_critic(separate: Path, fault: Fault) -> None:
    checkpoint.load(separate)
    fault.spoil(separate)
    began = time.monotonic()
    with pytest.raises(CriticError, match=fault.says) as raised:
        checkpoint.load(separate)
    assert time.monotonic() - began < 10
    assert len(str(raised.value)) < 2000


@pytest.mark.parametrize("fault", bad_critics.NATIVE, ids=lambda fault: fault.name)
def test_a_native_critic(root: Path, native: Path, fault: Fault) -> None:
    fault.spoil(native)
    with pytest.raises(CriticError, match=fault.says) as raised:
        native_checkpoint.load(native, root / "reference")
    assert len(str(raised.value)) < 2000


def test_an_index_of_several_files_is_read(separate: Path) -> None:
    _, whole = checkpoint.load(separate)
    bad_critics.sharded(lambda index: None)(separate)
    _, sharded = checkpoint.load(separate)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(whole.parameters(), sharded.parameters(), strict=True))


def test_a_link_within_the_folder_is_read(separate: Path) -> None:
    (separate / "head.safetensors").rename(separate / "blob")
    (separate / "head.safetensors").symlink_to("blob")
    checkpoint.load(separate)


def test_a_folder_that_is_too_large(root: Path, separate: Path, native: Path) -> None:
    with pytest.raises(CriticError, match="GiB, and a critic may have"):
        checkpoint.load(separate, max_bytes=100_000)
    files = checkpoint.read(native)
    with pytest.raises(CriticError, match="table of tokens"):
        native_checkpoint.build(files, root / "reference", max_bytes=models.VOCAB * 8 * 4 - 1)
    native_checkpoint.build(files, root / "reference", max_bytes=models.VOCAB * 8 * 4)


def test_what_was_loaded_does_not_change_with_its_files(separate: Path) -> None:
    _, critic = checkpoint.load(separate)
    before = [parameter.clone() for parameter in critic.parameters()]
    for path in separate.rglob("*.safetensors"):
        with path.open("r+b") as file:  # in place: the same file on the disk
            content = file.read()
            file.seek(len(content) // 2)
            file.write(bytes(len(content) // 2))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(critic.parameters(), before, strict=True))


def test_values_that_bfloat16_does_not_have(separate: Path) -> None:
    most = torch.finfo(torch.float32).max
    bad_critics.tensors("head.safetensors", bad_critics.first_value("weight", most))(separate)
    checkpoint.read(separate, torch.float32)
    with pytest.raises(CriticError, match="'weight' is not finite in bfloat16"):
        checkpoint.read(separate, torch.bfloat16)


# Peak memory is a process's own. Its arguments: the reference's folder, good folders, bad folders.
GROWTH = """
import resource
import sys
from pathlib import Path

from qsharp_core.critic import checkpoint, native_checkpoint
from qsharp_core.errors import CriticError

reference, *folders = map(Path, sys.argv[1:])
for folder in folders:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        if checkpoint.read_card(folder).backbone == "reference":
            native_checkpoint.load(folder, reference)
        else:
            checkpoint.load(folder)
        said = "loaded"
    except CriticError as error:
        said = str(error)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(grown // 1024, said.replace("\\n", " "))
"""
GREEDY = {
    "1.6 GB of feed-forward": ("separate", bad_critics.changed(CONFIG, intermediate_size=2**20, num_hidden_layers=2)),
    "1,000 layers": ("separate", bad_critics.changed(CONFIG, num_hidden_layers=1000)),
    "a vocabulary of a million": ("separate", bad_critics.changed(CONFIG, vocab_size=2**20)),
    "2**32 positions": ("separate", bad_critics.changed(CONFIG, max_position_embeddings=2**32)),
    "a billion labels": ("separate", bad_critics.changed(CONFIG, num_labels=10**9)),
    "a billion layer types": ("separate", bad_critics.changed(CONFIG, num_hidden_layers=10**9)),
    "an MLP of a million": ("separate", bad_critics.changed(CARD, mlp={"width": 2**20})),
    "a native MLP of a million": ("native", bad_critics.changed(CARD, mlp={"width": 2**20})),
    "nested a million deep": ("separate", bad_critics.written(CONFIG, b"[" * 10**6)),
}


def test_what_asks_for_memory_gets_none(root: Path, tmp_path: Path) -> None:
    folders = [root / "separate", root / "native"]
    for number, (kind, spoil) in enumerate(GREEDY.values()):
        folders.append(Path(shutil.copytree(root / kind, tmp_path / str(number))))
        spoil(folders[-1])
    told = subprocess.run(
        [sys.executable, "-c", GROWTH, str(root / "reference"), *map(str, folders)],
        capture_output=True, text=True, check=True, timeout=120,
    ).stdout.splitlines()  # fmt: skip
    assert len(told) == len(folders)
    assert [line.partition(" ")[2] for line in told[:2]] == ["loaded"] * 2
    for name, folder, line in zip(GREEDY, folders[2:], told[2:], strict=True):
        megabytes, _, message = line.partition(" ")
        assert int(megabytes) < 64, (name, line)
        harmless = ("2**32 positions", "a billion labels")  # rotations are not tabled, and a backbone has no labels
        assert ("loaded" if name in harmless else str(folder)) in message


# -- nothing outside of the folder is asked


REACHING_OUT: dict[str, dict[str, object]] = {
    "kernel of a hub": {"_attn_implementation": "org/kernel"},
    "kernel by the public field": {"attn_implementation": "org/kernel"},
    "kernel of FlashAttention": {"_attn_implementation": "flash_attention_3"},
    "kernel in a part": {"vision_config": {"_attn_implementation": "org/kernel"}},
    "kernel by the private field": {"_attn_implementation_internal": "org/kernel"},
    "experts": {"_experts_implementation": "org/kernel", "experts_implementation": "org/kernel"},
    "code": {"auto_map": {"AutoModel": "org/repo--modeling.Model", "AutoConfig": "org/repo--configuration.Config"}},
    "code that is trusted": {"auto_map": {"AutoModel": "modeling.Model"}, "trust_remote_code": True},
    "weights": {"transformers_weights": "https://example.org/model.safetensors"},
    "another model": {"_name_or_path": "org/repo", "name_or_path": "org/repo", "base_model_name_or_path": "org/repo"},
    "fusion": {"fusion_config": {"patches": ["org/kernel"]}, "kernel_config": {"RMSNorm": "org/kernel"}},
    "a backbone": {"backbone": "org/repo", "use_pretrained_backbone": True, "use_timm_backbone": True},
    "layers of their own": {"per_layer_config": {"0": {"_attn_implementation": "org/kernel"}}},
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of the network, of a hub or of a loader of kernels, all of which fail."""
    from transformers import modeling_utils

    told: list[str] = []

    def refuse(name: str) -> object:
        def call(*args: object, **_: object) -> None:
            told.append(f"{name}{args}")
            raise OSError("no network")

        return call

    monkeypatch.setattr(socket.socket, "connect", refuse("connect"))
    monkeypatch.setattr(socket, "getaddrinfo", refuse("getaddrinfo"))
    for place in ("huggingface_hub.file_download.hf_hub_download", "huggingface_hub.HfApi.model_info"):
        monkeypatch.setattr(place, refuse(place))
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", refuse("kernel"))  # any kernel for attention
    monkeypatch.setattr("transformers.integrations.hub_kernels.get_kernel", refuse("kernel"))
    return told


@pytest.mark.parametrize("name", REACHING_OUT)
def test_nothing_outside_is_asked(separate: Path, asked: list[str], name: str) -> None:
    ids = torch.arange(12)[None]
    _, good = checkpoint.load(separate)
    bad_critics.changed(CONFIG, **REACHING_OUT[name])(separate)
    (separate / "backbone" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/repo"}')
    _, critic = checkpoint.load(separate)
    assert critic.backbone.config._attn_implementation == "sdpa"
    assert torch.equal(critic(ids), good(ids))
    assert asked == []


def test_a_tokenizer_is_read_and_runs_nothing(separate: Path, asked: list[str]) -> None:
    tokenizer = models.tokenizer()
    tokenizer.save_pretrained(separate / "backbone")
    card, critic = checkpoint.load(separate)
    settings = separate / "backbone" / "tokenizer_config.json"
    settings.write_text('{"auto_map": {"AutoTokenizer": ["org/repo--x.T", null]}, "tokenizer_class": "T"}')
    checkpoint.check_vocabulary(card, separate, critic, tokenizer)
    for content in (b"", b"[]", b'{"model": {"type": "BPE"}}', b"\xff", b"[" * bad_critics.DEEP):
        (separate / "backbone" / "tokenizer.json").write_bytes(content)
        with pytest.raises(CriticError, match=r"tokenizer\.json is no tokenizer"):
            checkpoint.check_vocabulary(card, separate, critic, tokenizer)
    (separate / "backbone" / "tokenizer.json").unlink()
    with pytest.raises(CriticError, match=r"tokenizer\.json cannot be read"):
        checkpoint.check_vocabulary(card, separate, critic, tokenizer)
    assert asked == []
