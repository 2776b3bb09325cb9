"""The definition of reveal against rules written out row by row."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_ext import reference


def revealed(scores, masked, entropy, rule, limit):
    """The positions of one row, from the rules."""
    order = sorted((i for i, m in enumerate(masked) if m), key=lambda i: (-scores[i], i))
    if rule == "count":
        return set(order[:limit])
    if rule in ("threshold", "at_least"):
        return set(order[:1]) | {i for i in order if scores[i] > limit or (rule == "at_least" and scores[i] == limit)}
    taken = []
    for n, i in enumerate(order, start=1):
        if rule == "factor":
            fits = scores[i] >= 1 - limit / (n + 1)
        else:
            hs = [entropy[j] for j in (*taken, i)]
            fits = sum(hs) - max(hs) <= limit
        if taken and not fits:
            break
        taken.append(i)
    return set(taken)


# Multiples of 1/8 are exact, so that sums and ties are too.
EIGHTHS = st.lists(st.integers(0, 8).map(lambda x: x / 8), min_size=5, max_size=5)
RULES = st.one_of(
    st.tuples(st.just("count"), st.integers(0, 6)),
    st.tuples(st.just("threshold"), st.sampled_from([0.0, 0.5, 0.75])),
    st.tuples(st.just("at_least"), st.sampled_from([0.0, 0.5, 0.75])),
    st.tuples(st.just("factor"), st.sampled_from([0.25, 0.5, 1.0, 2.0])),
    st.tuples(st.just("entropy_bound"), st.sampled_from([0.0, 0.25, 0.5, 1.0])),
)


@settings(max_examples=300, deadline=None)
@given(
    scores=st.lists(EIGHTHS, min_size=2, max_size=2),
    entropy=st.lists(EIGHTHS, min_size=2, max_size=2),
    masked=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=2, max_size=2),
    rule=RULES,
    as_tensor=st.booleans(),
)
def test_reveal_follows_the_rules(scores, entropy, masked, rule, as_tensor):
    name, limit = rule
    got = reference.reveal(
        torch.tensor(scores),
        torch.tensor(masked),
        entropy=torch.tensor(entropy),
        **{name: torch.tensor([limit] * 2) if as_tensor else limit},
    )
    for b in range(2):
        want = revealed(scores[b], masked[b], entropy[b], name, limit)
        assert set(got[b].nonzero().flatten().tolist()) == want


@settings(max_examples=40, deadline=None)
@given(entropy=EIGHTHS, bound=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_entropy_bounded_reveal_of_a_full_canvas_is_the_uniform_state_rule(entropy, bound):
    h = torch.tensor([entropy], dtype=torch.float64)
    got = reference.reveal(-h, torch.ones(1, 5, dtype=torch.bool), entropy=h, entropy_bound=bound)
    ascending, order = h.sort(stable=True)
    accepted = ascending.cumsum(-1) - ascending <= bound
    assert torch.equal(got, torch.zeros_like(accepted).scatter(1, order, accepted))


def test_reveal_left_to_right_and_with_a_hopeless_score():
    masked = torch.tensor([[False, True, True, True]])
    assert reference.reveal(None, masked, count=2).tolist() == [[False, True, True, False]]
    scores = torch.tensor([[0.5, -math.inf, -math.inf, -math.inf]])
    assert reference.reveal(scores, masked, threshold=0.9).tolist() == [[False, True, False, False]]
    assert not reference.reveal(scores, torch.zeros_like(masked), threshold=0.1).any()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 3, 8, 13, 20])
def test_reveal_counts_add_up(schedule, steps):
    total = torch.tensor([0, 1, 7, 8, 33])
    counts = torch.stack([reference.reveal_count(total, s, steps, schedule=schedule) for s in range(steps)])
    assert torch.equal(counts.sum(0), total) and (counts >= 0).all() and counts.dtype == total.dtype
    for shape in ((), (5,)):
        in_tensors = [
            reference.reveal_count(total, torch.full(shape, s), steps, schedule=schedule) for s in range(-1, steps + 1)
        ]
        assert torch.equal(torch.stack(in_tensors[1:-1]), counts) and in_tensors[1].dtype == total.dtype
        assert not in_tensors[0].any() and not in_tensors[-1].any()
    if schedule == "linear":
        assert (counts.amax(0) - counts.amin(0) <= 1).all() and (counts.diff(dim=0) <= 0).all()
    else:
        left = total - counts.cumsum(0)
        fraction = torch.cos(torch.arange(1, steps + 1) * math.pi / (2 * steps))
        assert (left <= fraction[:, None] * total + 1e-5).all()
        assert (left > fraction[:, None] * total - 1 - 1e-5).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: reference.reveal(None, m), "no limit given"),
        (lambda m: reference.reveal(None, m, count=1, factor=0.5), "count, factor given"),
        (lambda m: reference.reveal(None, m, threshold=0.5), "threshold needs scores"),
        (lambda m: reference.reveal(None, m, entropy_bound=0.5), "needs entropy"),
        (lambda m: reference.reveal_count(m.sum(-1), 3, 3), "step is 3"),
        (lambda m: reference.reveal_count(m.sum(-1), 0, 3, schedule="odd"), "'odd'"),
    ],
)
def test_reveal_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(1, 3, dtype=torch.bool))
