"""Samples that share rows give what they give alone."""

import pytest
import torch

from dflash_ext.train import AnchorCollator, Recipe, train_drafter
from dflash_ext.train.collator import shared_rows
from dflash_ext.train.objectives import DFlashObjective
from python_tests.tiny import FAMILIES, MASK_TOKEN, tiny_pair
from python_tests.train.test_training import Cycles


def samples(count: int = 7) -> list[dict]:
    """Their loss mask begins with the first token, so that nothing but the rows keeps them apart."""
    lengths = [9, 14, 3, 20, 11, 2, 17]
    ids = [3 + torch.randint(80, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths[:count]]
    return [
        {"input_ids": row, "loss_mask": torch.ones_like(row, dtype=torch.bool), "key": (0, 0, i)}
        for i, row in enumerate(ids)
    ]


def test_rows_hold_what_fits():
    lengths = [9, 14, 3, 20, 11, 2, 17, 40]
    rows = shared_rows(lengths, 25)
    assert sorted(index for row in rows for index in row) == list(range(8))
    assert all(sum(lengths[i] for i in row) <= 25 or len(row) == 1 for row in rows)
    assert len(rows) == 5  # 40 alone, and 76 tokens in four rows


@pytest.mark.parametrize("first_slot", [0, 1])
@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_rows_of_their_own(family, sliding, first_slot):
    """Of the target's features, the masks, RoPE positions, anchors and labels, none crosses the end of a sample."""
    target, drafter = tiny_pair(family, sliding=sliding)
    drafter.config.sample_from_anchor = first_slot == 0
    objective = DFlashObjective(drafter, target)
    found = []
    for pack_length in (None, 25):
        batch = AnchorCollator(5, 6, MASK_TOKEN, first_slot, pack_length)(samples())
        losses, counts, correct = objective(drafter, batch, *objective.of_target(batch))
        drafter.zero_grad()
        (losses.sum() / objective.divisor(batch)).backward()
        gradient = torch.cat([p.grad.flatten() for p in drafter.parameters()])
        per_block = losses.detach().sum(dim=-1)[batch["keep"]].sort().values
        found.append((per_block, int(counts.sum()), batch["limits"].sum(), gradient))
        assert batch["keep"].sum() == sum(min(5, len(s["input_ids"]) - 1) for s in samples())  # anchors by sample
    assert found[0][1:3] == found[1][1:3]
    for ours, theirs in ((found[0][0], found[1][0]), (found[0][3], found[1][3])):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_target_that_lets_samples_see_each_other_is_refused(monkeypatch):
    target, drafter = tiny_pair("llama")
    whole = type(target)._run_whole
    monkeypatch.setattr(type(target), "_run_whole", lambda self, ids, positions=None: whole(self, ids))
    batch = AnchorCollator(5, 6, MASK_TOKEN, pack_length=25)(samples())
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot take several sequences in a row"):
        DFlashObjective(drafter, target).of_target(batch)


def test_a_run_with_shared_rows(tmp_path):
    """Its held-out loss is that of rows of their own."""
    losses = []
    for pack_length in (None, 90):
        target, drafter = tiny_pair("llama")
        recipe = Recipe(steps=1, batch_size=4, anchors=5, learning_rate=1e-9, pack_length=pack_length)
        log = train_drafter(drafter, target, Cycles(), tmp_path / str(pack_length), recipe, held_out=Cycles(5))
        losses.append(log[-2]["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
