import pytest
import torch

from dflash_ext import IntervalMask
from dflash_ext.data import NoiseCollator
from dflash_ext.models.denoising_masks import denoising_masks
from dflash_ext.noise import Share

LENGTH, SIZE = 24, 4
STARTS = [0, 2, 13]
WINDOWS = {"full_attention": None, "sliding_attention": 5}


def bounds(prefix=0.4):
    row = {"input_ids": torch.zeros(LENGTH).long(), "starts": torch.tensor(STARTS)}
    return NoiseCollator(prefix=Share(prefix, prefix))([row])


def sees(pattern, context, window, q, k, where):
    """Whether token q sees token k of the same row, by the words of `denoising_masks`.

    where: for each token, its document's start and end, and the start of its block.
    """
    (start, end, blocks), noised = where[q % LENGTH], q < LENGTH and pattern == "block_causal"
    column, key = q % LENGTH, k % LENGTH
    if not start <= key < end:
        return False
    is_prefix = column < blocks
    first, last = blocks, end
    if pattern == "block_causal":
        first = blocks + (column - blocks) // SIZE * SIZE
        last = min(first + SIZE, end)
        if noised and is_prefix:
            return q == k
        in_noised_half = k < LENGTH
        if noised and in_noised_half != (key >= first):
            return False
        if not noised and in_noised_half:
            return False
    near = window is None or abs(column - key) < window
    if is_prefix or pattern == "causal" or (pattern == "block_causal" and not noised and context == "causal"):
        return key <= column and near
    if key >= first:
        return key < last and near
    return window is None or first - key < window


@pytest.mark.parametrize("kind", WINDOWS)
@pytest.mark.parametrize(
    ("pattern", "context"),
    [("causal", "causal"), ("prefix_block", "causal"), ("block_causal", "causal"), ("block_causal", "block_causal")],
)
def test_who_sees_whom(pattern, context, kind):
    batch = bounds()
    size = SIZE if pattern == "block_causal" else None
    mask = denoising_masks(batch, WINDOWS, pattern, context=context, block_size=size)[kind]
    where = list(zip(*(batch[name][0].tolist() for name in ("starts", "ends", "blocks")), strict=True))
    rows = LENGTH * (2 if size else 1)
    want = [[sees(pattern, context, WINDOWS[kind], q, k, where) for k in range(rows)] for q in range(rows)]
    assert torch.equal(mask.to_bool()[0, 0], torch.tensor(want))


def test_one_document_is_a_prefix_block():
    batch = {
        name: torch.full((1, LENGTH), value, dtype=torch.int32)
        for name, value in (("starts", 0), ("ends", LENGTH), ("blocks", 9))
    }
    mask = denoising_masks(batch, {"full_attention": None}, "prefix_block")["full_attention"]
    assert torch.equal(mask.to_bool(), IntervalMask.prefix_block(LENGTH, 9).to_bool())


def test_blocks_over_right_tokens_are_those_of_block_diffusion():
    batch = {
        name: torch.full((1, LENGTH), value, dtype=torch.int32)
        for name, value in (("starts", 0), ("ends", LENGTH), ("blocks", 0))
    }
    options = dict(context="block_causal", block_size=SIZE)
    mask = denoising_masks(batch, {"full_attention": None}, "block_causal", **options)["full_attention"]
    assert torch.equal(mask.to_bool(), IntervalMask.block_diffusion(LENGTH, SIZE).to_bool())
