"""What decoding computes for a canvas is what training saw of a block, for each kind of denoiser."""

import pytest
import torch

from dflash_ext.decode.canvas.forward import CausalForward
from dflash_ext.models import Adaptation, UniformAdaptation, load_denoiser, save_adaptation
from dflash_ext.reference.numerics import softcapped
from python_tests.models.test_adaptation import FAMILIES, target_of
from python_tests.tiny import MASK_TOKEN

PREFIX, CANVAS = 3, 4  # within the window of Gemma's layers


def adaptation_of(family: str, kind: str, noise: str) -> Adaptation:
    """One whose adapter, weights and self-conditioning change something."""
    made = UniformAdaptation if noise == "uniform" else Adaptation
    adaptation = made.for_target(
        target_of(family), mask_id=None if noise == "uniform" else MASK_TOKEN, kind=kind, rank=4
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adaptation.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return adaptation


def batch_of(tokens: torch.Tensor, prefix: int) -> dict[str, torch.Tensor]:
    """A document of which the tokens behind the prefix are a block; masked ones are hidden, and none is noised anew."""
    bounds = {"starts": 0, "ends": tokens.shape[1], "blocks": prefix}
    batch = {name: torch.full(tokens.shape, value, dtype=torch.int32) for name, value in bounds.items()}
    noised = torch.zeros_like(tokens, dtype=torch.bool)
    return batch | {"input_ids": tokens, "hidden": tokens == MASK_TOKEN, "noised": noised, "noise": tokens}


@torch.no_grad()
@pytest.mark.parametrize("noise", ["masked", "uniform"])
@pytest.mark.parametrize("kind", ["whole", "gated", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_canvas_has_the_logits_of_a_block_behind_a_prompt_and_behind_a_canvas(tmp_path, family, kind, noise):
    adaptation = adaptation_of(family, kind, noise)
    save_adaptation(adaptation, tmp_path)
    denoiser = load_denoiser(target_of(family).model, tmp_path)
    forward = CausalForward(denoiser, slots=2, tokens=PREFIX + 2 * CANVAS, rows=8)
    tokens = torch.randint(3, MASK_TOKEN, (1, PREFIX + 2 * CANVAS), generator=torch.Generator().manual_seed(0))
    if noise == "masked":
        tokens[:, [PREFIX + 1, PREFIX + CANVAS]] = MASK_TOKEN
    slot, soft = torch.zeros(1, dtype=torch.int32), torch.zeros(1, CANVAS, denoiser.target.embedding_size)
    begin = 0
    for end in (PREFIX, PREFIX + CANVAS):
        part = tokens[:, begin:end].masked_fill(tokens[:, begin:end] == MASK_TOKEN, 5)  # a committed token
        tokens[:, begin:end] = part
        positions, start = torch.arange(begin, end)[None], torch.tensor([begin])
        (forward.commit if begin else forward.encode)(part, positions, start, torch.tensor([end - begin]), slot)
        canvas, where = tokens[:, end : end + CANVAS], torch.arange(end, end + CANVAS)[None]
        got = forward.denoise(canvas, where, torch.tensor([end]), torch.tensor([CANVAS]), slot, soft)
        states = adaptation(*adaptation.inputs(batch_of(tokens[:, : end + CANVAS], end)))[:, end:]
        want = softcapped(torch.nn.functional.linear(states, adaptation.head), adaptation.target.softcap)
        torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-3)
        begin = end
    if kind == "gated":
        assert denoiser.reader.model is not denoiser.target.model
