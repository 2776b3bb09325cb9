"""Decoding gives the same where it is called under autocast, in inference mode, and with another default dtype."""

import contextlib

import pytest
import torch

from dflash_ext.decode import decode
from dflash_ext.decode.canvas import MaskedDiffusion, decode_canvas
from dflash_ext.models import Denoiser, Target
from python_tests.tiny import MASK_TOKEN, tiny_model, tiny_pair


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
}
surroundings = pytest.mark.parametrize("made", SURROUNDINGS.values(), ids=SURROUNDINGS)


@surroundings
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_speculative(family, made):
    target, drafter = tiny_pair(family)
    options = dict(temperature=[0.0, 0.7], top_p=0.83, repetition_penalty=1.37, logit_bias={5: 0.3337}, seed=3)

    def tokens():
        decoded = decode(target, drafter, [[3, 4, 5], [7, 8]], max_new_tokens=12, **options)
        return [completion.tokens for completion in decoded.completions]

    expected = tokens()
    with made():
        assert tokens() == expected


@surroundings
def test_canvases(made):
    denoiser = Denoiser(Target(tiny_model("llama")), MASK_TOKEN)

    def tokens():
        process = MaskedDiffusion(steps=3, temperature=0.7)
        decoded = decode_canvas(denoiser, [[3, 4], [5]], process, canvas_length=8, max_new_tokens=16, seed=1)
        return [completion.tokens for completion in decoded.completions]

    expected = tokens()
    with made():
        assert tokens() == expected
