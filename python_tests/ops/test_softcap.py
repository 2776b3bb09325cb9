"""softcapped_logits against its definition in float64."""

import math

import pytest
import torch

from dflash_ext import softcapped_logits
from dflash_ext.reference.numerics import softcapped

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 5, 1001), (3, 262_144), (0, 4)], ids=str)
def test_matches_the_definition(dtype, shape, device):
    """Rounded once, to a dtype that is not coarser than float16."""
    logits = 20 * torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    want = softcapped(logits.double(), 30.0)
    got = softcapped_logits(logits.clone(), 30.0)
    assert got.shape == shape
    assert got.dtype == (
        dtype if dtype in (torch.float32, torch.float64) else (torch.float32, torch.float16)[logits.is_cuda]
    )
    bound = 30 * {torch.float16: 2.0**-11, torch.float32: 2.0**-21}.get(got.dtype, 1e-15)
    assert ((got.double() - want).abs() <= bound).all()


def test_addresses_that_are_not_aligned(device):
    logits = 20 * torch.randn(4099, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    want = softcapped_logits(logits[1:].clone(), 9.0)
    assert torch.equal(softcapped_logits(logits.clone()[1:], 9.0), want)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_extreme_logits(dtype, device):
    logits = torch.tensor([math.inf, -math.inf, 1e4, -1e4, 0.0, math.nan], device=device, dtype=dtype)
    got = softcapped_logits(logits.clone(), 30.0)
    assert got[:5].tolist() == [30.0, -30.0, 30.0, -30.0, 0.0] and got[5].isnan()


def test_without_a_cap_logits_are_as_they_were(device):
    logits = torch.randn(3, 5, device=device)
    assert softcapped_logits(logits, None) is logits
    assert softcapped_logits(logits, 0.0) is logits
