"""Reads what `dflash-ext adapt` has written as a model that the canvas loop decodes with."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from .adaptation import CONFIG, Adaptation, load_adaptation
from .denoiser import Denoiser
from .lora import LoraAdapter
from .target import Target
from .uniform import UniformAdaptation


def is_denoiser(folder: str | os.PathLike) -> bool:
    """Whether a folder says that it holds a denoiser. One with a mask token holds a LoRA drafter, too."""
    return (Path(folder) / CONFIG).is_file()


def load_denoiser(model: PreTrainedModel, folder: str | os.PathLike) -> Denoiser:
    """The denoiser in `folder`, whose base is `model`.

    Raises:
        ValueError: as `load_adaptation`.
    """
    return denoiser_of(load_adaptation(folder, Target(model)))


def denoiser_of(adaptation: Adaptation) -> Denoiser:
    """An adaptation as the canvas loop takes it: merged into a copy of the base, which keeps its own weights."""
    target, config = adaptation.target, adaptation.config
    own = {"mask_id": config.mask_id}
    if isinstance(adaptation, UniformAdaptation):
        own["self_conditioning"] = copy.deepcopy(adaptation.self_conditioning).to(target.dtype).requires_grad_(False)
    else:
        own["mask_embedding"] = adaptation.mask_embedding.detach().to(target.dtype)
    return Denoiser(
        Target(_merged(target.model, adaptation.adapter)),
        **own,
        attention="causal" if config.pattern == "causal" else "bidirectional",
        prefix=config.context,
    )


def _merged(model: PreTrainedModel, adapter: LoraAdapter) -> PreTrainedModel:
    """A copy of a model with an adapter's products added to its weights. What is not adapted is shared, not copied."""
    adapted = {f"{path}.weight" for path in adapter.paths}
    shared = {id(tensor): tensor for name, tensor in model.named_parameters() if name not in adapted}
    shared |= {id(tensor): tensor for tensor in model.buffers()}
    merged = copy.deepcopy(model, shared)
    for path in adapter.paths:
        linear = merged.get_submodule(path)
        a, b = (half.detach().to(linear.weight.device, torch.float32) for half in adapter.halves(path))
        weight = linear.weight.float() + adapter.scale * (b @ a)
        linear.weight = nn.Parameter(weight.to(linear.weight.dtype), requires_grad=False)
    return merged
