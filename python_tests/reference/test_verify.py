"""The definition of verification against rules written out row by row, and against exact distributions."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_ext import reference

from . import randn


def chi_square_p(counts, probs):
    """p-value of counts under probs, by the Wilson-Hilferty normal approximation."""
    expected = probs * counts.sum()
    assert (counts[expected == 0] == 0).all()
    counts, expected = counts[expected > 0].double(), expected[expected > 0].double()
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = counts.numel() - 1
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


@settings(max_examples=40, deadline=None)
@given(
    target=st.lists(st.integers(0, 2), min_size=8, max_size=8),
    draft=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    lens=st.none() | st.lists(st.integers(0, 3), min_size=2, max_size=2),
    as_tensor=st.booleans(),
)
def test_greedy_verification_keeps_the_longest_equal_prefix(target, draft, lens, as_tensor):
    best, draft = torch.tensor(target).view(2, 4), torch.tensor(draft).view(2, 3)
    logits = F.one_hot(best, 5) * 4.0
    for b, n in enumerate(lens or []):
        draft[b, n:] = -1
    temperature = torch.zeros(2) if as_tensor else 0.0
    uniforms = torch.tensor([[0.0, 0.999, 0.5, 0.3]] * 2) if as_tensor else None
    got = reference.verify(
        draft,
        logits,
        temperature=temperature,
        uniforms=uniforms,
        draft_lens=None if lens is None else torch.tensor(lens),
    )
    for b in range(2):
        accepted = 0
        while accepted < (3 if lens is None else lens[b]) and draft[b, accepted] == best[b, accepted]:
            accepted += 1
        assert got.accepted[b] == accepted and got.next_token[b] == best[b, accepted]


VOCAB, ROWS = 5, 40_000
FIRST, SECOND = randn(VOCAB, seed=3) * 1.5, randn(VOCAB, VOCAB, seed=4) * 1.5  # SECOND: by the token before
DRAFT_FIRST, DRAFT_SECOND = FIRST + randn(VOCAB, seed=5), SECOND.mean(0) + randn(VOCAB, seed=6)


@pytest.mark.parametrize("form", ["logits", "pivot", "point mass", "short"])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 3},
        {"temperature": 1.3, "top_p": 0.8, "min_p": 0.05},
    ],
    ids=str,
)
def test_verified_tokens_are_distributed_as_the_targets(options, form):
    """The joint distribution of two tokens, the second of which depends on the first."""
    generator = torch.Generator().manual_seed(0)
    rand = partial(torch.rand, generator=generator)
    draft_logits = torch.stack((DRAFT_FIRST, DRAFT_SECOND)).expand(ROWS, 2, VOCAB)
    draws = [reference.sample(draft_logits[:, i], rand(ROWS), **options) for i in range(2)]
    draft = torch.stack([drawn.token for drawn in draws], dim=1)
    target = torch.stack((FIRST.expand(ROWS, -1), SECOND[draft[:, 0]], SECOND[draft[:, 1]]), dim=1)
    given_draft = {"draft_logits": draft_logits}
    if form == "pivot":
        given_draft["draft_pivot"] = torch.stack([drawn.pivot for drawn in draws], dim=1)
        given_draft["draft_normaliser"] = torch.stack([drawn.normaliser for drawn in draws], dim=1)
    elif form == "point mass":
        given_draft = {}
    elif form == "short":
        given_draft["draft_lens"] = torch.arange(ROWS) % 3
    got = reference.verify(draft, target, uniforms=rand(ROWS, 3), **given_draft, **options)
    assert 0.1 < got.accepted.double().mean() < 1.9

    first = torch.where(got.accepted > 0, draft[:, 0], got.next_token)
    second = torch.where(got.accepted > 1, draft[:, 1], got.next_token)
    missing = reference.sample(SECOND[first], rand(ROWS), **options).token
    second = torch.where(got.accepted > 0, second, missing)
    p_first = reference.filter_logits(FIRST[None], **options).softmax(-1)[0]
    p_second = reference.filter_logits(SECOND, **options).softmax(-1)
    counts = (first * VOCAB + second).bincount(minlength=VOCAB**2)
    assert chi_square_p(counts, (p_first[:, None] * p_second).flatten()) > 1e-3


def test_verification_mixes_temperatures_and_accepts_a_draft_equal_to_the_target():
    logits = randn(2, 4, 6)
    draft = logits[:, :3].argmax(-1)
    got = reference.verify(
        draft,
        logits,
        draft_logits=logits[:, :3],
        uniforms=torch.full((2, 4), 0.9999),
        temperature=torch.tensor([0.0, 1.0]),
    )
    assert got.accepted.tolist() == [3, 3]
    assert got.next_token[0] == logits[0, 3].argmax()


def test_verification_above_temperature_0_needs_random_numbers():
    with pytest.raises(ValueError, match="needs random numbers"):
        reference.verify(torch.zeros(1, 1).long(), randn(1, 2, 3), temperature=0.5)
