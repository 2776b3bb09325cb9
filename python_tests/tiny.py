"""Tiny random targets of each supported family, and drafters for them."""

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dflash_ext.models import DFlashDrafter, Target

VOCAB = 97
MASK_TOKEN = 96
SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GEMMA = dict(head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 3)
FAMILIES = ["llama", "qwen3", "gemma3"]


def tiny_model(family: str, **changes) -> PreTrainedModel:
    """A random causal LM in float32; prompts should use tokens 3 to 95."""
    torch.manual_seed(0)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SHAPE | changes))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**SHAPE | {"head_dim": 16} | changes))
    else:
        model = Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE | GEMMA | {"query_pre_attn_scalar": 16} | changes))
    return model.eval().requires_grad_(False)


def tiny_gemma4() -> PreTrainedModel:
    """Gemma 4's conditional class with its towers, shared keys and values, and per-layer embeddings, in float32."""
    shared = dict(global_head_dim=32, num_kv_shared_layers=2)
    per_layer = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB)
    tower = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    vision = tower | dict(model_type="gemma4_vision", intermediate_size=16, num_key_value_heads=2, head_dim=8)
    audio = tower | dict(model_type="gemma4_audio", output_proj_dims=16)
    torch.manual_seed(0)
    config = Gemma4Config(
        text_config=Gemma4TextConfig(**SHAPE | GEMMA | shared | per_layer), vision_config=vision, audio_config=audio
    )
    model = Gemma4ForConditionalGeneration(config).eval().requires_grad_(False)
    for layer in model.model.language_model.layers:  # its attention has no other scale; without one it sees one key
        layer.self_attn.q_norm.weight.fill_(0.25)
    return model


def tiny_pair(family: str, *, sliding: bool = False, **options) -> tuple[Target, DFlashDrafter]:
    """A tapped target and a random drafter for it; `sliding` gives the drafter's first layer a window of 5."""
    model = tiny_model(family)
    options = {"num_layers": 2, "block_size": 6, "taps": 3} | options
    drafter = DFlashDrafter.for_target(Target(model), mask_token_id=MASK_TOKEN, **options)
    if sliding:
        config = drafter.config
        config.layer_types = ["sliding_attention", *config.layer_types[1:]]
        config.sliding_window, config.use_sliding_window = 5, True
    return Target(model, drafter.config.target_layer_ids), drafter.eval()


def random_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, MASK_TOKEN, (n,), generator=generator).tolist() for n in lengths]
