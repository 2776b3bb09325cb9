"""Samples that share rows give what they give alone."""

from dataclasses import replace

import pytest
import torch

from dflash_ext.models import load_drafter
from dflash_ext.train import AnchorCollator, HeldOutPrompts, Recipe, train_drafter
from dflash_ext.train.collator import shared_rows
from dflash_ext.train.objectives import DFlashObjective
from python_tests.tiny import FAMILIES, MASK_TOKEN, random_prompts, tiny_pair
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
    assert (
        max(map(len, rows)) == 2
    )  # seven samples in four rows: none needs padding for more blocks than two samples have
    assert shared_rows([40, 30], 25) == [[0], [1]]


@pytest.mark.parametrize("pack_length", [None, 25])
def test_rows_are_padded_to_a_multiple_of_a_number_of_tokens(pack_length):
    collator = AnchorCollator(3, 4, MASK_TOKEN, pack_length=pack_length)
    plain, padded = collator(samples()), replace(collator, multiple_of=16)(samples())
    assert padded["input_ids"].shape[1] == 32 and plain["input_ids"].shape[1] % 16
    for name, value in plain.items():
        if value.shape != padded[name].shape:
            assert not padded[name][:, value.shape[1] :].any()
        assert torch.equal(padded[name][:, : value.shape[1]], value), name


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
        batch = AnchorCollator(5, 6, MASK_TOKEN, first_slot, pack_length=pack_length)(samples())
        losses, counts, correct = objective(batch, *objective.of_target(batch))
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


@pytest.mark.parametrize("first_slot", [0, 1])
def test_some_blocks_show_their_leading_tokens(first_slot):
    """As a later step of denoising sees them: the shown tokens are right, and what is left is drafted from them."""
    target, drafter = tiny_pair("llama")
    drafter.config.sample_from_anchor = first_slot == 0
    objective = DFlashObjective(drafter, target, gamma=3.0)
    batch = AnchorCollator(8, 6, MASK_TOKEN, first_slot, noise_ratio=0.4)(samples())
    plain = AnchorCollator(8, 6, MASK_TOKEN, first_slot)(samples())
    assert torch.equal(batch["anchors"], plain["anchors"])  # the draws of one thing leave those of another alone
    losses, counts, _ = objective(batch, *objective.of_target(batch))
    shown = batch["revealed"]
    assert 0.2 < (shown[batch["keep"]] > 0).float().mean() < 0.8
    for row, sample in enumerate(samples()):
        ids, features = sample["input_ids"], target.features(sample["input_ids"][None])
        for block in torch.nonzero(batch["keep"][row])[:, 0].tolist():
            anchor, count = int(batch["anchors"][row, block]), int(shown[row, block])
            noise = torch.tensor([[*ids[anchor : anchor + 1 + count].tolist(), *[MASK_TOKEN] * (5 - count)]])
            assert torch.equal(batch["noise_ids"][row, block], noise[0])
            left = counts[row, block]
            assert not left[:count].any() and left[count]
            assert torch.equal(left[count:], plain["counts"][row, block, first_slot:][count:])
            assert (batch["limits"][row, block] == 0) == (count > 0)
            hidden = drafter(
                noise_embeds=drafter.embed(target, noise),
                context_hidden_states=features[:, :anchor],
                position_ids=torch.arange(anchor + 6)[None],
            ).last_hidden_state
            nll = -drafter.logits(target, hidden)[0, first_slot + count].log_softmax(-1)[ids[anchor + 1 + count]]
            weight = float(torch.exp(torch.tensor(-count / 3.0)))
            torch.testing.assert_close(losses[row, block, count], weight * nll, rtol=1e-3, atol=1e-5)


def test_a_curriculum_of_block_sizes():
    collate = AnchorCollator(5, 6, MASK_TOKEN, block_sizes=(3, 6), steps=10)
    for step, size in ((0, 3), (4, 3), (5, 6), (9, 6), ("held out", 6)):
        batch = collate([sample | {"key": (0, step, 0)} for sample in samples()])
        assert batch["counts"].any(dim=(0, 1)).tolist() == [0 < slot < size for slot in range(6)]
        assert batch["limits"].max() == size


def test_random_tokens_stand_in_the_place_of_mask_tokens():
    """Alone, or among right ones. Every slot counts, and a block that shows right tokens says nothing of tau."""
    collator = AnchorCollator(30, 6, MASK_TOKEN, random_tokens=1_000_000)
    masked, whole = (each(samples()) for each in (replace(collator, random_tokens=0), collator))
    part = replace(collator, noise_ratio=0.4)(samples())
    kept, counts = whole["keep"], masked["counts"]
    right = whole["labels"]
    for batch in (whole, part):
        assert torch.equal(batch["noise_ids"][..., 0], masked["noise_ids"][..., 0])
        assert torch.equal(batch["counts"], counts) and torch.equal(batch["labels"], right)
    assert not (whole["noise_ids"] == right)[counts].any() and torch.equal(whole["limits"], masked["limits"])
    shows = ((part["noise_ids"] == right) & counts).any(-1)[kept]
    assert 0.3 < shows.float().mean() < 0.7
    assert torch.equal(part["limits"][kept], whole["limits"][kept].masked_fill(shows, 0))


def test_a_run_with_uniform_noise(tmp_path):
    target, drafter = tiny_pair("llama")
    drafter.config.noise = "uniform"
    recipe = Recipe(steps=4, batch_size=4, anchors=5, noise_ratio=0.5, log_every=1)
    prompts = HeldOutPrompts(random_prompts(5, 7), max_new_tokens=8, denoising_steps=(1, 2, 3))
    log = train_drafter(drafter, target, Cycles(), tmp_path, recipe, held_out=Cycles(5), prompts=prompts)
    assert {"eval_tau", "eval_tau_2_steps", "eval_tau_3_steps"} <= log[-2].keys()
    assert load_drafter(tmp_path).config.noise == "uniform"


def test_a_run_for_several_steps_of_denoising(tmp_path):
    target, drafter = tiny_pair("llama")
    recipe = Recipe(steps=4, batch_size=4, anchors=5, noise_ratio=0.5, block_sizes=(3, 6), log_every=1)
    prompts = HeldOutPrompts(random_prompts(5, 7), max_new_tokens=8, denoising_steps=(1, 2, 3))
    options = dict(held_out=Cycles(5), prompts=prompts)
    log = train_drafter(drafter, target, Cycles(), tmp_path, recipe, **options)
    assert {"eval_tau", "eval_tau_2_steps", "eval_tau_3_steps"} <= log[-2].keys()
    with pytest.raises(ValueError, match="block sizes .4, 9.: the drafter's blocks have 6 slots"):
        train_drafter(drafter, target, Cycles(), tmp_path, replace(recipe, block_sizes=(4, 9)))


def test_drafted_slots_are_revealed_one_by_one():
    """A revealed slot shows its right token and does not count. Every slot is drawn for itself."""
    options = dict(num_anchors=30, block_size=6, mask_token_id=MASK_TOKEN)
    whole, part = (AnchorCollator(**options, slot_noise=noise)(samples()) for noise in (1.0, 0.6))
    assert torch.equal(whole["labels"], part["labels"]) and torch.equal(whole["anchors"], part["anchors"])
    is_masked = part["noise_ids"] == MASK_TOKEN
    revealed = whole["counts"] & ~is_masked
    assert torch.equal(part["counts"], whole["counts"] & is_masked)
    assert torch.equal(part["noise_ids"][revealed], part["labels"][revealed])
    shares = revealed.sum(dim=(0, 1))[1:] / whole["counts"].sum(dim=(0, 1))[1:]
    assert (shares - 0.4).abs().max() < 0.2
    assert (revealed[..., 1:].int().diff(dim=-1) > 0).any(), "a slot is revealed behind one that is not"
    assert torch.equal(part["limits"], whole["limits"].masked_fill(revealed.any(dim=-1), 0))


@pytest.mark.parametrize("ratio", [0.5, (0.2, 0.8)])
def test_the_context_has_no_anchor(ratio):
    """The share is of each sample, and if it is drawn, each sample has another one."""
    ids = torch.arange(3, 43)
    rows = [{"input_ids": ids, "loss_mask": torch.ones(40, dtype=torch.bool), "key": (0, 0, i)} for i in range(50)]
    collator = AnchorCollator(40, 6, MASK_TOKEN, context_ratio=ratio)
    batch = collator(rows)
    first = torch.where(batch["keep"], batch["anchors"], 99).min(dim=1).values
    assert batch["counts"].any()
    if ratio == 0.5:
        assert (first == 20).all()
    else:
        assert 8 <= first.min() < 12 and 28 < first.max() <= 32 and len(first.unique()) > 15
    again = collator(rows[7:8])
    assert torch.equal(again["anchors"][0], batch["anchors"][7]), "the draw follows from the key alone"


def test_fixed_anchors_stand_side_by_side():
    mask = torch.ones(40, dtype=torch.bool)
    mask[:9] = False
    sample = {"input_ids": torch.arange(3, 43), "loss_mask": mask}
    batch = AnchorCollator(4, 6, MASK_TOKEN, fixed=True)([sample])
    assert batch["anchors"].tolist() == [[9, 15, 21, 27]] and batch["keep"].all()
    batch = AnchorCollator(9, 6, MASK_TOKEN, fixed=True, context_ratio=0.5)([sample])
    assert batch["anchors"][batch["keep"]].tolist() == [20, 26, 32, 38]
