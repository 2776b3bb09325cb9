"""sample on a GPU against its definition, the CPU kernel, and exact probabilities."""

import math

import pytest
import torch

from dflash_ext import reference, sample
from dflash_ext.ops.random import SAMPLE, uniforms_of
from python_tests.ops.test_sampling import FILTERS, SEED, check_draws, close, exact, rows

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LARGE = [8191, 151_936]
UNIFORMS = uniforms_of(SEED, SAMPLE, 8, 1)[:, 0]


def on_cpu(result):
    drawn, *more = result
    return type(drawn)(*(field.cpu() for field in drawn)), *(each.cpu() for each in more)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
def test_large_vocabularies_match_the_definition(options, dtype):
    for vocab in LARGE:
        logits = rows(8, vocab, dtype)
        asked = {"return_filtered_entropy": True, "return_confidence": True}
        drawn, entropy, confidence = on_cpu(sample(logits.cuda(), SEED.cuda(), **options, **asked))
        p, q = exact(logits, **options)
        top = p.topk(2, dim=-1).values
        close(drawn.max_prob, top[:, 0])
        close(drawn.margin, top[:, 0] - top[:, 1])
        close(drawn.entropy, torch.special.entr(p).sum(-1), atol=2e-5)
        close(entropy, torch.special.entr(q).sum(-1), atol=1e-4)
        close(confidence, logits.double().softmax(-1).gather(1, drawn.token[:, None])[:, 0])
        assert torch.equal(drawn.argmax, logits.double().argmax(-1))
        # Where rounding decides on the pivot, what it adds or drops has next to no mass.
        z = logits.float() / (options.get("temperature", 1.0) or 1.0)
        kept = (z >= drawn.pivot[:, None]) & (z > -math.inf)
        if options.get("temperature") == 0:
            kept &= torch.arange(vocab) == drawn.argmax[:, None]
        differs = kept != (reference.filter_logits(logits.double(), **options) > -math.inf)
        assert p.masked_fill(~differs, 0).amax(-1).le(1e-4).all() and differs.sum(-1).le(64).all()
        check_draws(drawn, p, p.where(kept, 0) / p.where(kept, 0).sum(-1, keepdim=True), UNIFORMS)
        close(drawn.normaliser, z.double().masked_fill(~kept, -math.inf).logsumexp(-1), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
def test_tokens_are_those_of_the_cpu_kernel(options, dtype):
    for vocab in (1, 2, 50, 1025, 50_257):
        logits = rows(64, vocab, dtype)
        got, want = sample(logits.cuda(), SEED.cuda(), **options), sample(logits, SEED, **options)
        # A uniform number that lies within rounding of a token's end may give its neighbour.
        assert (got.token.cpu() == want.token).sum() >= 63
        assert torch.equal(got.argmax.cpu(), want.argmax)


@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
def test_a_rows_bits_do_not_depend_on_the_batch(options):
    """Few rows are spread over up to eight blocks each, many rows are not."""
    logits = rows(600, 40_000, torch.bfloat16).cuda()
    seeds = torch.arange(600, device="cuda")
    asked = {"return_filtered_entropy": True, "return_confidence": True}
    together, *more = sample(logits, seeds, **options, **asked)
    for begin, count in ((0, 1), (3, 7), (5, 17), (2, 21), (9, 25), (30, 32), (17, 43), (40, 60), (100, 200)):
        end = begin + count
        some, *own = sample(logits[begin:end], seeds[begin:end], **options, **asked)
        for a, b in zip((*some, *own), (*together, *more), strict=True):
            assert torch.equal(a.nan_to_num(-7.0), b[begin:end].nan_to_num(-7.0))


def test_rows_may_lie_anywhere():
    for dtype in DTYPES:
        wide = rows(12, 40_003, dtype).cuda()
        for view in (
            wide[::3, 100:877],
            wide[:, 1:],
            wide[1:, 2:-3],
            wide[:2, 8:-3].expand(2, -1),
            wide[:1].expand(9, -1),
        ):
            for options in ({}, {"top_p": 0.9}, {"top_k": 70}):
                got, want = (sample(x, SEED.cuda(), **options) for x in (view, view.contiguous()))
                for a, b in zip(got, want, strict=True):
                    close(a, b.double())


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"temperature": 0.7, "top_k": 40}, {"min_p": 0.1}], ids=str)
def test_a_captured_graph_draws_anew(options):
    logits, seed = rows(24, 60_000).cuda(), torch.tensor([3], device="cuda")
    options = {name: torch.full((24,), float(value), device="cuda") for name, value in options.items()}
    sample(logits, seed, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = sample(logits, seed, **options)
    for step in range(3):
        seed.fill_(step)
        for value in options.values():
            value.copy_(0.9 * value)
        logits.copy_(rows(24, 60_000, seed=step))
        graph.replay()
        for a, b in zip(drawn, sample(logits, seed, **options), strict=True):
            assert torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0))


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6}, {"top_k": 4}, {"temperature": 1.5, "top_p": 0.7}, {"min_p": 0.2}],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [9, 3000])
def test_tokens_are_as_frequent_as_they_should_be(vocab, dtype, options):
    """A million draws. Tokens that are expected less than 20 times count as one."""
    count = 1_000_000
    logits = (1.5 * torch.randn(1, vocab, generator=torch.Generator().manual_seed(vocab))).to(dtype)
    counts = torch.zeros(vocab, dtype=torch.float64)
    for part in range(2):
        token = sample(logits.cuda().expand(count // 2, -1), SEED.cuda() + part, **options).token
        counts += token.bincount(minlength=vocab).double().cpu()
    expected = count * exact(logits, **options)[1][0]
    assert (counts[expected == 0] == 0).all()
    rare = expected < 20
    counts, expected = (torch.cat((x[~rare], x[rare].sum()[None])) for x in (counts, expected))
    statistic = ((counts - expected) ** 2 / expected)[expected > 0].sum()
    freedom = (expected > 0).sum() - 1
    assert statistic < freedom + 4.5 * (2 * freedom).sqrt() + 8


def test_the_edge_of_top_p_is_exact():
    """The token at which the mass passes top_p is kept, the next is dropped, and both are exactly at the edge."""
    # At this temperature the kernels' exponents are these integers, so that every mass is a power of 2.
    temperature = 1.44269504
    edges = ((0.5, 1), (0.500001, 2), (0.75, 2), (0.7501, 3), (0.875, 3), (0.876, 5), (0.0, 1), (1.0, 5))
    for dtype in DTYPES:
        logits = torch.tensor([[-1.0, -2.0, -3.0, -4.0, -4.0]], device="cuda", dtype=dtype)
        for top_p, kept in edges:
            token = sample(logits.expand(20_000, -1), 1, temperature=temperature, top_p=top_p).token
            assert token.max().item() < kept and (token.bincount(minlength=5)[:kept] > 0).all()


SPREADS = [(1, 0), (1, 1e-6), (1, 0.01), (1, 1), (1, 30), (1, 1e30), (0, 1), (-9, 1)]
PIVOTS = [
    {"top_p": 0.9},
    {"top_p": 0.84},
    {"top_k": 20_000},
    {"top_k": 25_000},
    {"top_k": 3},
    {"top_k": 9000, "top_p": 0.5},
]


@pytest.mark.parametrize(("centre", "spread"), SPREADS)
@pytest.mark.parametrize("options", PIVOTS, ids=str)
def test_pivots_of_any_spread(centre, spread, options):
    """Logits that are all equal, nearly equal, and far apart, of both signs; some at the far end of the range.

    With a centre of 0, a top_p of 0.84 and half of the tokens end next to 0, where bfloat16 has too many numbers to
    tell them apart at once.
    """
    for dtype in DTYPES:
        vocab = 50_000
        logits = centre + spread * torch.randn(4, vocab, generator=torch.Generator().manual_seed(1))
        logits = logits.clamp(-3e38, 3e38) if dtype != torch.float16 else logits.clamp(-6e4, 6e4)
        logits[1, ::7], logits[2, ::3] = torch.finfo(dtype).min, -math.inf
        logits = logits.to(dtype)
        drawn = sample(logits.cuda(), SEED.cuda(), **options)
        p, q = exact(logits, **options)
        kept = (logits.float() >= drawn.pivot.cpu()[:, None]) & (logits > -math.inf)
        differs = kept != (reference.filter_logits(logits.double(), **options) > -math.inf)
        assert p.masked_fill(~differs, 0).sum(-1).le(2e-5).all()
        assert (q.gather(1, drawn.token.cpu()[:, None]) > 0).all() or differs.any()


def test_a_million_rows_and_more_than_2_31_logits():
    drawn = sample(torch.zeros(1, 5, device="cuda").expand(1_000_000, -1), 1)
    assert drawn.token.bincount(minlength=5).min() > 190_000
    logits = torch.zeros(9000, 250_000, dtype=torch.bfloat16, device="cuda")
    logits[-1, 77] = 30.0
    assert sample(logits[-1:], 1).token.item() == sample(logits, 1).token[-1].item() == 77


def test_reference_agrees_on_the_gpu():
    logits = rows(16, 3000).clamp(-20, 20).cuda()
    uniform = uniforms_of(SEED.cuda(), SAMPLE, 16, 1)[:, 0]
    for options in FILTERS.values():
        got, want = sample(logits, SEED.cuda(), **options), reference.sample(logits, uniform, **options)
        for name in ("prob", "logprob", "entropy", "margin", "max_prob", "normaliser"):
            a, b = getattr(got, name), getattr(want, name)
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
