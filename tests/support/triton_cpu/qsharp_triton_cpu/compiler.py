"""The compiler half of the stub backend: says what it is, and refuses to compile."""

# mypy: disable-error-code="import-untyped, misc"

from types import ModuleType
from typing import Any

from triton.backends.compiler import BaseBackend, GPUTarget, Language


class CpuBackend(BaseBackend):
    """Accepts the target `cpu`; every way to real compilation raises `NotImplementedError`."""

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return bool(target.backend == "cpu")

    def hash(self) -> str:
        return "qsharp-interpreted-cpu"

    def parse_options(self, options: dict[str, Any]) -> object:
        raise NotImplementedError("run with TRITON_INTERPRET=1")

    def add_stages(self, stages: dict[str, Any], options: object, language: Language) -> None:
        raise NotImplementedError("run with TRITON_INTERPRET=1")

    def load_dialects(self, context: object) -> None:
        raise NotImplementedError("run with TRITON_INTERPRET=1")

    def get_module_map(self) -> dict[str, ModuleType]:
        return {}
