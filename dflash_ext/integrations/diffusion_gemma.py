"""What `dflash-ext doctor` says of transformers' own DiffusionGemma."""

from __future__ import annotations

import torch

WINDOW = 4


@torch.no_grad()
def static_cache_difference(prompt_length: int = 3 * WINDOW) -> float:
    """How far a static cache changes the logits of a canvas behind a prompt, relative to the largest logit.

    It compares transformers' two caches on a tiny random DiffusionGemma with a sliding window of 4 tokens. Beyond
    rounding, the difference is an error of transformers: in 5.24 its static cache does not count the tokens of sliding
    layers, so that behind a prompt as long as the window the canvas takes the places of other keys.
    """
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DiffusionGemmaTextConfig

    sizes = dict(vocab_size=32, hidden_size=32, intermediate_size=16, head_dim=8, global_head_dim=8)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, num_global_key_value_heads=2)
    experts = dict(num_experts=2, top_k_experts=1, moe_intermediate_size=16)
    kinds = dict(layer_types=["sliding_attention", "full_attention"], num_hidden_layers=2, sliding_window=WINDOW)
    text = DiffusionGemmaTextConfig(**sizes, **heads, **experts, **kinds)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8)
    config = DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=WINDOW)
    logits = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DiffusionGemmaForBlockDiffusion(config).eval()
        for weight in model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.1)
        model.set_attn_implementation("sdpa")
        model.lm_head.register_forward_hook(lambda _module, _inputs, output: logits.append(output))
        prompt = torch.randint(2, 32, (1, prompt_length))
        for cache in ("dynamic", "static"):
            torch.manual_seed(1)  # the same canvas
            options = dict(cache_implementation=cache, disable_compile=True, eos_token_id=1)
            model.generate(prompt, max_new_tokens=WINDOW, max_denoising_steps=1, **options)
    first, second = logits
    return float((first - second).abs().max() / first.abs().max())
