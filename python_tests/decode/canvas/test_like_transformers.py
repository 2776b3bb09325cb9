"""DiffusionGemma on our canvas loop gives transformers' own tokens at the same random numbers."""

from dataclasses import replace

import pytest
import torch
from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig

from dflash_ext.decode.canvas import MaskedDiffusion, UniformDiffusion, decode_canvas
from python_tests.decode.canvas.models import CANVAS, tiny_denoiser, tiny_diffusion_gemma
from python_tests.tiny import random_prompts

PAD = 0


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion_gemma()


def theirs(model, prompts, process, *, new_tokens, stop=None, pad=PAD, **given):
    """The answers of transformers' generate, with all that it puts behind their ends, and the denoising steps."""
    model.set_attn_implementation("sdpa")
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = stop, pad
    torch.manual_seed(5)
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        max_denoising_steps=process.steps,
        sampler_config=EntropyBoundSamplerConfig(process.entropy_bound),
        t_min=process.t_min,
        t_max=process.t_max,
        stability_threshold=process.stability,
        confidence_threshold=process.confidence,
        **given,
    )
    return out.sequences[:, longest:].tolist(), out.tokens_per_forward.tolist()


def ours(model, prompts, process, *, new_tokens, stop=None, pad=PAD, **given):
    torch.manual_seed(5)
    return decode_canvas(
        model,
        prompts,
        process,
        max_new_tokens=new_tokens,
        stop_token_ids=stop,
        pad_token_id=pad,
        like_transformers=True,
        **given,
    )


def assert_equal(decoded, expected, per_forward):
    for completion, tokens, rate in zip(decoded.completions, expected, per_forward, strict=True):
        assert completion.tokens == tokens[: len(completion.tokens)]
        assert all(token == PAD for token in tokens[len(completion.tokens) :])
        assert sum(token != PAD for token in completion.tokens) / sum(completion.steps) == pytest.approx(rate)


COOLING = UniformDiffusion(steps=20, entropy_bound=9.0, t_min=0.05, t_max=0.15, stability=1, confidence=2.5)
PROCESSES = {
    "defaults": UniformDiffusion(steps=8),
    "one step": UniformDiffusion(steps=1),
    "loose": UniformDiffusion(steps=6, entropy_bound=9.0, t_min=0.1, t_max=0.3),
    "hot": UniformDiffusion(steps=6, entropy_bound=2.0, t_min=1.0, t_max=1.5),
    "confident": replace(COOLING, stability=0, confidence=1.0),
    "stable": COOLING,
    "stable for two": replace(COOLING, stability=2),
}


@pytest.mark.parametrize(
    "lengths, process",
    [((17, 3, 9, 1), process) for process in PROCESSES.values()] + [((14,), PROCESSES["loose"])],
    ids=[*PROCESSES, "one prompt"],
)
def test_tokens_are_those_of_transformers(model, lengths, process):
    """Prompts of unequal length, shorter and longer than the window, over three canvases."""
    prompts = random_prompts(*lengths)
    expected, per_forward = theirs(model, prompts, process, new_tokens=3 * CANVAS)
    decoded = ours(model, prompts, process, new_tokens=3 * CANVAS)
    assert_equal(decoded, expected, per_forward)


@pytest.mark.parametrize("pad", [PAD, None])
def test_rows_that_end_ride_along(model, pad):
    """Rows end within different canvases, and take part in the draws until all have ended."""
    prompts, process = random_prompts(12, 4, 8), UniformDiffusion(steps=4, entropy_bound=9.0)
    whole = ours(model, prompts, process, new_tokens=3 * CANVAS).completions
    stop = [whole[0].tokens[CANVAS + 2], whole[2].tokens[1]]
    expected, _ = theirs(model, prompts, process, new_tokens=3 * CANVAS, stop=stop, pad=pad)
    decoded = ours(model, prompts, process, new_tokens=3 * CANVAS, stop=stop, pad=pad)
    for completion, tokens in zip(decoded.completions, expected, strict=True):
        assert completion.tokens == tokens[: len(completion.tokens)]
    assert [completion.finish_reason for completion in decoded.completions].count("stop") >= 2
    assert len({len(completion.steps) for completion in decoded.completions}) > 1


def test_a_soft_cap_that_matters(model):
    """That of the tiny model, 30, hardly changes its small logits."""
    capped, prompts = tiny_diffusion_gemma(final_logit_softcapping=0.3), random_prompts(12, 4)
    process = replace(PROCESSES["loose"], t_min=0.02, t_max=0.1)
    expected, per_forward = theirs(capped, prompts, process, new_tokens=2 * CANVAS)
    assert_equal(ours(capped, prompts, process, new_tokens=2 * CANVAS), expected, per_forward)
    assert expected != theirs(model, prompts, process, new_tokens=2 * CANVAS)[0]


def test_a_first_canvas_is_given(model):
    """The answer is cut at a length that is no multiple of the canvas."""
    prompts, process = random_prompts(12, 4), UniformDiffusion(steps=3, entropy_bound=2.0)
    canvases = random_prompts(CANVAS, CANVAS, seed=1)
    given = dict(decoder_input_ids=torch.tensor(canvases))
    expected, _ = theirs(model, prompts, process, new_tokens=2 * CANVAS - 2, **given)
    decoded = ours(model, prompts, process, new_tokens=2 * CANVAS - 2, canvases=canvases)
    for completion, tokens in zip(decoded.completions, expected, strict=True):
        assert completion.tokens == tokens[: 2 * CANVAS - 2]
        assert completion.finish_reason == "length"


def test_an_encoder_that_is_not_causal_is_refused(model):
    changed = tiny_diffusion_gemma(use_bidirectional_attention="all")
    with pytest.raises(ValueError, match="canvases need a causal encoder"):
        decode_canvas(changed, [[3]], UniformDiffusion())


def test_a_batch_that_does_not_stay_together_is_refused(model):
    with pytest.raises(ValueError, match="decodes all 3 prompts at a time"):
        decode_canvas(model, [[3], [4], [5]], UniformDiffusion(), like_transformers=True, batch_size=2)


def test_masked_diffusion_is_refused():
    with pytest.raises(ValueError, match="transformers has no masked one"):
        decode_canvas(tiny_denoiser(), [[3]], MaskedDiffusion(), like_transformers=True)
