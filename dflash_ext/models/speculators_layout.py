"""Converts the config of vllm-project/speculators' DFlash checkpoints to the published layout."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

# The keys that this layout has under other names or not at all. All other keys are passed on.
_OWN_KEYS = {
    "architectures",
    "aux_hidden_state_layer_ids",
    "block_size",
    "draft_vocab_size",
    "mask_token_id",
    "sliding_window_non_causal",
    "speculators_config",
    "speculators_model_type",
    "speculators_version",
    "transformer_layer_config",
}


def published_layout(config: dict[str, Any]) -> dict[str, Any]:
    """Converts speculators' `config.json` to the published layout.

    The keys of the layers are in `transformer_layer_config`. `aux_hidden_state_layer_ids` counts the embedding as layer
    0, so a tap is one less. Full layers are bidirectional in the block. Sliding layers are causal unless
    `sliding_window_non_causal` is set, and all slots of a block share the anchor's window.

    Raises:
        ValueError: the checkpoint is another kind of speculator, or has no taps.
    """
    kind = config["speculators_model_type"]
    if kind != "dflash":
        raise ValueError(f"speculators_model_type is {kind!r}: 'dflash' is supported")
    layers = dict(config["transformer_layer_config"])
    layers = AutoConfig.for_model(layers.pop("model_type", "qwen3"), **layers).to_dict()
    del layers["model_type"]
    rope = layers.get("rope_parameters") or {}
    layers["rope_parameters"] = rope.get("sliding_attention", rope)  # speculators' choice where kinds of layer differ
    layers["use_sliding_window"] = layers.get("sliding_window") is not None
    taps = config.get("aux_hidden_state_layer_ids")
    if not taps or min(taps) < 1:
        raise ValueError(f"aux_hidden_state_layer_ids is {taps!r}: layer numbers from 1 on are needed")
    dflash = {
        "mask_token_id": config.get("mask_token_id"),
        "target_layer_ids": [layer - 1 for layer in taps],
    }
    return {
        **layers,
        **{key: value for key, value in config.items() if key not in _OWN_KEYS},
        "block_size": config.get("block_size", 8),
        "is_causal": False if config.get("sliding_window_non_causal") else None,
        "window_convention": "speculators",
        "dflash_config": dflash,
    }
