"""Drafts from uniform noise in CUDA graphs, in bfloat16: canvases of a denoiser, and blocks of a DFlash drafter."""

import pytest
import torch

from dflash_ext.decode import Engine, decode
from dflash_ext.models import DFlashDrafter, Target
from python_tests.decode.calls import with_calls
from python_tests.decode.canvas.test_canvas_gpu import gated, uniform
from python_tests.decode.test_engine_gpu import SHAPES, assert_nothing_waits, regret
from python_tests.tiny import MASK_TOKEN, random_prompts, tiny_model

pytestmark = pytest.mark.gpu


def blocks(family):
    """A DFlash drafter whose slots begin with random tokens."""
    model = tiny_model(family, **SHAPES[family]).to("cuda", torch.bfloat16)
    options = dict(mask_token_id=MASK_TOKEN, num_layers=2, block_size=6, taps=3, noise="uniform")
    return DFlashDrafter.for_target(Target(model), **options).to("cuda", torch.bfloat16).eval()


CASES = {
    "canvas, llama": lambda: uniform("llama"),
    "canvas, gemma3": lambda: uniform("gemma3"),
    "gated canvas, llama": lambda: gated("llama"),
    "block, qwen3": lambda: blocks("qwen3"),
}


def pair(case):
    """The model that verifies, and the drafter."""
    drafter = CASES[case]()
    model = tiny_model(case.split(", ")[1], **SHAPES[case.split(", ")[1]]).to("cuda", torch.bfloat16)
    return Target(model, drafter.config.target_layer_ids if isinstance(drafter, DFlashDrafter) else ()), drafter


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_rows_that_join_and_leave_get_the_targets_tokens(case, steps):
    target, drafter = pair(case)
    prompts = random_prompts(3, 300, 17, 40, 5, 1, 60, 9)
    options = dict(max_new_tokens=24, batch_size=3, stop_token_ids=[7, 8], denoising_steps=steps, block_size=6)
    decoded = decode(target, drafter, prompts, **options)
    for completion in decoded.completions:
        assert completion.tokens[-1] in (7, 8) or len(completion.tokens) == 24
    assert regret(target.model, prompts, [completion.tokens for completion in decoded.completions]) < 0.05


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_graph_does_what_the_cycle_does(case, steps, temperature):
    """It drafts the same tokens, and commits the same."""
    target, drafter = pair(case)
    told = []
    for captured in (True, False):
        engine = Engine(target, drafter, slots=4, max_length=200, denoising_steps=steps, block_size=5)
        engine = engine if captured else with_calls(engine)
        options = dict(max_new_tokens=40, temperature=temperature)
        prompts = random_prompts(4, 9, 70, 31)
        requests = [engine.submit(prompt, seed=seed, **options) for seed, prompt in enumerate(prompts)]
        engine.run()
        told.append([(request.completion.drafted, request.completion.tokens) for request in requests])
    assert told[0] == told[1]


@pytest.mark.parametrize("case", CASES)
def test_nothing_waits_for_the_device_in_a_cycle(case):
    target, drafter = pair(case)
    assert_nothing_waits(Engine(target, drafter, slots=2, max_length=200, denoising_steps=2, block_size=5))
