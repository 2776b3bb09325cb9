"""The losses of uniform-state denoising against the same written out over full logits."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from dflash_ext import reference
from dflash_ext.data.uniform import UniformCollator
from dflash_ext.models import UniformAdaptation
from dflash_ext.train.objectives import UniformObjective
from python_tests.models.test_adaptation import target_of
from python_tests.tiny import MASK_TOKEN, VOCAB

ROWS, LENGTH = 4, 24
PATTERNS = {"prefix_block": {}, "block_causal": {"block_size": 4}}


def batch_of(block_size=None, **options):
    ids = torch.randint(3, MASK_TOKEN, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    samples = [{"input_ids": row, "starts": torch.tensor([0, 9]), "key": (0, 0, i)} for i, row in enumerate(ids)]
    return UniformCollator(block_size=block_size, vocab_size=VOCAB, **options)(samples)


def adaptation_of(family="gemma3", **options):
    """One whose adapter and self-conditioning change something."""
    adaptation = UniformAdaptation.for_target(target_of(family), mask_id=None, rank=4, **options)
    generator = torch.Generator().manual_seed(3)
    for parameter in (*adaptation.adapter.lora_b, adaptation.self_conditioning.down.weight):
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return adaptation


def logits(adaptation, states):
    return (adaptation.target.head @ states.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_all_tokens_of_blocks_count_behind_what_the_first_pass_expects(pattern):
    size = PATTERNS[pattern].get("block_size")
    adaptation, batch = adaptation_of(pattern=pattern, **PATTERNS[pattern]), batch_of(size)
    objective = UniformObjective(adaptation)
    result = objective(batch)
    with torch.no_grad():
        inputs = adaptation.inputs(batch)
        first = adaptation.conditioned(None, *inputs)
        table = adaptation.target.model.get_input_embeddings().weight
        soft = reference.soft_embedding(logits(adaptation, first).flatten(0, 1), table).view_as(first)
        soft *= adaptation.target.embedding_scale
        soft[:, LENGTH:] = 0
        soft[:, :LENGTH] *= (batch["hidden"] & batch["conditioned"][:, None]).unsqueeze(-1)
        second = adaptation.conditioned(soft, *inputs)[:, :LENGTH]
    want = cross_entropy(logits(adaptation, second).transpose(1, 2), batch["input_ids"], reduction="none")
    torch.testing.assert_close(result.losses, want * batch["weights"], atol=1e-4, rtol=1e-4)
    assert torch.equal(result.counts, batch["hidden"])
    assert batch["conditioned"].any() and not batch["conditioned"].all()
    result.losses.sum().backward()
    own = dict(adaptation.self_conditioning.named_parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in own.values())


def test_random_tokens_are_read_and_right_ones_are_not():
    """Of the noised tokens; the right copy behind them is as it was."""
    adaptation, batch = adaptation_of(pattern="block_causal", block_size=4), batch_of(4)
    ids, hidden, *_ = adaptation.inputs(batch)
    assert torch.equal(ids[:, :LENGTH], batch["input_ids"].where(~batch["noised"], batch["noise"]))
    assert torch.equal(ids[:, LENGTH:], batch["input_ids"]) and not hidden.any()
    assert (batch["noised"] & ~batch["hidden"]).sum() == 0


def test_a_new_adaptation_reads_the_bases_own_embeddings():
    adaptation = UniformAdaptation.for_target(target_of("gemma3"), mask_id=None, rank=4)
    inputs = adaptation.inputs(batch_of())
    soft = torch.randn(ROWS, LENGTH, adaptation.target.hidden_size)
    with torch.no_grad():
        torch.testing.assert_close(adaptation.conditioned(soft, *inputs), adaptation.conditioned(None, *inputs))


def test_next_tokens_of_the_prefix_count_beside_them():
    adaptation, batch = adaptation_of(), batch_of()
    plain, with_ar = (UniformObjective(adaptation, ar_weight=weight)(batch).losses for weight in (0.0, 0.5))
    assert ((with_ar - plain) > 0).any(1).all()
    assert not (with_ar - plain)[batch["hidden"]].any()


def test_noise_follows_from_the_key_and_covers_all_shares():
    first, again = batch_of(), batch_of()
    assert all(torch.equal(first[name], again[name]) for name in first)
    ids = torch.randint(3, MASK_TOKEN, (200, 40), generator=torch.Generator().manual_seed(0))
    samples = [{"input_ids": row, "starts": torch.tensor([0]), "key": (0, 1, i)} for i, row in enumerate(ids)]
    many = UniformCollator(vocab_size=VOCAB)(samples)
    shares = many["noised"].sum(1) / many["hidden"].sum(1)
    assert shares.min() < 0.1 and shares.max() > 0.9 and 0.4 < shares.mean() < 0.6
    assert 0.35 < many["conditioned"].float().mean() < 0.65
    assert many["noise"].unique().numel() == VOCAB


def test_early_tokens_may_weigh_more():
    batch = batch_of(4, decay=2.0)
    row = batch["weights"][0]
    start = int(batch["blocks"][0, 9])
    torch.testing.assert_close(row[start : start + 6], torch.exp(-torch.tensor([0.0, 1, 2, 3, 0, 1]) / 2))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(vocab_size=0), "random tokens need a vocabulary"),
        (dict(complementary=True), "all tokens of a block count"),
        (dict(inverse_rate=True), "all tokens of a block count"),
        (dict(decay=0.0), "decay is 0.0"),
    ],
)
def test_collators_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        UniformCollator(**{"vocab_size": VOCAB} | options)
