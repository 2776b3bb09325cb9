import itertools

import pytest
import torch

from dflash_ext.decode import decode
from dflash_ext.train import AnchorCollator
from dflash_ext.train.objectives import DFlashObjective, Losses
from dflash_ext.train.tau import TauOfBlocks, commit_limits
from python_tests.tiny import MASK_TOKEN, tiny_pair


def samples_of(prompts, answers):
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([*prompt, *answer])
        yield {"input_ids": ids, "loss_mask": torch.arange(len(ids)) >= len(prompt)}


def perfect_tau(*answers: int, block_size: int = 6, first_slot: int = 1, anchors: int = 64, cut: bool = False) -> float:
    """The tau of a drafter that is always right, on answers of these lengths."""
    samples = [s | {"cut": cut} for s in samples_of([[5, 6]] * len(answers), [[7] * length for length in answers])]
    batch = AnchorCollator(anchors, block_size, MASK_TOKEN, first_slot)(samples)
    blocks = TauOfBlocks()
    counts = batch["counts"][:, :, first_slot:]
    blocks.add(batch, Losses(counts.float(), counts, torch.ones_like(counts)))
    tokens, cycles = blocks.take()
    return float(tokens / cycles)


@pytest.mark.parametrize("answer", [2, 3, 5])
def test_a_perfect_drafter_on_answers_shorter_than_a_block(answer):
    """Prefill gives the first token, and one cycle all others."""
    assert perfect_tau(answer) == answer - 1


def test_a_perfect_drafter_on_longer_answers():
    assert perfect_tau(7) == 6  # one cycle of five drafted tokens and the bonus token
    assert perfect_tau(8) == 7 / 2
    assert perfect_tau(7, 3) == 8 / 2  # cycles count, not answers
    assert perfect_tau(8, first_slot=0) == 7  # slot 0 drafts, too
    # One cycle is whole. What the second one would commit is unknown where the answer goes on beyond the sequence.
    assert perfect_tau(9, cut=True) == 6


@pytest.mark.parametrize("is_cut", [False, True])
def test_limits_are_their_definition(is_cut):
    mask = torch.rand(5, 20, generator=torch.Generator().manual_seed(3)) < 0.8
    anchors = torch.arange(20).expand(5, -1)
    keep = torch.rand(5, 20, generator=torch.Generator().manual_seed(4)) < 0.8
    limits = commit_limits(mask, anchors, keep, 4, is_cut=is_cut)
    for row, anchor in itertools.product(range(5), range(20)):
        after = mask[row, anchor + 1 : anchor + 6].tolist()
        expected = len(list(itertools.takewhile(bool, after)))
        if not keep[row, anchor] or is_cut and expected == len(after) < 5:
            expected = 0
        assert limits[row, anchor] == expected


@pytest.mark.parametrize("first_slot", [0, 1])
def test_with_all_anchors_it_is_the_tau_of_decoding(first_slot):
    """A random drafter that was trained to be right now and then, on answers of several lengths."""
    torch.manual_seed(0)
    target, drafter = tiny_pair("llama")
    drafter.config.sample_from_anchor = first_slot == 0
    prompts = [[10 + (i + shift) % 7 for i in range(12)] for shift in range(6)]
    lengths = [2, 4, 9, 30, 30, 17]
    answers = [
        decode(target, None, [prompt], max_new_tokens=length).completions[0].tokens
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    collate = AnchorCollator(40, 6, MASK_TOKEN, first_slot)
    batch = collate(list(samples_of(prompts, answers)))
    objective = DFlashObjective(drafter, target, gamma=4.0)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=3e-3)
    features = target.features(batch["input_ids"])
    for _ in range(15):
        losses = objective(batch, features).losses
        optimizer.zero_grad()
        (losses.sum() / objective.divisor(batch)).backward()
        optimizer.step()
    blocks = TauOfBlocks()
    with torch.no_grad():
        blocks.add(batch, objective(batch, features))
    tokens, cycles = blocks.take()
    committed = [
        decode(target, drafter.eval(), [prompt], max_new_tokens=length).completions[0].committed
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    assert (tokens, cycles) == (sum(map(sum, committed)), sum(map(len, committed)))
    assert 1.2 < tokens / cycles < 5  # it is neither always right nor always wrong
