import pytest
import torch

from dflash_ext.decode import Completion, Decoded
from dflash_ext.eval import tau_difference


def runs(*taus: list[float]) -> list[Decoded]:
    return [Decoded([Completion(committed=[tau]) for tau in each], 15) for each in taus]


def test_the_interval_covers_the_true_difference_as_often_as_it_says():
    """Prompts differ much more than the drafters do, which paired differences cancel."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(60):
        prompts = 3 + 2 * torch.randn(40, generator=generator)
        gain = 0.2 + 0.3 * torch.randn(40, generator=generator)
        found = tau_difference(*runs(prompts.tolist(), (prompts + gain).tolist()), seed=trial)
        covered += found.low <= 0.2 <= found.high
        assert found.low < found.mean < found.high and found.high - found.low < 0.4
    assert covered >= 51  # 57 are expected


def test_words():
    same, better = runs([1.0, 2.0, 3.0], [1.5, 2.6, 3.5])
    assert str(tau_difference(same, same)) == "tau differs by +0.000 (95% interval +0.000 to +0.000)"
    assert str(tau_difference(same, better)).startswith("tau differs by +0.533 (95% interval +0.500 to +0.600, which")
    assert tau_difference(better, same).mean == pytest.approx(-1.6 / 3)


def test_other_prompts_are_refused():
    with pytest.raises(ValueError, match="runs over 2 and 1 prompts are no pairs"):
        tau_difference(*runs([1.0, 2.0], [1.0]))
