"""The config files of SpecForge 0.2.0, with tiny sizes."""

from python_tests.tiny import MASK_TOKEN, VOCAB

BLOCK, TAPS = 5, [0, 2, 4]


def draft_config(*layer_types: str, window: int | None = None) -> dict:
    """A config that a drafter is trained with, with the keys of `configs/qwen3-8b-dflash.json`."""
    return {
        "architectures": ["DFlashDraftModel"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "block_size": BLOCK,
        "bos_token_id": 1,
        "dflash_config": {"mask_token_id": MASK_TOKEN, "target_layer_ids": TAPS},
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "layer_types": list(layer_types),
        "max_position_embeddings": 40960,
        "max_window_layers": len(layer_types),
        "model_type": "qwen3",
        "num_attention_heads": 4,
        "num_hidden_layers": len(layer_types),
        "num_key_value_heads": 2,
        "num_target_layers": 6,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": window,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": window is not None,
        "vocab_size": VOCAB,
    }


def exported_config(*layer_types: str, window: int | None = None) -> dict:
    """The `config.json` that SpecForge's exporter writes for such a drafter."""
    trained = draft_config(*layer_types, window=window)
    rope = {"rope_parameters": {"rope_theta": trained["rope_theta"], "rope_type": "default"}}
    more = {"draft_vocab_size": VOCAB, "pad_token_id": None, "transformers_version": "5.8.1"}
    return {key: value for key, value in trained.items() if key != "rope_scaling"} | rope | more
