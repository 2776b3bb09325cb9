"""Uniform-state diffusion: rows are independent, canvases stop when they are sure, and steps condition the next."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from dflash_ext import reference
from dflash_ext.decode.canvas import MaskedDiffusion, UniformDiffusion, decode_canvas, diffusion_gemma
from dflash_ext.decode.canvas.forward import CausalForward, canvas_forward
from python_tests.decode.canvas.models import CANVAS, tiny_denoiser, tiny_diffusion_gemma
from python_tests.tiny import random_prompts

PROCESS = UniformDiffusion(steps=6, entropy_bound=6.0, stability=0, confidence=1.0)
OPTIONS = dict(canvas_length=CANVAS, max_new_tokens=2 * CANVAS + 1)


class SelfConditioning(nn.Module):
    """Records what it was given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, embedded, soft):
        self.seen.append(soft.clone())
        return embedded + soft


def test_draws_depend_on_the_row_alone():
    model, prompts = tiny_diffusion_gemma(), random_prompts(12, 3, 7, 7)
    together = decode_canvas(model, prompts, PROCESS, batch_size=4, **OPTIONS).completions
    assert all(len(completion.tokens) == 2 * CANVAS + 1 for completion in together)
    assert together[2].tokens != together[3].tokens
    for size in (1, 3):
        again = decode_canvas(model, prompts, PROCESS, batch_size=size, **OPTIONS).completions
        assert [c.tokens for c in again] == [c.tokens for c in together]
        assert [c.steps for c in again] == [c.steps for c in together]


def test_canvases_stop_at_different_steps_and_do_not_wait():
    """A row whose canvas is done goes on while others need more steps on theirs."""
    model, prompts = tiny_diffusion_gemma(), random_prompts(12, 3, 7)
    process = replace(PROCESS, entropy_bound=9.0, t_min=0.05, t_max=0.15, steps=20, stability=1, confidence=2.5)
    decoded = decode_canvas(model, prompts, process, batch_size=3, **OPTIONS)
    steps = [completion.steps for completion in decoded.completions]
    assert len({count for each in steps for count in each}) > 2
    assert decoded.steps == max(map(sum, steps))


def test_the_first_noise_is_uniform():
    """One step that takes over nothing but the surest token leaves noise in all other places."""
    model = tiny_diffusion_gemma()
    process = UniformDiffusion(steps=1, entropy_bound=0.0)
    decoded = decode_canvas(model, [[5]] * 300, process, max_new_tokens=CANVAS, batch_size=300, tracing=True)
    noise = torch.tensor([
        token
        for completion in decoded.completions
        for [step] in completion.canvases
        for token, accepted in zip(step.canvas, step.accepted, strict=True)
        if not accepted
    ])  # fmt: skip
    assert len(noise) == 300 * (CANVAS - 1)
    counts = noise.bincount(minlength=97)
    assert len(counts) == 97
    expected = len(noise) / 97
    assert ((counts - expected) ** 2 / expected).sum() < 150  # chi-square with 96 degrees of freedom, p = 0.0003


def test_a_causal_model_is_conditioned_on_its_last_step(monkeypatch):
    module = SelfConditioning()
    denoiser = replace(tiny_denoiser("gemma3"), mask_id=None, self_conditioning=module)
    logits, denoise = [], CausalForward.denoise
    monkeypatch.setattr(CausalForward, "denoise", lambda *given: logits.append(denoise(*given)) or logits[-1])
    process = UniformDiffusion(steps=3, t_min=0.5, t_max=0.8, confidence=None)
    decode_canvas(denoiser, random_prompts(9), process, canvas_length=CANVAS, max_new_tokens=CANVAS)
    model = denoiser.target.model
    table, scale = model.get_input_embeddings().weight, model.config.hidden_size**0.5
    expected = [
        reference.soft_embedding(logits[step][0], table, temperature=temperature) * scale
        for step, temperature in ((0, 0.8), (1, 0.7))
    ]
    torch.testing.assert_close(module.seen[1:], [each[None] for each in expected])
    assert not module.seen[0].any()


def test_the_module_of_self_conditioning_changes_the_tokens():
    denoiser = replace(tiny_denoiser(), mask_id=None)
    without = decode_canvas(denoiser, random_prompts(9), PROCESS, **OPTIONS).completions[0]
    module = SelfConditioning()
    with_module = decode_canvas(
        replace(denoiser, self_conditioning=module), random_prompts(9), PROCESS, **OPTIONS
    ).completions[0]
    assert without.tokens != with_module.tokens


@torch.no_grad()
def test_fused_norms_and_mlps_of_diffusion_gemma_give_its_logits():
    model = tiny_diffusion_gemma()
    for norm in (module for module in model.modules() if type(module).__name__.endswith("RMSNorm")):
        for weight in norm.parameters():
            torch.nn.init.uniform_(weight, 0.5, 2)
    prompt, canvas = torch.tensor(random_prompts(9)), torch.tensor(random_prompts(6))
    logits = []
    for fused in (True, False):
        forward = canvas_forward(model, slots=2, tokens=16, rows=16, fused=fused)
        norms = [module for module in forward.fused if type(module).__name__.endswith("RMSNorm")]
        assert len(norms) == (len(model.model.decoder.layers) * 2 * 11 + 4 if fused else 0)
        none, start, slot = torch.tensor([0]), torch.tensor([9]), torch.tensor([0], dtype=torch.int32)
        forward.encode(prompt, torch.arange(9)[None], none, start, slot)
        soft = torch.rand(1, 6, forward.like.shape[1], generator=torch.Generator().manual_seed(0))
        logits.append(forward.denoise(canvas, 9 + torch.arange(6)[None], start, torch.tensor([6]), slot, soft))
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


def test_models_that_do_not_share_an_attention_implementation_are_left_as_they_were():
    model = tiny_diffusion_gemma()
    model.set_attn_implementation("eager")
    before = copy.copy(vars(model.model.decoder.layers[0].self_attn))
    decode_canvas(model, random_prompts(9), PROCESS, **OPTIONS)
    assert model.config.get_text_config()._attn_implementation == "eager"
    assert vars(model.model.decoder.layers[0].self_attn) == before


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(steps=0), "steps is 0"),
        (dict(entropy_bound=-1.0), "entropy_bound is -1.0"),
        (dict(t_min=0.9), "t_min is 0.9 and t_max 0.8"),
        (dict(stability=-1), "stability is -1"),
        (dict(confidence=float("nan")), "confidence is nan; a number of at least 0, or None, is needed"),
        (dict(confidence=-0.1), "confidence is -0.1"),
        (dict(entropy_bound=float("nan")), "entropy_bound is nan"),
        (dict(t_max=float("nan")), "t_min is 0.4 and t_max nan"),
    ],
)
def test_settings_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        UniformDiffusion(**options)


def test_an_older_transformers_is_refused(monkeypatch):
    model = tiny_diffusion_gemma()
    monkeypatch.setattr(diffusion_gemma, "OLDEST", "99.0")
    with pytest.raises(ValueError, match="DiffusionGemma need transformers 99.0 or newer; this is 5"):
        decode_canvas(model, [[3]], UniformDiffusion())


def test_a_process_must_fit_the_model():
    with pytest.raises(ValueError, match="the model has a mask token: MaskedDiffusion is needed"):
        decode_canvas(tiny_denoiser(), [[3]], PROCESS)
    with pytest.raises(ValueError, match="the model has no mask token: UniformDiffusion is needed"):
        decode_canvas(tiny_diffusion_gemma(), [[3]], MaskedDiffusion())
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot decode canvases"):
        decode_canvas(tiny_denoiser().target.model, [[3]], PROCESS, canvas_length=4)
