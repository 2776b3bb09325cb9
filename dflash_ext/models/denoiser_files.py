"""Reads what `dflash-ext adapt` has written as a model that the canvas loop decodes with."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from .adaptation import CONFIG, Adaptation, load_adaptation
from .denoiser import Denoiser
from .target import Target


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
    return Denoiser(
        Target(_with(target.model, adaptation.adapter.merged(target.model))),
        mask_id=config.mask_id,
        **adaptation.of_denoiser(),
        attention="causal" if config.pattern == "causal" else "bidirectional",
        prefix=config.context,
        encoder=target if config.kind == "gated" else None,
    )


def _with(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """A copy of a model with these weights, by path. It shares all others with the model."""
    known = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for path, weight in weights.items():
        known[id(model.get_parameter(path))] = nn.Parameter(weight, requires_grad=False)
    return copy.deepcopy(model, known)
