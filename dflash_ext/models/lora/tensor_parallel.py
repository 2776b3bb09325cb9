"""Tensor parallelism: the ranks of a run share every layer of a base, and with it the halves of an adapter.

A linear layer is divided by its outputs ("colwise") or by its inputs ("rowwise"), as transformers' plan for the model
says (Megatron-LM, arXiv 1909.08053). Of the adapter's halves, the one on the divided side is divided, too. The other is
whole on every rank. So an update needs no message of its own in the forward: its sum over ranks is that of the layer's
outputs.
"""

from __future__ import annotations

import re

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ..target import Target
from .drafter import LoraDrafter
from .split import summed, with_summed_gradient


def share_layers(drafter: LoraDrafter, target: Target, mesh: DeviceMesh) -> None:
    """Leaves every rank its part of the linear layers of a frozen base and of the drafter's adapter.

    Every rank calls this with the same weights. The drafter's parameters become DTensors, which optimizers and the
    clipping of gradients understand. The embedding and the head stay whole.

    Args:
        mesh: of one dimension, over all ranks.

    Raises:
        ValueError: there is no plan for the model, its plan divides a layer in another way, or the ranks cannot have
            equal parts.
    """
    styles = linear_styles(target, mesh.size())
    _ = target.fused_forwards  # found while the layers are whole
    rank, group = mesh.get_local_rank(), mesh.get_group()
    for path, style in styles.items():
        _divide(target.model.get_submodule(path), style, rank, group)
    target.ranks = mesh.size()
    adapter = drafter.adapter
    for index, path in enumerate(adapter.paths):
        style = styles.get(path)
        for halves, side, dim in ((adapter.lora_a, "rowwise", 1), (adapter.lora_b, "colwise", 0)):
            halves[index] = _distributed(halves[index], mesh, dim if style == side else None)
    drafter.mask_embedding = _distributed(drafter.mask_embedding, mesh)
    for linear in (drafter.sampler.inner, drafter.sampler.outer) if drafter.sampler is not None else ():
        linear.weight = _distributed(linear.weight, mesh)


def linear_styles(target: Target, ranks: int) -> dict[str, str]:
    """How the linear layers that are divided are divided, "colwise" or "rowwise", by their full paths in the model."""
    name, plan = type(target.model).__name__, getattr(target.config, "base_model_tp_plan", None)
    if not plan:
        raise ValueError(f"{name} cannot be divided: transformers has no plan of tensor parallelism for it")
    heads = target.config.num_attention_heads, target.config.num_key_value_heads
    if any(count % ranks for count in heads):
        raise ValueError(f"{name} cannot be divided among {ranks} ranks: it has {heads[0]} heads, {heads[1]} of keys")
    paths = {module: path for path, module in target.model.named_modules()}
    styles = {}
    for module in (module for layer in target.layers for module in layer.modules()):
        inside = paths[module].removeprefix(f"{paths[target.decoder]}.")
        style = plan.get(re.sub(r"\.\d+\.", ".*.", inside))
        if style is None or style.startswith("replicated"):  # the gradients of a frozen norm do not matter
            continue
        if style not in ("colwise", "rowwise") or type(module) is not nn.Linear:
            raise ValueError(f"{name} cannot be divided: its plan has '{style}' for {inside}")
        if (module.out_features if style == "colwise" else module.in_features) % ranks:
            raise ValueError(f"{name} cannot be divided among {ranks} ranks: {inside} has no equal parts")
        styles[paths[module]] = style
    return styles


def _divide(linear: nn.Linear, style: str, rank: int, group: ProcessGroup) -> None:
    by_outputs = style == "colwise"
    linear.weight = _part(linear.weight, 0 if by_outputs else 1, rank, group)
    linear.out_features, linear.in_features = linear.weight.shape
    if by_outputs:
        if linear.bias is not None:
            linear.bias = _part(linear.bias, 0, rank, group)
        linear.register_forward_pre_hook(lambda _, given: (with_summed_gradient(given[0], group), *given[1:]))
    else:
        if rank:
            linear.bias = None  # the sum of the outputs has it once
        linear.register_forward_hook(lambda _, given, output: summed(output, group))


def _part(whole: Tensor, dim: int, rank: int, group: ProcessGroup) -> nn.Parameter:
    part = whole.detach().chunk(dist.get_world_size(group), dim)[rank]
    return nn.Parameter(part.clone(memory_format=torch.contiguous_format), requires_grad=False)


def _distributed(parameter: Tensor, mesh: DeviceMesh, dim: int | None = None) -> nn.Parameter:
    placement = Replicate() if dim is None else Shard(dim)
    made: DTensor = distribute_tensor(parameter.detach(), mesh, [placement])
    return nn.Parameter(made)
