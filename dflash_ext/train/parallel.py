"""Modules that FSDP2 has sharded over the ranks of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from ..models import DFlashDrafter, LoraDrafter, Target

Drafter = DFlashDrafter | LoraDrafter


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 shards the module or a part of it, be its parameters gathered at the moment or not."""
    is_unit = any(isinstance(each, FSDPModule) for each in module.modules())
    return is_unit or any(isinstance(parameter, DTensor) for parameter in module.parameters())


def asks_for_fsdp(trainer_args: Mapping[str, Any]) -> bool:
    """Whether these arguments of Trainer, or `accelerate launch`, ask to shard what is trained."""
    return bool(trainer_args.get("fsdp")) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def shard_layers(target: Target) -> None:
    """Shards the frozen layers of a target over all ranks (FSDP2). A layer is gathered while it runs."""
    _ = target.fused_forwards  # found while the layers are whole
    mesh = init_device_mesh(target.device.type, (dist.get_world_size(),))
    for layer in target.layers:
        fully_shard(layer, mesh=mesh)


def whole_copy(drafter: Drafter, dtype: torch.dtype | None = None) -> Drafter:
    """A copy of a drafter with whole tensors, in evaluation mode, to decode with or to save.

    Every rank must call this if the drafter is sharded, and every rank gets the copy.

    Args:
        dtype: that of the copy, the drafter's own by default.
    """
    tensors = {name: _whole(tensor) for name, tensor in drafter.state_dict().items()}
    with torch.random.fork_rng(devices=[]):
        copy = drafter.new_like() if isinstance(drafter, LoraDrafter) else DFlashDrafter(drafter.config)
    copy.load_state_dict(tensors)
    return copy.to(next(iter(tensors.values())).device, dtype or drafter.dtype).eval()


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
