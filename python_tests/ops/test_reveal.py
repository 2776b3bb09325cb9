"""reveal against its definition on random canvases."""

import math

import pytest
import torch

from dflash_ext import reference, reveal, reveal_count

LIMITS = {
    "count": [0, 1, 3, 1000],
    "threshold": [0.0, 0.5, 0.9, 2.0],
    "at_least": [0.0, 0.5, 0.875, 2.0],
    "factor": [0.0, 0.3, 1.0, 5.0],
    "entropy_bound": [0.0, 0.25, 2.0, 1e9],
}


def canvas(rows, length, dtype=torch.float32, seed=0):
    """Scores and entropies with many ties, a mask that differs by row, full in the first row and empty in the last."""
    generator = torch.Generator().manual_seed(seed)

    def numbers():
        x = torch.rand(rows, length, generator=generator)
        x[: rows // 2] = (x[: rows // 2] * 8).round() / 8
        return x.to(dtype)

    masked = torch.rand(rows, length, generator=generator) < torch.linspace(1, 0, rows)[:, None]
    return numbers(), masked, numbers()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", LIMITS)
def test_matches_the_definition(rule, dtype, device):
    for length in (0, 1, 2, 7, 64, 257):
        scores, masked, entropy = (x.to(device) for x in canvas(8, length, dtype, length))
        by_row = torch.tensor(LIMITS[rule] * 2, device=device)
        for order in (scores, -entropy, -scores.log(), None):
            if order is None and rule in ("threshold", "at_least", "factor"):
                continue
            for limit in (*LIMITS[rule], by_row, by_row[1], torch.full_like(by_row, math.nan, dtype=torch.float32)):
                got = reveal(order, masked, entropy=entropy, **{rule: limit})
                want = reference.reveal(order, masked, entropy=entropy, **{rule: limit})
                assert torch.equal(got, want), (rule, limit, length)


def test_every_rule_takes_the_best_position_first():
    scores = torch.tensor([[0.1, 0.7, 0.7, 0.9, 0.2]])
    masked = torch.tensor([[True, True, True, False, True]])
    for limit in (
        {"count": 1},
        {"threshold": 0.95},
        {"at_least": 0.95},
        {"factor": 0.01},
        {"entropy_bound": 0.0, "entropy": scores},
    ):
        assert reveal(scores, masked, **limit).tolist() == [[False, True, False, False, False]]
    assert reveal(None, masked, count=2).tolist() == [[True, True, False, False, False]]
    assert reveal(torch.full((1, 5), -math.inf), masked, threshold=0.5).tolist() == [[True, False, False, False, False]]


def test_canvases_of_any_strides_and_no_rows():
    scores, masked, entropy = canvas(6, 50)
    args = {"entropy_bound": 1.0}
    want = reveal(scores, masked, entropy=entropy, **args)
    turned = [x.T.contiguous().T for x in (scores, masked, entropy)]
    assert torch.equal(reveal(turned[0], turned[1], entropy=turned[2], **args), want)
    assert reveal(None, masked[:0], count=3).shape == (0, 50)


def test_registration():
    scores, masked, entropy = canvas(3, 20)
    operator = torch.ops.dflash_ext.reveal
    torch.library.opcheck(operator, (scores, masked, None, 1, 0.5, None))
    torch.library.opcheck(operator, (scores, masked, None, 4, 0.5, None))
    torch.library.opcheck(operator, (None, masked, entropy, 3, 0.0, torch.tensor([0.5, 1.0, 2.0])))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(scores, masked, count):
        return reveal(scores, masked, count=count)

    count = torch.tensor([1, 2, 3])
    assert torch.equal(compiled(scores, masked, count), reveal(scores, masked, count=count))


def test_reveal_takes_nan_scores_last_and_nan_entropies_never(device):
    nan = math.nan
    scores = torch.tensor([[0.3, nan, 0.9, 0.5, nan]], device=device)
    masked, order = scores != 7, [2, 3, 0, 1, 4]
    for function in (reveal, reference.reveal):
        for count in range(6):
            taken = function(scores, masked, count=count).nonzero()[:, 1].tolist()
            assert taken == sorted(order[:count])
        assert function(scores, masked, threshold=0.4).tolist() == [[False, False, True, True, False]]
        assert function(scores, masked, factor=100.0).tolist() == [[True, False, True, True, False]]
        taken = function(None, masked, entropy_bound=1e9, entropy=scores)
        assert taken.tolist() == [[True, False, False, False, False]]
        hopeless = torch.full_like(scores, nan)
        assert function(hopeless, masked, threshold=0.4).tolist() == [[True, False, False, False, False]]


def test_reveal_and_its_counts_on_the_device(device):
    masked = torch.tensor([[True, True, False, True]], device=device)
    scores = torch.tensor([[0.2, 0.9, 1.0, 0.5]], device=device)
    count = reveal_count(masked.sum(-1), 0, 2)
    assert reveal(scores, masked, count=count).tolist() == [[False, True, False, True]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reveal(None, torch.ones(2, 3), count=1), "masked is torch.float32"),
        (lambda: reveal(torch.ones(3), torch.ones(2, 3) > 0, count=1), r"scores is torch.float32 \[3\]"),
        (lambda: reveal(None, torch.ones(2, 3) > 0, count=-1), "count is -1"),
        (lambda: reveal_count(torch.tensor([7]), 0.5, 2), "step is 0.5; 0 to 1 are the steps"),
    ],
)
def test_refusals_name_the_value(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_the_number_of_positions_needs_a_tensor_of_totals():
    with pytest.raises(TypeError, match=r"^reveal_count: total is 7 \(int\); a tensor is needed$"):
        reveal_count(7, 0, 2)


def test_at_least_the_threshold_takes_what_equals_it(device):
    """Fast-dLLM drops what is below its threshold, SDAR takes what is above."""
    scores = torch.tensor([[0.9, 0.5, 0.75, 0.7]], device=device)
    masked = scores > 0
    for function in (reveal, reference.reveal):
        assert function(scores, masked, threshold=0.75).tolist() == [[True, False, False, False]]
        assert function(scores, masked, at_least=0.75).tolist() == [[True, False, True, False]]
        with pytest.raises(ValueError, match="at_least needs scores"):
            function(None, masked, at_least=0.5)
