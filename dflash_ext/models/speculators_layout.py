"""Converts the config of vllm-project/speculators' DFlash checkpoints to the published layout, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, PreTrainedConfig, Qwen3Config

if TYPE_CHECKING:
    from .drafter_config import DFlashConfig
    from .target import Target

VERSION = "0.9.0"  # the release of speculators whose layout is written

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


def speculators_layout(config: DFlashConfig, target: Target) -> dict[str, Any]:
    """The `config.json` of speculators' layout for a drafter of `target`.

    A factor of the drafter's embedding or output has no key: whoever writes the tensors multiplies the tables by it.

    Raises:
        ValueError: the layout cannot describe the drafter.
    """

    def refuse(what: str) -> None:
        raise ValueError(f"speculators' layout cannot describe this drafter: {what}")

    kinds = {kind: causal for kind, causal, _ in config.attention_kinds()}
    if kinds.get("full_attention"):
        refuse("is_causal is true, and its full layers are bidirectional")
    if "sliding_attention" in kinds and not config.shared_window:
        refuse("each slot has a window of its own (window_convention 'zlab'), and there all share the anchor's")
    if (config.optional("final_logit_softcapping") or 0) > 0:
        refuse("it has no final_logit_softcapping")
    if target.num_layers - 1 in config.target_layer_ids:
        refuse(f"it has no tap at the target's last layer, {target.num_layers - 1}")
    values = PreTrainedConfig.to_dict(config)
    left_out = {"architectures", "dtype", "transformers_version"}
    tokens = config.block_size - config.first_draft_slot
    return {
        "architectures": ["DFlashDraftModel"],
        "speculators_model_type": "dflash",
        "speculators_version": VERSION,
        "speculators_config": {
            "algorithm": "dflash",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": tokens}],
            "default_proposal_method": "greedy",
            "verifier": {
                "name_or_path": target.model.config.name_or_path or None,
                "architectures": [type(target.model).__name__],
            },
        },
        "transformer_layer_config": {
            **{key: values[key] for key in Qwen3Config().to_dict() if key in values and key not in left_out},
            "model_type": "qwen3",
        },
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "block_size": config.block_size,
        "aux_hidden_state_layer_ids": [tap + 1 for tap in config.target_layer_ids],
        "mask_token_id": config.mask_token_id,
        "sliding_window_non_causal": kinds.get("sliding_attention") is False,
        "sample_from_anchor": config.sample_from_anchor,
        "target_hidden_size": None,
        "tie_word_embeddings": False,
    }
