"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..loading import first_line
from ..target import Target
from .adapter import LoraAdapter

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
# The settings of PEFT's LoraConfig that are read here, and those that decide nothing once the adapter is trained.
_READ = {"peft_type", "r", "lora_alpha", "use_rslora"}
_WITHOUT_EFFECT = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "target_modules",  # the names of the tensors say which linear layers there are
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "lora_dropout",
    "init_lora_weights",
    "megatron_core",
    "runtime_config",
}


def save_adapter(
    adapter: LoraAdapter, folder: str | os.PathLike, *, base_name: str | None = None, dtype: torch.dtype | None = None
) -> None:
    """Writes an adapter as PEFT does.

    Args:
        base_name: the base model's folder or name on the hub, for PEFT's users.
        dtype: that of the tensors, the adapter's own by default.
    """
    from peft import LoraConfig

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    alpha = int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=alpha,
        target_modules=list(adapter.paths),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        inference_mode=True,
    )
    config.save_pretrained(folder)
    tensors = {}
    for path in adapter.paths:
        for name, half in zip("AB", adapter.halves(path), strict=True):
            tensors[f"{_PREFIX}{path}.lora_{name}.weight"] = half.detach().to("cpu", dtype or half.dtype).contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def load_adapter(folder: str | os.PathLike, target: Target) -> LoraAdapter:
    """Reads an adapter of PEFT in its own dtype, on the CPU.

    Raises:
        ValueError: there is no LoRA adapter, it needs something of PEFT that is not supported, its tensors do not fit
            its rank, or they do not fit the target's linear layers.
    """
    folder = Path(folder)
    rank, alpha = _rank_and_alpha(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except Exception as error:  # safetensors raises many kinds
        raise ValueError(f"cannot read the adapter in '{folder}': {first_line(error)}") from error
    halves = {"A": {}, "B": {}}
    for name, tensor in tensors.items():
        path, _, half = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".lora_")
        if half not in halves or not name.startswith(_PREFIX):
            raise ValueError(f"the adapter in '{folder}' holds {name}: only LoRA's A and B of linear layers are read")
        halves[half][path] = tensor
    a, b = halves["A"], halves["B"]
    if one := sorted(a.keys() ^ b.keys()):
        raise ValueError(f"the adapter in '{folder}' has one of A and B alone for {one[0]}")
    name = type(target.model).__name__
    modules = {path: module for path, module in target.model.named_modules() if isinstance(module, nn.Linear)}
    if strange := [path for path in a if path not in modules]:
        raise ValueError(f"the adapter in '{folder}' is for another model: {name} has no linear layer {strange[0]}")
    order = [path for path in modules if path in a]
    if not order:
        raise ValueError(f"the adapter in '{folder}' has no tensors")
    for path in order:
        found = (*a[path].shape, *b[path].shape)
        needed = (rank, modules[path].in_features, modules[path].out_features, rank)
        if found != needed:
            raise ValueError(
                f"the adapter in '{folder}' does not fit: A and B of {path} are {found[:2]} and {found[2:]}; rank "
                f"{rank} and this {name} need {needed[:2]} and {needed[2:]}"
            )
    adapter = LoraAdapter({path: (len(b[path]), a[path].shape[1]) for path in order}, rank, alpha)
    adapter = adapter.to(a[order[0]].dtype)
    with torch.no_grad():
        for path in order:
            for half, tensor in zip(adapter.halves(path), (a[path], b[path]), strict=True):
                half.copy_(tensor)
    return adapter


def _rank_and_alpha(folder: Path) -> tuple[int, float]:
    from peft import LoraConfig, PeftConfig

    if not (folder / CONFIG).is_file():
        raise ValueError(f"no adapter in '{folder}': there is no {CONFIG}")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT raises many kinds
        raise ValueError(f"cannot read the adapter's config in '{folder}': {first_line(error)}") from error
    if not isinstance(config, LoraConfig):
        raise ValueError(f"the adapter in '{folder}' is of type {config.peft_type}: LORA is supported")
    plain = LoraConfig()
    for field in fields(config):
        name = field.name
        if name not in _READ | _WITHOUT_EFFECT and getattr(config, name) != getattr(plain, name):
            raise ValueError(
                f"the adapter in '{folder}' has {name}={getattr(config, name)!r} in its {CONFIG}, which is not "
                "supported"
            )
    # rsLoRA divides by the root of the rank. The pair of numbers gives the same scale here.
    alpha = config.lora_alpha * config.r**0.5 if config.use_rslora else config.lora_alpha
    return config.r, alpha
