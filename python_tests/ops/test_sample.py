"""sample against its definition in float64, and its draws against exact probabilities."""

import math

import pytest
import torch

from dflash_ext import reference, sample
from dflash_ext.ops.sampling import _SAMPLE, _uniforms

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
        check_draws(drawn, p, q, _uniforms(SEED, _SAMPLE, 16, 1)[:, 0])
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
    check_draws(drawn, p, q, _uniforms(SEED, _SAMPLE, count, 1)[:, 0])
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
    check_draws(drawn, p, q, _uniforms(SEED, _SAMPLE, 2, 1)[:, 0])
    close(drawn.entropy, torch.special.entr(p).sum(-1), rtol=1e-6)
    close(entropy, torch.special.entr(q).sum(-1), rtol=1e-6)


@pytest.mark.parametrize("per_row", [False, True])
def test_random_numbers_are_those_of_the_definition(per_row, device):
    """Of equally probable tokens, the one drawn says what the random number's leading 16 bits are."""
    vocab, count = 2**16, 40
    seed = torch.arange(-20, 20) * 2**58 + 7 if per_row else torch.tensor([-(2**63)])
    token = sample(torch.zeros(1, vocab, device=device).expand(count, -1), seed.to(device)).token
    want = (_uniforms(seed, _SAMPLE, count, 1)[:, 0] * vocab).floor().long()
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
    for arguments in (
        (logits, SEED, 1.0, 0.0, 1.0, 0.0, None, None, None, None),
        (logits.double(), seeds, 1.0, 5.0, 1.0, 0.0, numbers.double(), None, numbers.double(), None),
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
