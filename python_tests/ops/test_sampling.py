"""sample against its definition in float64, and its draws against exact probabilities."""

import math

import pytest
import torch

from dflash_ext import reference, sample
from dflash_ext.ops.random import SAMPLE, uniforms_of
from dflash_ext.reference.numerics import softcapped

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
VOCABS = [1, 2, 7, 16, 65, 1000, 1025, 5003]
FILTERS = {
    "none": {},
    "greedy": {"temperature": 0.0},
    "hot": {"temperature": 2.5},
    "top-k": {"top_k": 5},
    "top-k of many": {"temperature": 0.7, "top_k": 700},
    "top-p": {"temperature": 0.7, "top_p": 0.9},
    "top-p, flat": {"temperature": 3.0, "top_p": 0.95},
    "min-p": {"temperature": 1.4, "min_p": 0.05},
    "all": {"temperature": 1.3, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
    "the best alone": {"top_k": 1},
    "no mass": {"top_p": 0.0},
    "off": {"top_k": 0, "top_p": 1.0, "min_p": 0.0},
}
SEED = torch.tensor([5])


def seed(*values, device="cpu"):
    return torch.tensor(values, device=device)


def logits(*shape, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)


def rows(count, vocab, dtype=torch.float32, seed=0):
    """Random logits, among them rows with ties, of -inf but for a few, all equal, very large and very small."""
    generator = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(count, vocab, generator=generator)
    z[1::8] = z[1::8].round()
    z[2::8] = torch.where(torch.rand(z[2::8].shape, generator=generator) < 0.8, -math.inf, z[2::8])
    z[2::8, vocab // 2] = 1.0
    z[3::8] = 0.5
    z[4::8] = torch.where(z[4::8] > 5, 1e4, -1e4)
    z[5::8] = -1e4 - z[5::8].abs().sort(dim=-1).values
    return z.to(dtype)


def exact(logits, temperature=1.0, **filters):
    """The definition in float64: probabilities before and after the filters."""
    wide = logits.double()
    kept = reference.filter_logits(wide, temperature, **filters)
    scale = torch.as_tensor(temperature, dtype=torch.float64).reshape(-1, 1)
    return (wide / torch.where(scale == 0, 1.0, scale)).softmax(-1), kept.softmax(-1)


def close(actual, expected, **options):
    options = {"rtol": 5e-6, "atol": 5e-6} | options
    torch.testing.assert_close(actual.double(), expected, **options)


def check_draws(drawn, p, q, uniform):
    """Tokens are where the cumulative sum of q passes the uniform number, as far as rounding allows."""
    token = drawn.token[:, None]
    mass = q.gather(1, token)[:, 0]
    passed = q.cumsum(-1).gather(1, token)[:, 0]
    assert (mass > 0).all()
    assert (passed - mass <= uniform + 1e-6).all() and (uniform <= passed + 1e-6).all()
    close(drawn.prob, p.gather(1, token)[:, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
def test_matches_the_definition(options, dtype, device):
    for vocab in VOCABS:
        logits = rows(16, vocab, dtype)
        if "cuda" in str(device):
            # The definition, which serves CUDA, divides by the temperature first: 1e4 keeps three decimals in float32.
            logits = logits.clamp(-20, 20)
        drawn, entropy = sample(logits.to(device), SEED.to(device), **options, return_filtered_entropy=True)
        drawn, entropy = type(drawn)(*(field.cpu() for field in drawn)), entropy.cpu()
        p, q = exact(logits, **options)
        check_draws(drawn, p, q, uniforms_of(SEED, SAMPLE, 16, 1)[:, 0])
        ordered = p.sort(-1, descending=True).values
        close(drawn.max_prob, ordered[:, 0])
        close(drawn.margin, ordered[:, 0] - (ordered[:, 1] if vocab > 1 else 0))
        close(drawn.entropy, torch.special.entr(p).sum(-1), atol=2e-5)
        close(drawn.logprob.exp(), drawn.prob.double())
        close(entropy, torch.special.entr(q).sum(-1), atol=2e-5)
        assert torch.equal(drawn.argmax, logits.double().argmax(-1))
        assert drawn.prob.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

        temperature = options.get("temperature", 1.0) or 1.0
        z = logits.to(drawn.pivot.dtype) / temperature
        kept = (z >= drawn.pivot[:, None]) & (z > -math.inf)
        if options.get("temperature") == 0:  # all that tie with the argmax reach the pivot
            kept &= torch.arange(vocab) == drawn.argmax[:, None]
        filtered = reference.filter_logits(logits.double(), **options)
        assert torch.equal(kept, filtered > -math.inf)
        close(drawn.normaliser, filtered.logsumexp(-1), rtol=1e-6)


def test_filters_differ_by_row():
    generator = torch.Generator().manual_seed(1)
    count, vocab = 200, 1500
    logits = rows(count, vocab, seed=2)

    def choice(*values, dtype=torch.float32):
        return torch.tensor(values, dtype=dtype)[torch.randint(len(values), (count,), generator=generator)]

    options = {
        "temperature": choice(0.0, 0.3, 1.0, 1.7),
        "top_k": choice(0, 1, 3, 60, 1200, 1500, 9999, dtype=torch.int64),
        "top_p": choice(0.0, 0.2, 0.9, 0.99, 1.0),
        "min_p": choice(0.0, 0.0, 0.1, 1.0),
    }
    drawn, entropy = sample(logits, SEED, **options, return_filtered_entropy=True)
    p, q = exact(logits, **options)
    check_draws(drawn, p, q, uniforms_of(SEED, SAMPLE, count, 1)[:, 0])
    close(entropy, torch.special.entr(q).sum(-1), atol=2e-5)


def test_tokens_that_the_temperature_makes_equal_share_one_fate():
    two = torch.tensor(2.0)
    low = torch.tensor(1.9)
    while low / 1.7 != torch.nextafter(low, two) / 1.7:
        low = torch.nextafter(low, two)
    logits = torch.stack((torch.nextafter(low, two), torch.tensor(0.0), low, torch.nextafter(low, -two)))[None]
    drawn, entropy = sample(logits, SEED, temperature=1.7, top_k=1, return_filtered_entropy=True)
    close(entropy, torch.tensor([math.log(2)], dtype=torch.float64))
    assert (logits / 1.7 >= drawn.pivot).tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 900}, {"top_k": 3000}], ids=str)
def test_a_large_vocabulary_is_summed_exactly_enough(options):
    vocab = 262_144
    logits = torch.randn(2, vocab, generator=torch.Generator().manual_seed(3)) / 2
    drawn, entropy = sample(logits, SEED, **options, return_filtered_entropy=True)
    p, q = exact(logits, **options)
    check_draws(drawn, p, q, uniforms_of(SEED, SAMPLE, 2, 1)[:, 0])
    close(drawn.entropy, torch.special.entr(p).sum(-1), rtol=1e-6)
    close(entropy, torch.special.entr(q).sum(-1), rtol=1e-6)


@pytest.mark.parametrize("per_row", [False, True])
def test_random_numbers_are_those_of_the_definition(per_row, device):
    """Of equally probable tokens, the one drawn says what the random number's leading 16 bits are."""
    vocab, count = 2**16, 40
    seed = torch.arange(-20, 20) * 2**58 + 7 if per_row else torch.tensor([-(2**63)])
    token = sample(torch.zeros(1, vocab, device=device).expand(count, -1), seed.to(device)).token
    want = (uniforms_of(seed, SAMPLE, count, 1)[:, 0] * vocab).floor().long()
    assert torch.equal(token.cpu(), want)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6}, {"top_k": 4}, {"temperature": 1.5, "top_p": 0.7}, {"min_p": 0.2}],
    ids=str,
)
def test_tokens_are_as_frequent_as_they_should_be(options):
    count = 50_000
    logits = torch.tensor([[0.3, -1.0, 2.0, -math.inf, 1.0, 0.3, 1.9, -0.2, 0.0]])
    counts = sample(logits.expand(count, -1), SEED, **options).token.bincount(minlength=9).double()
    expected = count * exact(logits, **options)[1][0]
    assert (counts[expected == 0] == 0).all()
    statistic = ((counts - expected) ** 2 / expected)[expected > 0].sum()
    assert statistic < 27  # 8 degrees of freedom: p = 0.0007


def test_rows_may_lie_anywhere():
    wide = rows(12, 900)
    view = wide[::3, 100:877]
    for got, want in zip(sample(view, SEED, top_p=0.9), sample(view.contiguous(), SEED, top_p=0.9), strict=True):
        assert torch.equal(got, want)


def test_no_rows_and_rows_without_hope():
    assert all(field.shape == (0,) for field in sample(torch.zeros(0, 5), SEED, top_k=2))
    hopeless = torch.full((3, 40), -math.inf)
    hopeless[1], hopeless[2, 3] = math.nan, math.inf
    for options in ({}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.0}, {"min_p": 0.1}):
        token = sample(hopeless, SEED, **options).token
        assert ((token >= 0) & (token < 40)).all()


def test_threads_and_batches_change_nothing():
    logits, seeds = rows(70, 3000), torch.arange(70)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        several = sample(logits, seeds, temperature=0.9, top_p=0.95)
        torch.set_num_threads(1)
        one = sample(logits, seeds, temperature=0.9, top_p=0.95)
    finally:
        torch.set_num_threads(threads)
    alone = sample(logits[41:42], seeds[41:42], temperature=0.9, top_p=0.95)
    for a, b, c in zip(several, one, alone, strict=True):
        assert torch.equal(a, b) and torch.equal(a[41:42], c)


def test_registration():
    logits, numbers = rows(4, 50), torch.tensor([0.5, 0.9, 1.0, 0.1])
    seeds = torch.arange(4)
    counts, bias = torch.ones(9, 50, dtype=torch.int32), torch.zeros(50, dtype=torch.float64)
    tables = (counts, bias, seeds, 1.2, 0.0, 0.3, None, numbers.double(), None)
    for arguments in (
        (logits, SEED, 1.0, 0.0, 1.0, 0.0, *[None] * 7, 1.0, 0.0, 0.0, *[None] * 3, False),
        (logits.double(), seeds, 1.0, 5.0, 1.0, 0.0, numbers.double(), None, numbers.double(), None, *tables, True),
    ):
        torch.library.opcheck(torch.ops.dflash_ext.sample, arguments)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(logits, seed, temperature):
        return sample(logits, seed, temperature=temperature, top_k=9, return_filtered_entropy=True)

    for count in (4, 3):
        given = logits[:count], seeds[:count], numbers[:count]
        drawn, entropy = compiled(*given)
        want, want_entropy = sample(*given[:2], temperature=given[2], top_k=9, return_filtered_entropy=True)
        assert torch.equal(entropy, want_entropy)
        assert all(torch.equal(a, b) for a, b in zip(drawn, want, strict=True))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def of_a_block(logits, temperature):
        return sample(logits, 3, temperature=temperature, top_k=-1, return_confidence=True)

    block, temperature = logits.view(2, 2, -1), torch.tensor(0.7)
    drawn, confidence = of_a_block(block, temperature)
    want, want_confidence = sample(block, 3, temperature=temperature, return_confidence=True)
    assert drawn.token.shape == (2, 2) and torch.equal(drawn.token, want.token)
    assert torch.equal(confidence, want_confidence)


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample(torch.tensor(3.0), 1), r"logits is torch.float32 \[\]"),
        (lambda: sample(torch.zeros(3, 4).long(), seed(1)), "torch.int64"),
        (lambda: sample(torch.zeros(3, 4), seed(1, 2)), r"int64 \[\], \[1\] or \[3\] is needed"),
        (lambda: sample(torch.zeros(2, 3, 4), seed(1, 2, 3)), r"int64 \[\], \[1\] or \[2, 3\] is needed"),
        (lambda: sample(torch.zeros(2, 3, 4), 1, temperature=torch.ones(3)), r"temperature is a tensor \[3\]"),
        (lambda: sample(torch.zeros(3, 4), 1, top_k=-2), "top_k is -2; 0 or a number from 1"),
        (lambda: sample(torch.zeros(3, 4), torch.zeros(1)), "seed is torch.float32"),
        (lambda: sample(torch.zeros(3, 4), seed(1), temperature=-0.5), "temperature is -0.5"),
        (lambda: sample(torch.zeros(3, 4), seed(1), top_p=torch.ones(2)), r"top_p is a tensor \[2\]"),
        (lambda: sample(torch.zeros(3, 4), 1, softcap=math.nan), "softcap is nan; it must be positive"),
        (lambda: sample(torch.zeros(3, 4), 1, softcap=-30.0), "softcap is -30.0"),
    ],
)
def test_refusals_name_the_value(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample(torch.zeros(3, 4), 1.5), r"sample: seed is 1.5 \(float\); an int, an int64 tensor or a"),
        (lambda: sample(torch.zeros(3, 4), None), "sample: seed is None; an int, an int64 tensor or a"),
        (lambda: sample(torch.zeros(3, 4), seed(1), temperature=None), "temperature is None; a number or a tensor"),
    ],
)
def test_what_is_no_tensor_or_number_is_refused(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_a_draw_carries_no_gradient():
    assert not any(field.requires_grad for field in sample(torch.randn(2, 4, requires_grad=True), seed(1)))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (2, 0), (2, 1, 3)], ids=str)
def test_leading_dimensions_are_rows(shape, device):
    count = math.prod(shape)
    z = rows(8, 50)[:count].view(*shape, 50).to(device)
    by_row = (torch.arange(count, device=device) / 4 + 0.5).view(shape)
    seeds = torch.arange(count, device=device).view(shape)
    for numbers in (seed(3, device=device), seeds):
        got, *more = sample(
            z, numbers, temperature=by_row, top_p=0.9, return_filtered_entropy=True, return_confidence=True
        )
        flat, *want = sample(
            z.reshape(count, 50),
            numbers.flatten(),
            temperature=by_row.flatten(),
            top_p=0.9,
            return_filtered_entropy=True,
            return_confidence=True,
        )
        for a, b in zip((*got, *more), (*flat, *want), strict=True):
            assert a.shape == shape and torch.equal(a.flatten(), b)


def test_a_seed_is_an_int_a_tensor_or_a_generator(device):
    z = logits(20, 50, device=device)
    want = sample(z, seed(7, device=device)).token
    for same in (7, torch.tensor(7, device=device)):
        assert torch.equal(sample(z, same).token, want)
    assert sample(z, -(2**63)).token.shape == sample(z, 2**63 - 1).token.shape == (20,)
    for where in {"cpu", device}:
        generator = torch.Generator(where).manual_seed(5)
        first, second = sample(z, generator).token, sample(z, generator).token
        again = sample(z, torch.Generator(where).manual_seed(5)).token
        assert torch.equal(first, again) and not torch.equal(first, second)


def test_numbers_and_tensors_without_dimensions_are_alike(device):
    z = logits(20, 50, device=device)
    options = {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.01}
    tensors = {name: torch.tensor(value, device=device) for name, value in options.items()}
    for a, b in zip(sample(z, 3, **options), sample(z, 3, **tensors), strict=True):
        assert torch.equal(a, b)


def test_top_k_of_minus_1_is_off():
    z = logits(20, 50)
    want = sample(z, 3)
    for off in (-1, 0, None, torch.tensor(-1), torch.full((20,), -1)):
        assert all(torch.equal(a, b) for a, b in zip(sample(z, 3, top_k=off), want, strict=True))


ODD = {
    "temperature": [(math.nan, 0.0), (-1.0, 0.0), (1e-39, 0.0), (9e-31, 0.0), (math.inf, 1e30), (3e38, 1e30)],
    "top_k": [(math.nan, 0), (math.inf, 0), (0.9, 0), (-3.0, 0), (2.0, 2), (2.9, 2), (1.5, 1), (99.0, 0)],
    "top_p": [(math.nan, 1.0), (math.inf, 1.0), (1.5, 1.0), (-0.5, 0.0)],
    "min_p": [(math.nan, 0.0), (math.inf, 1.0), (1.5, 1.0), (-0.5, 0.0)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ODD)
def test_odd_filters_in_tensors_have_one_meaning(name, dtype, device):
    """The kernel, and the definition that serves GPUs, read them alike; `verify` takes them through the same code."""
    z = rows(8, 50, dtype).to(device)
    uniform = torch.rand(8, device=device)
    for odd, plain in ODD[name]:
        odd, plain = (torch.full((8,), x, dtype=dtype, device=device) for x in (odd, plain))
        options = {} if name == "temperature" else {"temperature": 0.8}
        for function, number in ((sample, seed(3, device=device)), (reference.sample, uniform)):
            got, want = (function(z, number, **options, **{name: x}) for x in (odd, plain))
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), (function, odd[0], plain[0])
        kept = reference.filter_logits(z, **{"temperature": 1.0} | options | {name: odd})
        close(sample(z, 3, **options, **{name: odd}).normaliser, kept.double().logsumexp(-1), rtol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
def test_a_row_with_a_logit_of_infinity_is_a_point_mass_at_the_first(options, dtype, device):
    z = rows(8, 2000, dtype)
    z[:, 7], z[0, 1999] = math.nan, math.inf
    z[1:, [1500, 900, 1999]], z[5, 3] = math.inf, -math.inf
    z = z.to(device)
    first = [1999] + [900] * 7
    more = {"return_filtered_entropy": True, "return_confidence": True}
    for function, number in ((sample, 3), (reference.sample, torch.rand(8, device=device))):
        drawn, entropy, confidence = function(z, number, **options, **more)
        assert drawn.token.tolist() == drawn.argmax.tolist() == first
        for one in (drawn.prob, drawn.max_prob, drawn.margin, confidence):
            assert (one == 1).all()
        for zero in (drawn.logprob, drawn.entropy, drawn.normaliser, entropy):
            assert (zero == 0).all()
        assert (drawn.pivot == math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 2.5])
def test_confidence_is_the_probability_at_temperature_1(temperature, dtype, device):
    """As LLaDA computes it: of the token drawn at another temperature, under softmax of the logits in float64."""
    z = rows(16, 3000, dtype).to(device)
    for filters in ({}, {"top_k": 5}):
        drawn, confidence = sample(z, 3, temperature=temperature, **filters, return_confidence=True)
        want = z.double().softmax(-1).gather(1, drawn.token[:, None])[:, 0]
        close(confidence, want, rtol=2e-5)
        if temperature in (0, 1):
            close(confidence, drawn.prob.double())
    assert confidence.dtype == drawn.prob.dtype


CAPPED = [{}, {"temperature": 0.4}, {"temperature": 0.0}, {"top_p": 0.9}, {"logit_bias": torch.arange(5003.0) % 3}]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", CAPPED, ids=lambda options: ", ".join(options) or "plain")
def test_a_soft_cap_comes_before_all_else(options, dtype, device):
    """-inf, too, becomes a number. A GPU's tanh for bfloat16 errs by less than the rounding of such logits."""
    z, options = rows(16, 5003, dtype), dict(options)
    z[6, 17] = math.nan
    uniform = uniforms_of(SEED, SAMPLE, 16, 1)[:, 0]
    capped = softcapped(z.double(), 9.0)
    want = capped + options["logit_bias"].double() if "logit_bias" in options else capped
    p = exact(want.nan_to_num(-math.inf), options.get("temperature", 1.0))[0]
    if "logit_bias" in options:
        options["logit_bias"] = options["logit_bias"].to(device)
    for padded in (z, torch.cat([z, z], dim=-1)[:, 1:]):  # rows that are not aligned
        given = padded.to(device)[:, -5003:] if padded is not z else z.to(device)
        drawn = sample(given, SEED.to(device), softcap=9.0, **options)
        drawn = type(drawn)(*(field.cpu() for field in drawn))
        coarse = {"rtol": 3e-2, "atol": 1e-3} if dtype == torch.bfloat16 and given.is_cuda else {"rtol": 2e-5}
        close(drawn.prob, p.gather(1, drawn.token[:, None])[:, 0], **coarse)
        close(drawn.max_prob, p.amax(-1), **coarse)
        close(drawn.entropy, torch.special.entr(p).sum(-1), **coarse)
        close(want.gather(1, drawn.argmax[:, None])[:, 0], want.nan_to_num(-math.inf).amax(-1), **coarse)
        if not options:
            passed, slack = p.cumsum(-1).gather(1, drawn.token[:, None])[:, 0], coarse.get("atol", 1e-6)
            assert (uniform <= passed + 3 * slack).all() and (passed - drawn.prob <= uniform + 3 * slack).all()


def test_a_soft_cap_on_rows_that_are_nearly_empty(device):
    """NaN is no logit, and -inf is one. All others are whole tiles for a GPU."""
    z = torch.full((3, 8192), math.nan, dtype=torch.bfloat16)
    z[1, 5000] = -2.0
    z[2] = -math.inf
    drawn = sample(z.to(device), torch.arange(3, device=device), softcap=30.0)
    assert drawn.token[:2].tolist() == [0, 5000] and drawn.argmax.tolist() == [0, 5000, 0]
    assert drawn.prob[0].isnan() and drawn.max_prob[0].isnan()
    close(drawn.prob[1:].cpu(), torch.tensor([1, 1 / 8192]).double())
    close(drawn.entropy[1:].cpu(), torch.tensor([0, math.log(8192)]).double(), atol=1e-5)


@pytest.mark.parametrize("temperature", [1e-3, 1e-12, 1e-30])
def test_a_soft_cap_at_a_small_temperature(temperature, device):
    z = logits(4, 8192, device=device).bfloat16()
    z[:, 4000] = 25.0
    drawn = sample(z, 0, temperature=temperature, softcap=30.0)
    assert drawn.token.tolist() == [4000] * 4
    close(drawn.prob.cpu(), torch.ones(4).double())


def test_autocast_changes_nothing(device):
    z = logits(20, 500, device=device)
    want = sample(z, 3, temperature=0.7, top_p=0.9)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = sample(z, 3, temperature=0.7, top_p=0.9)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
