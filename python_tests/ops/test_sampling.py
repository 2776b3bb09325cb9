"""What the public sampling functions add to their reference: seeds, checks, devices."""

import math

import pytest
import torch

from dflash_ext import reference, reveal, reveal_count, sample, verify


def seed(*values, device="cpu"):
    return torch.tensor(values, device=device)


def logits(*shape, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)


def test_a_seed_decides_the_tokens(device):
    z = logits(64, 50, device=device)
    first = sample(z, seed(7, device=device), temperature=0.9, top_p=0.95)
    again = sample(z, seed(7, device=device), temperature=0.9, top_p=0.95)
    other = sample(z, seed(8, device=device), temperature=0.9, top_p=0.95)
    assert torch.equal(first.token, again.token) and not torch.equal(first.token, other.token)
    assert first.token.dtype == torch.int64 and first.token.device.type == device


def test_a_seed_per_row_makes_draws_independent_of_the_batch():
    z = logits(4, 50)
    seeds = seed(3, 5, 2**62, -9)
    together = sample(z, seeds).token
    alone = torch.cat([sample(z[i : i + 1], seeds[i : i + 1]).token for i in range(4)])
    assert torch.equal(together, alone)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(sample(z[order], seeds[order]).token, together[order])


@pytest.mark.parametrize("by", ["row", "seed"])
def test_draws_over_rows_and_over_seeds_are_uniform_and_uncorrelated(by):
    """Uniform logits over 8 tokens: pairs of successive draws fall evenly into 64 cells."""
    count = 20_000
    z = torch.zeros(count, 8)
    token = sample(z, seed(11) if by == "row" else torch.arange(count)).token
    cells = (token[:-1] * 8 + token[1:]).bincount(minlength=64).double()
    expected = (count - 1) / 64
    assert ((cells - expected) ** 2 / expected).sum() < 110  # 63 degrees of freedom: p = 0.0002


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


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.7}, {"min_p": 0.2}], ids=str)
def test_a_logit_that_is_nan_counts_as_one_of_minus_infinity(options, device):
    z = logits(4, 3000, device=device)
    nan = torch.rand(z.shape, device=device) < 0.3
    nan[0], nan[1, :-1], nan[1, -1] = True, True, False
    broken, whole = z.masked_fill(nan, math.nan), z.masked_fill(nan, -math.inf)
    for function, uniform in ((sample, seed(3, device=device)), (reference.sample, torch.rand(4, device=device))):
        got, want = function(broken, uniform, **options), function(whole, uniform, **options)
        assert all(torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0)) for a, b in zip(got, want, strict=True))
        assert got.token[0] == got.argmax[0] == 0 and got.token[1] == 2999
        for measure in (got.prob, got.logprob, got.entropy, got.margin, got.max_prob):
            assert measure.isnan().tolist() == [True, False, False, False]


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


FILTERS = ("temperature", "top_k", "top_p", "min_p")
DRAFT, TARGET = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 4, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample(torch.zeros(3), seed(1)), r"logits is torch.float32 \[3\]"),
        (lambda: sample(torch.zeros(3, 4).long(), seed(1)), "torch.int64"),
        (lambda: sample(torch.zeros(3, 4), seed(1, 2)), r"int64 \[1\] or \[3\]"),
        (lambda: sample(torch.zeros(3, 4), torch.zeros(1)), "seed is torch.float32"),
        (lambda: sample(torch.zeros(3, 4), seed(1), temperature=-0.5), "temperature is -0.5"),
        (lambda: sample(torch.zeros(3, 4), seed(1), top_p=torch.ones(2)), r"top_p is a tensor \[2\]"),
        (lambda: verify(DRAFT.int(), TARGET), "torch.int32"),
        (lambda: verify(DRAFT, TARGET[:, :3]), r"target_logits is \[2, 3, 5\]; \[2, 4, 5\]"),
        (lambda: verify(DRAFT, TARGET, draft_logits=TARGET), "draft_logits"),
        (lambda: verify(DRAFT, TARGET, draft_pivot=torch.zeros(2, 3)), "come together"),
        (lambda: verify(DRAFT, TARGET, temperature=1.0), "needs random numbers"),
        (lambda: verify(DRAFT, TARGET, temperature=1.0, seed=seed(1, 2, 3)), "seed"),
        (lambda: verify(DRAFT, TARGET, seed=seed(1), uniforms=torch.zeros(2, 4)), "both given"),
        (lambda: verify(DRAFT, TARGET, draft_lens=seed(1, 2, 3)), "draft_lens"),
        (lambda: verify(DRAFT, TARGET[0]), r"target_logits is torch.float32 \[4, 5\]"),
        (lambda: verify(DRAFT, TARGET.long()), "target_logits is torch.int64"),
        (lambda: verify(DRAFT, TARGET[..., :0]), r"target_logits is torch.float32 \[2, 4, 0\]"),
        (lambda: reveal(None, torch.ones(2, 3), count=1), "masked is torch.float32"),
        (lambda: reveal(torch.ones(3), torch.ones(2, 3) > 0, count=1), r"scores is \[3\]"),
        (lambda: reveal(None, torch.ones(2, 3) > 0, count=-1), "count is -1"),
    ],
)
def test_refusals_name_the_value(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample([[0.0]], seed(1)), r"sample: logits is \[\[0.0\]\] \(list\); a tensor"),
        (lambda: sample(torch.zeros(3, 4), 1), r"sample: seed is 1 \(int\); a tensor"),
        (lambda: sample(torch.zeros(3, 4), seed(1), temperature=None), "temperature is None; a number or a tensor"),
        (lambda: sample(torch.zeros(3, 4), seed(1), top_k=2.5), r"top_k is 2.5 \(float\); an int, a tensor or None"),
        (
            lambda: sample(torch.zeros(3, 4), seed(1), top_p=[0.5]),
            r"top_p is \[0.5\] \(list\); a number, a tensor or None",
        ),
        (lambda: verify([[1]], TARGET), r"verify: draft_tokens is \[\[1\]\] \(list\)"),
        (lambda: verify(DRAFT, TARGET.numpy()), "verify: target_logits is of type ndarray"),
        (lambda: verify(DRAFT, TARGET, draft_lens=3), r"verify: draft_lens is 3 \(int\); a tensor or None"),
        (lambda: reveal(None, [[True]], count=1), r"reveal: masked is \[\[True\]\] \(list\); a tensor"),
        (lambda: reveal(0.5, DRAFT == 0, count=1), r"reveal: scores is 0.5 \(float\); a tensor or None"),
        (lambda: reveal(None, DRAFT == 0, count="1"), r"reveal: count is '1' \(str\)"),
        (lambda: reveal_count(7, 0, 2), r"reveal_count: total is 7 \(int\); a tensor"),
        (lambda: reveal_count(seed(7), 0.0, 2), r"reveal_count: step is 0.0 \(float\); an int"),
    ],
)
def test_what_is_no_tensor_or_number_is_refused(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def each_on_meta(arguments):
    """The arguments with one tensor after another on the meta device, and its name."""
    for name, value in list(arguments.items())[1:]:
        if isinstance(value, torch.Tensor):
            yield name, arguments | {name: value.to("meta")}


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (sample, {"logits": TARGET[0], "seed": seed(1)} | {name: torch.ones(4) for name in FILTERS}),
        (
            verify,
            {"draft_tokens": DRAFT, "target_logits": TARGET, "draft_logits": TARGET[:, 1:]}
            | {"draft_pivot": torch.zeros(2, 3), "draft_normaliser": torch.zeros(2, 3)}
            | {"uniforms": torch.zeros(2, 4), "draft_lens": seed(1, 2)}
            | {name: torch.ones(2) for name in FILTERS},
        ),
        (reveal, {"masked": TARGET[0] == 0, "scores": TARGET[0], "entropy": TARGET[0], "count": seed(1, 2, 3, 4)}),
    ],
    ids=["sample", "verify", "reveal"],
)
def test_arguments_on_several_devices_are_refused_and_all_on_meta_are_not(op, arguments):
    first = next(iter(arguments))
    for name, given in each_on_meta(arguments):
        with pytest.raises(ValueError, match=f"{op.__name__}: {first} is on cpu, {name} on meta; one device is needed"):
            op(**given)
    want = op(**arguments)
    got = op(**{name: value.to("meta") for name, value in arguments.items()})
    for a, b in zip(*((x,) if op is reveal else x for x in (got, want)), strict=True):
        assert a.is_meta and a.shape == b.shape and a.dtype == b.dtype


def test_a_draw_carries_no_gradient():
    assert not any(field.requires_grad for field in sample(torch.randn(2, 4, requires_grad=True), seed(1)))
