"""Random tokens of neighbouring seeds, positions and steps: uniform, and independent of each other."""

import pytest
import torch

from dflash_ext.ops.random import SAMPLE, advanced, derived, uniform_tokens, uniforms_of

VOCAB, ROWS, STEPS, POSITIONS = 16, 50, 6, 200


def seeds() -> torch.Tensor:
    """[rows, steps, positions], as a canvas has them."""
    row = derived(torch.arange(ROWS), 0)[:, None]
    return advanced(row, torch.arange(STEPS))[..., None] + torch.arange(POSITIONS)


def chi_square(counts: torch.Tensor) -> float:
    """In deviations of its distribution from its mean."""
    expected, freedom = counts.sum() / counts.numel(), counts.numel() - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


def test_no_two_seeds_are_equal():
    assert seeds().unique().numel() == ROWS * STEPS * POSITIONS


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_neighbours_are_uniform_together(axis):
    tokens = uniform_tokens(seeds(), VOCAB)
    first, second = tokens.narrow(axis, 0, tokens.shape[axis] - 1), tokens.narrow(axis, 1, tokens.shape[axis] - 1)
    assert abs(chi_square((first * VOCAB + second).flatten().bincount(minlength=VOCAB**2).double())) < 4


def test_noise_is_independent_of_the_draws_of_the_same_seed():
    each = seeds().flatten()
    drawn = (uniforms_of(each, SAMPLE, len(each), 1)[:, 0] * VOCAB).long()
    counts = (uniform_tokens(each, VOCAB) * VOCAB + drawn).bincount(minlength=VOCAB**2)
    assert abs(chi_square(counts.double())) < 4


def test_all_of_a_large_vocabulary_is_drawn():
    tokens = uniform_tokens(torch.arange(3_000_000), 262_144)
    assert (tokens.min(), tokens.max()) == (0, 262_143)
    assert abs(chi_square(tokens.bincount(minlength=262_144).double())) < 4
