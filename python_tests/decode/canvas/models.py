"""Tiny random models that denoise canvases."""

import pytest
import torch
import transformers
from packaging import version
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DiffusionGemmaTextConfig

from dflash_ext.decode.canvas.diffusion_gemma import OLDEST
from dflash_ext.models import Denoiser, Target
from python_tests.tiny import MASK_TOKEN, SHAPE, tiny_model

CANVAS = 6
WINDOW = 5


def tiny_diffusion_gemma(**changes) -> DiffusionGemmaForBlockDiffusion:
    """Sliding and full layers of different widths, experts, and a window that is shorter than most prompts.

    The weights are large enough for logits to differ, and small enough for two ways of computing them to stay close.
    """
    if version.parse(transformers.__version__) < version.parse(OLDEST):
        pytest.skip(f"canvases of DiffusionGemma need transformers {OLDEST}")
    torch.manual_seed(0)
    kinds = dict(num_hidden_layers=4, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"] * 2)
    experts = dict(num_experts=4, top_k_experts=2, moe_intermediate_size=16)
    text = SHAPE | kinds | experts | dict(head_dim=16, global_head_dim=32, num_global_key_value_heads=1) | changes
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8)
    config = DiffusionGemmaConfig(
        text_config=DiffusionGemmaTextConfig(**text), vision_config=vision, canvas_length=CANVAS
    )
    model = DiffusionGemmaForBlockDiffusion(config).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.06)
    for layer, factor in zip(model.model.decoder.layers, (0.9, 1.1, 0.8, 1.2), strict=False):
        layer.layer_scalar.fill_(factor)  # the encoder has factors of its own
    return model


def tiny_denoiser(family: str = "llama", **options) -> Denoiser:
    model = tiny_model(family)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.06)
    return Denoiser(Target(model), **{"mask_id": MASK_TOKEN} | options)
