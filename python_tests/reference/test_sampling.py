"""The definitions of filters and draws against rules written out row by row."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_ext import reference

from . import randn

FILTERS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        "top_k": st.sampled_from([None, 0, 1, 2, 3, 9]),
        "top_p": st.sampled_from([None, 0.0, 0.3, 0.6, 0.95, 1.0]),
        "min_p": st.sampled_from([None, 0.0, 0.1, 0.5, 1.0]),
    }
)
# Few distinct values, so that ties are common; -9 stands for -inf.
LOGITS = st.lists(st.sampled_from([-9, -2, -1, 0, 1, 2]), min_size=6, max_size=6).filter(lambda x: max(x) > -9)


def filtered(logits, temperature, top_k, top_p, min_p):
    """The kept tokens of one row and their probabilities, from the rules."""
    if temperature == 0:
        return {logits.index(max(logits)): 1.0}
    mass = {i: math.exp(x / temperature) for i, x in enumerate(logits) if x > -math.inf}
    if top_k:
        kth = sorted(mass.values(), reverse=True)[: max(top_k, 1)][-1]
        mass = {i: m for i, m in mass.items() if m >= kth}
    if top_p is not None and top_p < 1:
        total, best = sum(mass.values()), max(mass.values())
        above = {i: sum(other for other in mass.values() if other > m) / total for i, m in mass.items()}
        mass = {i: m for i, m in mass.items() if above[i] < top_p or m == best}
    if min_p:
        best = max(mass.values())
        mass = {i: m for i, m in mass.items() if m >= min_p * best * (1 - 1e-12)}
    return {i: m / sum(mass.values()) for i, m in mass.items()}


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(LOGITS, FILTERS), min_size=1, max_size=3), by_row=st.booleans())
def test_filters(rows, by_row):
    logits = torch.tensor([row for row, _ in rows], dtype=torch.float64)
    logits[logits == -9] = -math.inf
    if by_row:  # None, for off, has no place in a tensor
        off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
        given_filters = {
            name: torch.tensor([off[name] if f[name] is None else f[name] for _, f in rows])
            for name in ("temperature", "top_k", "top_p", "min_p")
        }
        wanted = [filtered(row, **f) for row, (_, f) in zip(logits.tolist(), rows, strict=True)]
    else:
        given_filters = rows[0][1]
        wanted = [filtered(row, **given_filters) for row in logits.tolist()]
    z = reference.filter_logits(logits, **given_filters)
    for row, want in zip(z, wanted, strict=True):
        assert set((row > -math.inf).nonzero().flatten().tolist()) == set(want)
        torch.testing.assert_close(
            row.softmax(-1)[list(want)],
            torch.tensor(list(want.values()), dtype=torch.float64),
            atol=1e-6,
            rtol=1e-6,
        )


def test_a_sample_visits_every_kept_token_as_often_as_it_should():
    logits = randn(1, 12) * 2
    options = {"temperature": 0.8, "top_k": 8, "top_p": 0.9}
    count = 2000
    uniform = (torch.arange(count) + 0.5) / count
    drawn = reference.sample(logits.expand(count, -1), uniform, **options)
    q = reference.filter_logits(logits, **options).softmax(-1)[0]
    shares = drawn.token.bincount(minlength=12) / count
    assert (shares - q).abs().max() <= 1 / count
    assert (drawn.token.diff() >= 0).all()  # vocabulary order


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24, 1 - 2**-53, 1.0])
def test_a_sample_at_the_ends_of_the_unit_interval_is_a_kept_token(uniform):
    logits = randn(64, 33, dtype=torch.float32)
    logits[:, [0, -1]] = -math.inf
    options = {"top_k": 5, "top_p": 0.99}
    token = reference.sample(logits, torch.full((64,), uniform, dtype=torch.float64), **options).token
    kept = reference.filter_logits(logits, **options) > -math.inf
    indices = torch.arange(33).expand_as(kept).where(kept, -1 if uniform else 99)
    assert torch.equal(token, indices.amax(-1) if uniform else indices.amin(-1))


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_a_sample_measures_the_distribution_before_the_filters_and_describes_the_one_after(temperature):
    logits = randn(5, 9)
    logits[0, 2] = -math.inf
    options = {"temperature": temperature, "top_k": 4, "min_p": 0.05}
    uniform = torch.linspace(0, 0.99, 5)
    drawn, entropy = reference.sample(logits, uniform, **options, return_filtered_entropy=True)
    z = logits / (temperature or 1.0)
    rows = z.softmax(-1)
    torch.testing.assert_close(drawn.prob, rows.gather(1, drawn.token[:, None])[:, 0])
    torch.testing.assert_close(drawn.logprob, drawn.prob.log())
    torch.testing.assert_close(drawn.entropy, -(rows * rows.clamp(min=1e-300).log()).sum(-1))
    ordered = rows.sort(-1, descending=True)
    torch.testing.assert_close(drawn.max_prob, ordered.values[:, 0])
    torch.testing.assert_close(drawn.margin, ordered.values[:, 0] - ordered.values[:, 1])
    assert torch.equal(drawn.argmax, ordered.indices[:, 0])
    q = torch.where(z >= drawn.pivot[:, None], (z - drawn.normaliser[:, None]).exp(), 0.0)
    torch.testing.assert_close(q, reference.filter_logits(logits, **options).softmax(-1))
    torch.testing.assert_close(entropy, torch.special.entr(q).sum(-1))
    if temperature == 0:
        assert torch.equal(drawn.token, drawn.argmax)
