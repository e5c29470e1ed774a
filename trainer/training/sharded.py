"""Training whose weights, gradients and moments are divided among the processes: FSDP2, PyTorch's `fully_shard`.

It is asked for as users of Accelerate do, by `accelerate launch --use_fsdp --fsdp_version 2`. Accelerate itself shards
on GPUs alone, and its way of preparing a model wants the optimizer first; so only the wish is taken from it.

A sharded parameter is a DTensor. What is written, a checkpoint or a critic, has whole ones.
"""

import os

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer.training.settings import TrainingError

ASKED, VERSION = "ACCELERATE_USE_FSDP", "FSDP_VERSION"
"""The variables by which `accelerate launch` tells its processes."""
EMPTY = "FSDP_CPU_RAM_EFFICIENT_LOADING"
"""The variable by which Transformers loads weights in one process of a machine alone; here each one needs them."""


def is_asked_for(accelerator: Accelerator) -> bool:
    """Whether the launcher wants the critic sharded; with a single process there is nothing to divide.

    To be asked before weights are loaded.

    Raises:
        TrainingError: it wants it in a way that is not supported.
    """
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        kind = accelerator.distributed_type.value
        raise TrainingError(f"{kind} is not supported: shard by `accelerate launch --use_fsdp --fsdp_version 2`")
    if not parse_flag_from_env(ASKED):
        return False
    os.environ[EMPTY] = "false"
    if (version := os.environ.get(VERSION, "1")) != "2":
        raise TrainingError(f"FSDP's version {version} is not supported: add --fsdp_version 2 to the launcher")
    return accelerator.num_processes > 1


def shard(model: nn.Module, layers: list[nn.Module], accelerator: Accelerator) -> None:
    """Divides a model's parameters among all processes, where it is.

    Args:
        model: the same in all processes. Afterwards all of them have to call it equally often.
        layers: parts of it that are gathered one at a time while it runs.
        accelerator: has the processes.
    """
    device = accelerator.device.type
    mesh = init_device_mesh(device, (accelerator.num_processes,))
    for module in (*layers, model):
        # The outermost, too: else its parameters would stay whole after a pass without a backward one.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        assert isinstance(module, FSDPModule)
        if device == "cpu":
            module.set_force_sum_reduction_for_comms(True)  # Gloo has no means


def is_sharded(model: nn.Module) -> bool:
    """Whether a model was sharded."""
    return isinstance(model, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded as a whole one. All processes have to call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which all processes have, on the device of another one and divided as that one is."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def any_process(accelerator: Accelerator, here: bool) -> bool:
    """Whether something is so in one of the processes at least. All have to call this together."""
    if accelerator.num_processes == 1:
        return here
    return bool(accelerator.reduce(torch.tensor(float(here), device=accelerator.device), "sum") > 0)
