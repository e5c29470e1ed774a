"""The driver half of the stub backend: one CPU device, one stream, both numbered 0."""

# mypy: disable-error-code="import-untyped, misc"

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import Benchmarker, DriverBase


class CpuDriver(DriverBase):
    """Active only where Triton interprets kernels."""

    @classmethod
    def is_active(cls) -> bool:
        return bool(knobs.runtime.interpret)

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("run with TRITON_INTERPRET=1")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 0)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Benchmarker:
        raise NotImplementedError("run with TRITON_INTERPRET=1")
