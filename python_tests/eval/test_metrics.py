import math

import pytest
import torch

from dflash_ext.eval.metrics import answer_nll, bigram_repetition, distinct, filler_rate, interval, resamples
from dflash_ext.models import Target
from python_tests.tiny import random_prompts, tiny_model


@pytest.mark.parametrize(
    ("text", "rate"), [("", 0), ("abc", 0), ("a, 1", 0.75), (",,,", 1), ("the the", 1 / 7), ("5\t\n x.", 4 / 6)]
)
def test_filler_rate(text, rate):
    assert filler_rate(text) == pytest.approx(rate)


def test_repetition_and_distinct_runs():
    assert bigram_repetition([1, 2, 3, 4]) == 0
    assert bigram_repetition([7] * 11) == pytest.approx(0.9)
    assert bigram_repetition([1, 2, 1, 2, 3]) == pytest.approx(0.25)
    assert bigram_repetition([1]) == bigram_repetition([]) == 0
    assert distinct([[1, 2, 3], [1, 2, 4]], 1) == pytest.approx(4 / 6)
    assert distinct([[1, 2, 3], [1, 2, 4]], 2) == pytest.approx(3 / 4)
    assert distinct([[1], []], 2) == 0


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_likelihood_of_answers(family):
    model = tiny_model(family)
    prompts, answers = random_prompts(3, 9, 1, 5), [*random_prompts(6, 2, 12, seed=1), []]
    found = answer_nll(Target(model), prompts, answers)
    for prompt, answer, nll in zip(prompts, answers, found, strict=True):
        if not answer:
            assert math.isnan(nll)
            continue
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        assert nll == pytest.approx(float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer))), rel=1e-4)


def test_intervals_of_the_bootstrap():
    values = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = resamples(400)
    assert (weights.sum(1) == 400).all() and torch.equal(weights, resamples(400))
    found = interval(float(values.mean()), weights @ values / 400)
    error = float(values.std()) / 20
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.2 * error)
