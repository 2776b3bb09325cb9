import math

import pytest
import torch

from dflash_ext.train import build_blocks, dpace, position_decay, sample_anchors
from dflash_ext.train.anchors import one_forward_dpace


def random_loss_mask(rows: int, length: int, seed: int) -> torch.Tensor:
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < 0.7


def test_anchors_are_valid_distinct_and_ascending():
    for seed in range(20):
        mask = random_loss_mask(4, 30, seed)
        mask[3] = False
        anchors, keep = sample_anchors(mask, 12, torch.Generator().manual_seed(seed))
        for row in range(4):
            kept = anchors[row][keep[row]].tolist()
            assert kept == sorted(set(kept))
            assert all(mask[row, a] and mask[row, a + 1] for a in kept)
            valid = sum(bool(mask[row, a] and mask[row, a + 1]) for a in range(29))
            assert len(kept) == min(12, valid)
            assert (anchors[row][~keep[row]] == 0).all()


def test_anchors_are_uniform():
    mask = torch.ones(2000, 9, dtype=torch.bool)
    anchors, keep = sample_anchors(mask, 2, torch.Generator().manual_seed(1))
    assert keep.all()
    counts = anchors.flatten().bincount(minlength=9)
    assert counts[8] == 0  # the last position has no successor
    assert (counts[:8] - 500).abs().max() < 5 * math.sqrt(500)


def test_more_anchors_than_positions():
    anchors, keep = sample_anchors(torch.ones(1, 3, dtype=torch.bool), 8)
    assert keep.sum() == 2 and anchors.shape == (1, 8)


def test_blocks_follow_their_rules():
    """Same-position labels, slot 0 excluded, cut at the first token that does not count."""
    ids = torch.arange(100, 110)[None]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 1, 1, 1]], dtype=torch.bool)
    anchors = torch.tensor([[2, 4, 7, 0]])
    keep = torch.tensor([[True, True, True, False]])
    blocks = build_blocks(ids, mask, anchors, keep, block_size=4, mask_token_id=9)
    assert blocks.noise_ids[0].tolist() == [[102, 9, 9, 9], [104, 9, 9, 9], [107, 9, 9, 9], [100, 9, 9, 9]]
    assert blocks.positions[0].tolist() == [[2, 3, 4, 5], [4, 5, 6, 7], [7, 8, 9, 10], [0, 1, 2, 3]]
    assert blocks.counts[0].int().tolist() == [[0, 1, 1, 1], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    for block in range(3):
        for slot in range(4):
            if blocks.counts[0, block, slot]:
                assert blocks.labels[0, block, slot] == 100 + blocks.positions[0, block, slot]


def test_blocks_whose_slot_0_drafts_are_labelled_one_token_ahead():
    ids = torch.arange(100, 110)[None]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 1, 1, 1]], dtype=torch.bool)
    anchors = torch.tensor([[2, 4, 7, 0]])
    keep = torch.tensor([[True, True, True, False]])
    blocks = build_blocks(ids, mask, anchors, keep, block_size=3, mask_token_id=9, first_slot=0)
    assert blocks.noise_ids[0].tolist() == [[102, 9, 9], [104, 9, 9], [107, 9, 9], [100, 9, 9]]
    assert blocks.positions[0].tolist() == [[2, 3, 4], [4, 5, 6], [7, 8, 9], [0, 1, 2]]
    assert blocks.counts[0].int().tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert blocks.labels[0][blocks.counts[0]].tolist() == [103, 104, 105, 105, 108, 109]


@pytest.mark.parametrize("first_slot", [0, 1])
def test_position_decay(first_slot):
    weights = position_decay(5, 2.0, first_slot)
    assert not weights[:first_slot].any()
    torch.testing.assert_close(weights[first_slot:], torch.tensor([math.exp(-k / 2) for k in range(5 - first_slot)]))


def test_dpace_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    nll = torch.rand(3, 5, generator=generator) * 3
    counts = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    weights = dpace(nll, counts, alpha=0.3)
    for row in range(3):
        last = int(counts[row].sum())
        for j in range(5):
            expected = 0.0
            if j < last:
                for m in range(j, last):
                    expected += math.prod(0.7 * math.exp(-nll[row, i].item()) + 0.3 for i in range(m + 1))
            assert math.isclose(weights[row, j].item(), expected, rel_tol=1e-5, abs_tol=1e-7)


def test_dpace_for_one_forward_is_its_formula():
    nll = -torch.tensor([[0.9, 0.5, 0.25], [0.1, 0.5, 0.25]]).log().requires_grad_()
    counts = torch.tensor([[True, True, True], [True, True, False]])
    weights = one_forward_dpace(nll, counts, alpha=0.2)
    second, third = 0.8 * 0.5 + 0.2, (0.8 * 0.5 + 0.2) * (0.8 * 0.25 + 0.2)
    often, seldom = 0.8 * 0.9 + 0.2, 0.8 * 0.1 + 0.2  # a cycle begins where the token at the first slot was missed
    want = [[1, seldom * (second + third), seldom * third], [1, often * second, 0]]
    torch.testing.assert_close(weights, torch.tensor(want))
    assert not weights.requires_grad


def test_dpace_has_no_gradient():
    nll = torch.rand(2, 3, requires_grad=True)
    assert not dpace(nll, torch.ones(2, 3, dtype=torch.bool)).requires_grad
