"""The check that decoding is lossless passes where it is and finds where it is not."""

import pytest
import torch

from dflash_ext.decode import Completion, Decoded, cycle
from dflash_ext.eval import lossless
from dflash_ext.eval.lossless import LARGEST_Z, greedy_divergences, sampling_z
from dflash_ext.reference import Verification
from python_tests.decode.test_speculative import small_pair
from python_tests.tiny import random_prompts, tiny_pair

PROMPTS = random_prompts(3, 9, 5)


def believing(draft_tokens, target_logits, **options):
    """A verification that accepts every draft."""
    accepted = options["draft_lens"].clone()
    return Verification(accepted, target_logits.argmax(-1).gather(1, accepted[:, None])[:, 0])


def test_greedy_output_is_compared_token_by_token(monkeypatch):
    target, drafter = tiny_pair("qwen3")
    assert greedy_divergences(target, drafter, PROMPTS, max_new_tokens=12) == []
    assert greedy_divergences(target, drafter, PROMPTS, max_new_tokens=12, block_size=3, batch_size=1) == []
    monkeypatch.setattr(cycle, "verify", believing)
    found = greedy_divergences(target, drafter, PROMPTS, max_new_tokens=12)
    assert [each.prompt for each in found] == [0, 1, 2]
    for each in found:
        ids = torch.tensor([PROMPTS[each.prompt]])
        own = target.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        own = own[0, ids.shape[1] :].tolist()
        assert own[each.position] == each.plain != each.speculative
        logp = target.model(torch.tensor([PROMPTS[each.prompt] + own[: each.position]])).logits[0, -1].log_softmax(-1)
        assert each.regret == pytest.approx((logp.max() - logp[each.speculative]).item(), abs=1e-4)
        assert each.regret > 0.01


def test_sampled_output_is_compared_with_the_targets_distribution(monkeypatch):
    target, drafter = small_pair(0.7)
    options = dict(draws=3000, temperature=1.0, batch_size=1000)
    assert sampling_z(target, drafter, [1, 3, 0], **options) < LARGEST_Z
    monkeypatch.setattr(cycle, "verify", believing)
    assert sampling_z(target, drafter, [1, 3, 0], **options) > 2 * LARGEST_Z


def test_tokens_that_are_hardly_expected_are_pooled(monkeypatch):
    """Of 100 draws, 60, 39 and 1 are expected, and 45, 25 and 30 come: the third counts with the second."""
    second = [0] * 45 + [1] * 25 + [2] * 30
    drawn = Decoded([Completion(tokens=[7, token]) for token in second], 3)
    monkeypatch.setattr(lossless, "decode", lambda *_, **__: drawn)
    monkeypatch.setattr(lossless, "_log_probabilities", lambda *_: torch.tensor([[0.6, 0.39, 0.01]]).double().log())
    statistic = 15**2 / 60 + 15**2 / 40
    expected = (statistic ** (1 / 3) - (1 - 2 / 9)) / (2 / 9) ** 0.5
    assert sampling_z(None, None, [3], draws=100, temperature=1.0) == pytest.approx(expected)
    drawn.completions[:] = drawn.completions[:5]
    assert sampling_z(None, None, [3], draws=5, temperature=1.0) is None
