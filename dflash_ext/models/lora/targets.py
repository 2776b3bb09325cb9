"""Which linear layers of a language model a LoRA adapter acts on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..target import Target

# The names that models of transformers give to the linear layers of a decoder layer.
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj", "query_key_value", "dense")
_MLP = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h")
PRESETS = {"all": _ATTENTION + _MLP, "attention": _ATTENTION, "mlp": _MLP}


def linear_paths(target: Target, targets: str | Sequence[str] = "all") -> list[str]:
    """The full paths in `target.model` of the linear layers that an adapter acts on, in the order of the layers.

    They are in the layers of the language model alone, so that the towers of other modalities, the head and the router
    of a mixture of experts have none.

    Args:
        targets: one of `PRESETS` ("all" is attention and MLP), or names of linear layers such as ["o_proj"].

    Raises:
        ValueError: the model has no linear layer of one of the given names, or of none in the preset.
    """
    names = PRESETS.get(targets, (targets,)) if isinstance(targets, str) else tuple(targets)
    inside = {id(module) for layer in target.layers for module in layer.modules() if isinstance(module, nn.Linear)}
    linears = [path for path, module in target.model.named_modules() if id(module) in inside]
    paths = [path for path in linears if path.rpartition(".")[2] in names]
    found = {path.rpartition(".")[2] for path in paths}
    missing = [] if isinstance(targets, str) and targets in PRESETS else [name for name in names if name not in found]
    if missing or not paths:
        there = sorted({path.rpartition(".")[2] for path in linears})
        raise ValueError(
            f"{type(target.model).__name__} has no linear layer {', '.join(missing or names)} to adapt: its layers "
            f"have {', '.join(there) or 'none'}; {', '.join(PRESETS)} are presets"
        )
    return paths
