"""A DFlash drafter for the denoiser's model drafts what canvases begin with."""

import pytest
import torch

from dflash_ext.decode.canvas import MaskedDiffusion, UniformDiffusion, decode_canvas
from dflash_ext.models import Denoiser, Target
from python_tests.decode.canvas.models import tiny_denoiser, tiny_diffusion_gemma
from python_tests.tiny import random_prompts, tiny_pair

PROMPTS = random_prompts(5, 9, 3)
LENGTH = 5


def guess_of(target, drafter, context) -> list[int]:
    """The drafter's block behind the last token of a context, by its own forward."""
    block = torch.tensor([[context[-1], *[drafter.config.mask_token_id] * LENGTH]])
    hidden = drafter(
        noise_embeds=drafter.embed(target, block),
        context_hidden_states=target.features(torch.tensor([context[:-1]])),
        position_ids=torch.arange(len(context) + LENGTH)[None],
    ).last_hidden_state
    return drafter.logits(target, hidden, target.head.bfloat16())[0, 1:].argmax(-1).tolist()


@torch.no_grad()
def test_each_canvas_begins_with_a_draft():
    """Of the hidden states of all tokens before it, in batches, with prompts that wait, and in later canvases."""
    target, drafter = tiny_pair("llama")
    denoiser, process = Denoiser(Target(target.model)), UniformDiffusion(steps=1)
    options = {"drafter": drafter, "canvas_length": LENGTH, "max_new_tokens": 3 * LENGTH, "batch_size": 2}
    found = [each.tokens for each in decode_canvas(denoiser, PROMPTS, process, **options).completions]
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        context = list(prompt)
        for _ in range(3):
            given = {"canvases": [guess_of(target, drafter, context)], "canvas_length": LENGTH}
            context += decode_canvas(denoiser, [context], process, max_new_tokens=LENGTH, **given).completions[0].tokens
        assert context == [*prompt, *tokens]
    noise = decode_canvas(denoiser, PROMPTS, process, **options | {"drafter": None}).completions
    assert [each.tokens for each in noise] != found


def test_what_is_refused():
    target, drafter = tiny_pair("llama")
    options = {"drafter": drafter, "canvas_length": LENGTH, "max_new_tokens": 4}
    with pytest.raises(ValueError, match="6 slots: no room for a canvas of 8 tokens"):
        decode_canvas(Denoiser(Target(target.model)), [[3]], UniformDiffusion(), **options | {"canvas_length": 8})
    for model, process in ((tiny_denoiser(), MaskedDiffusion()), (tiny_diffusion_gemma(), UniformDiffusion())):
        with pytest.raises(ValueError, match="goes with a Denoiser of uniform-state diffusion"):
            decode_canvas(model, [[3]], process, **options)
