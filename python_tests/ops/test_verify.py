"""verify against its definition for the same random numbers, and its output against the target's distribution."""

import math

import pytest
import torch

from dflash_ext import reference, sample, verify
from dflash_ext.ops.random import VERIFY, uniforms_of

OPTIONS = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 1.0},
    "top-k": {"temperature": 0.8, "top_k": 6},
    "top-p": {"temperature": 1.4, "top_p": 0.85},
    "all": {"temperature": 1.1, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    "by row": {
        "temperature": torch.tensor([0.0, 1.0, 0.5, 0.0, 2.0, 1.2]),
        "top_k": torch.tensor([0, 3, 0, 5, 9, 0]),
        "top_p": torch.tensor([0.5, 1.0, 0.9, 1.0, 0.8, 0.95]),
    },
}
BATCH, DRAFTED = 6, 5
SEED = torch.tensor([9])
DRAFT, TARGET = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 4, 5)


def seed(*values, device="cpu"):
    return torch.tensor(values, device=device)


def logits(*shape, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)


def case(vocab, dtype, form, options, seed):
    """Drafts close enough to the target that all lengths are accepted, and what verify takes beside them."""
    generator = torch.Generator().manual_seed(seed)
    target = 2 * torch.randn(BATCH, DRAFTED + 1, vocab, generator=generator)
    drafter = target[:, :-1] + 0.3 * torch.randn(BATCH, DRAFTED, vocab, generator=generator)
    target[0, 1, ::3] = drafter[1, 0, 1::2] = -math.inf
    target, drafter = target.to(dtype), drafter.to(dtype)
    by_token = {
        name: value.repeat_interleave(DRAFTED) if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }
    drawn = sample(drafter.flatten(0, 1), torch.tensor([seed]), **by_token)
    given = {"uniforms": torch.rand(BATCH, DRAFTED + 1, dtype=torch.float64, generator=generator)}
    if form != "point mass":
        given["draft_logits"] = drafter
    if form == "described":
        given["draft_pivot"] = drawn.pivot.view(BATCH, DRAFTED)
        given["draft_normaliser"] = drawn.normaliser.view(BATCH, DRAFTED)
    return drawn.token.view(BATCH, DRAFTED), target, given | options


def same(got, want):
    assert torch.equal(got.accepted, want.accepted) and torch.equal(got.next_token, want.next_token)


@pytest.mark.parametrize("form", ["logits", "described", "point mass"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_matches_the_definition(options, form):
    lengths = set()
    for seed, vocab in enumerate([2, 9, 63, 1030, 2500, 40, 300, 5]):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            draft, target, given = case(vocab, dtype, form, options, seed)
            got = verify(draft, target, **given)
            same(got, reference.verify(draft, target, **given))
            lens = torch.tensor([0, 1, 2, 3, 4, 5])
            short = draft.where(torch.arange(DRAFTED) < lens[:, None], -7)
            same(
                verify(short, target, draft_lens=lens.int(), **given),
                reference.verify(draft, target, draft_lens=lens, **given),
            )
            lengths |= set(got.accepted.tolist())
    assert {0, DRAFTED} <= lengths and len(lengths) > 3


@pytest.mark.parametrize("form", ["logits", "described", "point mass"])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7, "top_k": 3}, {"temperature": 1.3, "top_p": 0.8, "min_p": 0.05}],
    ids=str,
)
@pytest.mark.parametrize("distance", [0.3, 1.5])
def test_the_first_token_is_distributed_as_the_targets(distance, options, form):
    """Drafts near to the target and far from it, which are accepted often and seldom."""
    options = {"temperature": 1.0} | options
    vocab, count = 7, 40_000
    generator = torch.Generator().manual_seed(1)
    target = 1.5 * torch.randn(1, 2, vocab, generator=generator)
    drafter = target[:, :1] + distance * torch.randn(1, 1, vocab, generator=generator)
    target, drafter = target.expand(count, -1, -1), drafter.expand(count, -1, -1)
    drawn = sample(drafter[:, 0], SEED, **options)
    given = {} if form == "point mass" else {"draft_logits": drafter}
    if form == "described":
        given |= {"draft_pivot": drawn.pivot[:, None], "draft_normaliser": drawn.normaliser[:, None]}
    got = verify(drawn.token[:, None], target, seed=SEED, **given, **options)
    first = torch.where(got.accepted == 1, drawn.token, got.next_token)
    bonus = got.next_token[got.accepted == 1]
    assert 0 < bonus.numel() < count
    for tokens, row in ((first, 0), (bonus, 1)):
        probabilities = reference.filter_logits(target[0, row : row + 1].double(), **options).softmax(-1)[0]
        counts, expected = tokens.bincount(minlength=vocab), tokens.numel() * probabilities
        assert (counts[expected == 0] == 0).all()
        statistic = ((counts - expected) ** 2 / expected)[expected > 0].sum()
        assert statistic < 24  # at most 6 degrees of freedom: p = 0.0005


def test_a_draft_drawn_from_the_target_is_accepted_whole():
    target = torch.randn(50, 6, 300, generator=torch.Generator().manual_seed(2))
    drawn = sample(target[:, :5].flatten(0, 1), SEED, top_p=0.9)
    described = {
        "draft_pivot": drawn.pivot.view(50, 5),
        "draft_normaliser": drawn.normaliser.view(50, 5),
    }
    got = verify(
        drawn.token.view(50, 5), target, draft_logits=target[:, :5], seed=SEED, temperature=1.0, top_p=0.9, **described
    )
    # p and q of one token differ by rounding, which rejects one of millions.
    assert (got.accepted == 5).all()


def test_random_numbers_are_those_of_the_definition():
    draft, target, given = case(40, torch.float64, "logits", OPTIONS["plain"], 3)
    del given["uniforms"]
    for seed in (torch.tensor([2**62 + 1]), torch.arange(BATCH) - 3):
        numbers = uniforms_of(seed, VERIFY, BATCH, DRAFTED + 1)
        same(verify(draft, target, seed=seed, **given), reference.verify(draft, target, uniforms=numbers, **given))


def test_nothing_after_the_first_rejection_is_read():
    """Rows that are not needed hold NaN, which the argmax and every sum would take over."""
    target = torch.zeros(1, 4, 8)
    target[0, 0, 3], target[0, 1, 5] = 9.0, 9.0
    target[0, 2:] = math.nan
    draft = torch.tensor([[3, 4, 1]])
    got = verify(draft, target)
    assert (got.accepted.item(), got.next_token.item()) == (1, 5)
    got = verify(draft, target, temperature=1.0, uniforms=torch.full((1, 4), 0.5))
    assert (got.accepted.item(), got.next_token.item()) == (1, 5)


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 0.5, "top_k": 300}], ids=str)
def test_draws_at_the_ends_of_the_unit_interval_are_kept_tokens(options):
    target = torch.randn(1, 1, 4000, generator=torch.Generator().manual_seed(6))
    target[..., :1500] = target[..., -1500:] = -math.inf
    kept = (reference.filter_logits(target[0], **options)[0] > -math.inf).nonzero().flatten()
    for number, token in ((0.0, kept[0]), (1 - 2**-53, kept[-1])):
        uniform = torch.tensor([[number]], dtype=torch.float64)
        got = verify(torch.zeros(1, 0, dtype=torch.int64), target, uniforms=uniform, **options)
        assert got.next_token == token


def test_a_rejection_that_is_nothing_but_rounding_draws_from_the_target():
    target = torch.randn(1, 2, 50, generator=torch.Generator().manual_seed(7))
    uniforms = torch.tensor([[1.0, 0.5]], dtype=torch.float64)  # 1 * q < p fails for p = q
    got = verify(torch.tensor([[3]]), target, draft_logits=target[:, :1], uniforms=uniforms, temperature=1.0)
    want = verify(torch.zeros(1, 0, dtype=torch.int64), target[:, :1], uniforms=uniforms[:, 1:], temperature=1.0)
    assert got.accepted == 0 and got.next_token == want.next_token


@pytest.mark.parametrize("hopeless", [math.nan, -math.inf])
def test_logits_without_hope_still_give_a_token_of_the_vocabulary(hopeless):
    target = torch.full((1, 2, 70), hopeless)
    uniforms = torch.full((1, 2), 0.5, dtype=torch.float64)
    for given in ({}, {"draft_logits": target[:, :1]}, {"top_k": 3}, {"top_p": 0.5}):
        got = verify(torch.tensor([[69]]), target, uniforms=uniforms, temperature=1.0, **given)
        assert got.accepted == 0 and 0 <= got.next_token < 70


def test_a_token_that_the_draft_could_not_have_drawn_is_rejected():
    target, drafter = torch.zeros(1, 2, 6), torch.zeros(1, 1, 6)
    drafter[..., 4] = -math.inf
    uniforms = torch.full((1, 2), 0.5, dtype=torch.float64)
    assert verify(torch.tensor([[4]]), target, draft_logits=drafter, uniforms=uniforms, temperature=1.0).accepted == 0


def test_logits_of_two_dtypes_and_of_any_strides():
    draft, target, given = case(100, torch.float32, "logits", OPTIONS["top-p"], 4)
    coarse = given["draft_logits"].bfloat16()
    mixed = verify(draft, target, **given | {"draft_logits": coarse})
    same(mixed, verify(draft, target, **given | {"draft_logits": coarse.float()}))
    wide = torch.randn(BATCH, 2 * DRAFTED + 2, 150)
    view = wide[:, ::2, 20:120]
    view.copy_(target)
    same(verify(draft, view, **given), verify(draft, target, **given))


def test_no_rows_and_no_draft():
    assert verify(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 4, 5)).accepted.shape == (0,)
    none = torch.zeros(2, 0, dtype=torch.int64)
    got = verify(none, torch.tensor([[[0.0, 2.0]], [[3.0, 1.0]]]))
    assert got.accepted.tolist() == [0, 0] and got.next_token.tolist() == [1, 0]


def test_a_drafted_token_outside_the_vocabulary_is_named():
    draft = torch.tensor([[1, 2], [8, 9]])
    with pytest.raises(RuntimeError, match=r"draft token 9 of row 1, position 1, is outside the vocabulary \[0, 9\)"):
        verify(draft, torch.zeros(2, 3, 9))


def test_registration():
    draft, target, given = case(30, torch.float32, "described", OPTIONS["plain"], 5)
    names = ("draft_logits", "draft_pivot", "draft_normaliser")
    arguments = (draft, target, *(given[name] for name in names), SEED, None, None, 0.9, 5.0, 1.0, 0.0, *[None] * 4)
    counts, bias = torch.ones(BATCH, 30, dtype=torch.int32), torch.zeros(BATCH, 30)
    for tables in ([None] * 3, (counts, bias, None)):
        penalties = (*tables, 1.2, 0.0, 0.3, *[None] * 3)
        torch.library.opcheck(torch.ops.dflash_ext.verify, arguments + penalties)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(draft, target, seed, lens):
        return verify(draft, target, seed=seed, draft_lens=lens, temperature=0.9, top_k=5)

    lens = torch.full((BATCH,), 3, dtype=torch.int32)
    want = verify(draft, target, seed=SEED, draft_lens=lens, temperature=0.9, top_k=5)
    same(compiled(draft, target, SEED, lens), want)
    same(compiled(draft, target, SEED.item(), lens), want)


def test_lengths_beyond_the_draft_count_as_all_of_it(device):
    draft, target = torch.randint(0, 2, (500, 1), device=device), torch.randn(500, 2, 2, device=device)
    uniforms = torch.rand(500, 2, device=device)
    given = {"draft_logits": torch.zeros(500, 1, 2, device=device), "uniforms": uniforms, "temperature": 1.0}
    for function in (verify, reference.verify):
        want = function(draft, target, **given)
        got = function(draft, target, **given, draft_lens=torch.full((500,), 2, device=device))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with pytest.raises(ValueError, match="draft_lens is torch.float32"):
        verify(draft, target, **given, draft_lens=torch.ones(500, device=device))


def test_one_seed_may_serve_the_draft_and_its_verification():
    """p = q / 2 on every drafted token: half are accepted, which a shared random number would bend."""
    count, vocab = 20_000, 8
    draft_logits = torch.zeros(count, 1, vocab)
    draft_logits[..., vocab // 2 :] = -torch.inf
    target_logits = torch.zeros(count, 2, vocab)
    drawn = sample(draft_logits[:, 0], seed(3))
    got = verify(drawn.token[:, None], target_logits, draft_logits=draft_logits, seed=seed(3), temperature=1.0)
    committed = torch.where(got.accepted > 0, drawn.token, got.next_token)
    counts = committed.bincount(minlength=vocab).double()
    expected = count / vocab
    assert ((counts - expected) ** 2 / expected).sum() < 30  # 7 degrees of freedom: p = 0.0001


def test_verify_draws_are_those_of_its_uniforms(device):
    draft = torch.zeros(3, 2, dtype=torch.int64, device=device)
    z, uniforms = logits(3, 3, 9, device=device), torch.rand(3, 3, device=device)
    got = verify(draft, z, uniforms=uniforms, temperature=0.8, top_k=4)
    want = reference.verify(draft, z, uniforms=uniforms, temperature=0.8, top_k=4)
    assert torch.equal(got.accepted, want.accepted) and torch.equal(got.next_token, want.next_token)
    once, twice = (verify(draft, z, seed=seed(5, device=device), temperature=0.8) for _ in range(2))
    assert torch.equal(once.next_token, twice.next_token)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}], ids=str)
def test_verify_takes_nan_for_minus_infinity(options, device):
    draft, target, drafter = torch.zeros(3, 2, dtype=torch.int64, device=device), *logits(2, 3, 3, 50, device=device)
    drafter, uniforms = drafter[:, :2], torch.rand(3, 3, device=device)
    nan = torch.rand(target.shape, device=device) < 0.3
    nan[0, 0] = True
    for given in ({}, {"draft_logits": drafter}):
        for function in (verify, reference.verify):
            got, want = (
                function(
                    draft,
                    target.masked_fill(nan, value),
                    **{name: x.masked_fill(nan[:, 1:], value) for name, x in given.items()},
                    uniforms=uniforms,
                    **options,
                )
                for value in (math.nan, -math.inf)
            )
            assert torch.equal(got.accepted, want.accepted) and torch.equal(got.next_token, want.next_token)
            # Without any logit the argmax is token 0, which is a draft that greedy decoding accepts.
            assert options or got.accepted[0] > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: verify(DRAFT.int(), TARGET), "torch.int32"),
        (lambda: verify(DRAFT, TARGET[:, :3]), r"target_logits is \[2, 3, 5\]; \[2, 4, 5\]"),
        (lambda: verify(DRAFT, TARGET, draft_logits=TARGET), "draft_logits"),
        (lambda: verify(DRAFT, TARGET, draft_pivot=torch.zeros(2, 3)), "come together"),
        (lambda: verify(DRAFT, TARGET, temperature=1.0), "needs random numbers"),
        (lambda: verify(DRAFT, TARGET, top_k=-2), "top_k is -2; 0 or a number from 1"),
        (lambda: verify(DRAFT, TARGET, seed=3, top_p=torch.ones(3)), r"top_p is a tensor \[3\]; a number or \[2\]"),
        (lambda: verify(DRAFT, TARGET, temperature=1.0, seed=seed(1, 2, 3)), "seed"),
        (lambda: verify(DRAFT, TARGET, seed=seed(1), uniforms=torch.zeros(2, 4)), "both given"),
        (lambda: verify(DRAFT, TARGET, draft_lens=seed(1, 2, 3)), "draft_lens"),
        (lambda: verify(DRAFT, TARGET[0]), r"target_logits is torch.float32 \[4, 5\]"),
        (lambda: verify(DRAFT, TARGET.long()), "target_logits is torch.int64"),
        (lambda: verify(DRAFT, TARGET[..., :0]), r"target_logits is torch.float32 \[2, 4, 0\]"),
    ],
)
def test_refusals_name_the_value(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: verify(DRAFT, TARGET, seed=1.5), r"verify: seed is 1.5 \(float\); an int, an int64 tensor or a"),
        (lambda: verify(DRAFT, TARGET, temperature=None), "verify: temperature is None; a number or a tensor"),
    ],
)
def test_what_is_no_tensor_or_number_is_refused(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_seeds_and_filters_are_those_of_sample(device):
    draft, target = torch.zeros(3, 2, dtype=torch.int64, device=device), logits(3, 3, 9, device=device)
    options = {"temperature": 0.8, "top_k": 4, "top_p": 0.95, "min_p": 0.01}
    want = verify(draft, target, seed=seed(5, device=device), **options)
    tensors = {name: torch.tensor(value, device=device) for name, value in options.items()}
    same(verify(draft, target, seed=5, **tensors), want)
    same(verify(draft, target, seed=torch.tensor(5, device=device), **options), want)
    generators = (torch.Generator(device).manual_seed(1) for _ in range(2))
    same(*(verify(draft, target, seed=generator, **options) for generator in generators))
    off, on = (verify(draft, target, seed=5, temperature=1.0, top_k=k) for k in (-1, None))
    same(off, on)


@pytest.mark.parametrize("form", ["logits", "described", "point mass"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logits_of_infinity_are_point_masses(options, form):
    for seed, vocab in enumerate([2, 9, 63, 1030, 2500]):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            draft, target, given = case(vocab, dtype, "logits", options, seed)
            drafter = given.pop("draft_logits")
            places = torch.rand(target.shape, generator=torch.Generator().manual_seed(seed)) < 2 / vocab
            target[places] = math.inf
            drafter[places[:, 1:]] = math.inf
            drafter[2:4] = target[2:4, :-1]  # both have the same certain tokens
            by_token = {
                n: x.repeat_interleave(DRAFTED) if isinstance(x, torch.Tensor) else x for n, x in options.items()
            }
            drawn = sample(drafter.flatten(0, 1), seed, **by_token)
            draft = drawn.token.view(BATCH, DRAFTED)
            if form != "point mass":
                given["draft_logits"] = drafter
            if form == "described":
                given["draft_pivot"] = drawn.pivot.view(BATCH, DRAFTED)
                given["draft_normaliser"] = drawn.normaliser.view(BATCH, DRAFTED)
            got = verify(draft, target, **given)
            same(got, reference.verify(draft, target, **given))
            for row, (accepted, token) in enumerate(zip(got.accepted.tolist(), got.next_token.tolist(), strict=True)):
                committed = [*draft[row, :accepted].tolist(), token]
                for k, token in enumerate(committed):
                    best = target[row, k].argmax().item()
                    assert token == best or target[row, k, best] < math.inf


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 3}], ids=str)
def test_a_drafted_token_outside_the_vocabulary_is_rejected_by_the_definition(options, device):
    """It serves GPUs, where nothing can be raised; the row's own token is drawn from p."""
    draft, target = torch.tensor([[9, 1], [-1, 1], [2**40, 1]], device=device), logits(3, 3, 9, device=device)
    uniforms = torch.rand(3, 3, device=device)
    got = reference.verify(draft, target, uniforms=uniforms, **options)
    alone = reference.verify(draft[:, :0], target[:, :1], uniforms=uniforms[:, 2:], **options)
    assert (got.accepted == 0).all() and torch.equal(got.next_token, alone.next_token)
    got = reference.verify(draft, target, draft_logits=target[:, :2], uniforms=uniforms, **options)
    assert (got.accepted == 0).all()


def test_a_target_of_nothing_but_nan_has_one_argmax_at_every_form_of_temperature_0():
    target = torch.full((2, 3, 5), math.nan)
    target[1] = -math.inf
    draft, uniforms = torch.tensor([[0, 0], [0, 1]]), torch.rand(2, 3)
    for function in (reference.verify, verify):
        for temperature in (0.0, torch.tensor(0.0), torch.zeros(2)):
            got = function(draft, target, uniforms=uniforms, temperature=temperature)
            assert got.accepted.tolist() == [2, 1] and got.next_token.tolist() == [0, 0]
