"""soft_embedding against its definition in float64."""

import importlib
import math

import pytest
import torch

from dflash_ext import reference, sample, sample_and_embed, soft_embedding

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(rows, vocab, width, dtype, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, vocab, generator=generator)
    return logits.to(dtype).to(device), torch.randn(vocab, width, generator=generator).to(dtype).to(device)


def exact(logits, embedding, **options):
    options = {n: x.double() if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    return reference.soft_embedding(logits.double(), embedding.double(), **options)


def error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.4}, {"softcap": 5.0}, {"temperature": 2.5, "softcap": 30.0}], ids=str
)
def test_matches_the_definition(options, dtype, device):
    for rows, vocab, width in ((1, 1, 8), (3, 7, 16), (5, 1000, 24), (4, 9001, 64), (40, 30_011, 8)):
        logits, embedding = inputs(rows, vocab, width, dtype, device)
        got, want = soft_embedding(logits, embedding, **options), exact(logits, embedding, **options)
        p = torch.softmax(torch.zeros_like(logits), -1)  # what torch's own product of this dtype is off by
        plain = error(p @ embedding, p.double() @ embedding.double())
        assert got.shape == (rows, width) and got.dtype == dtype
        assert error(got, want) < max(1.5 * plain, 2 * torch.finfo(dtype).eps + 1e-6)


def test_a_temperature_per_row_and_leading_dimensions(device):
    logits, embedding = inputs(6, 500, 16, torch.float32, device)
    temperature = torch.tensor([[0.5, 1.0, 2.0], [0.7, 1.5, 1.0]], device=device)
    got = soft_embedding(logits.view(2, 3, 500), embedding, temperature=temperature)
    want = exact(logits, embedding, temperature=temperature.flatten())
    assert got.shape == (2, 3, 16) and error(got.view(6, 16), want) < 1e-5
    scalar = soft_embedding(logits, embedding, temperature=torch.tensor(0.7, device=device))
    assert torch.equal(scalar, soft_embedding(logits, embedding, temperature=0.7))


def test_logits_that_are_not_finite(device):
    logits, embedding = inputs(5, 9000, 16, torch.float32, device)
    logits[0, 5:8990], logits[1, ::2], logits[2], logits[3, 8999] = -math.inf, math.nan, math.nan, math.inf
    logits[4] *= 1000
    got, want = soft_embedding(logits, embedding), exact(logits, embedding)
    assert got[2].isnan().all()
    for row in (0, 1, 3, 4):
        assert error(got[row], want[row]) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_later_chunks_may_hold_much_larger_logits(dtype, device, monkeypatch):
    module = importlib.import_module("dflash_ext.ops.soft_embedding")
    monkeypatch.setattr(module, "_WEIGHTS_AT_A_TIME", 0)  # the least chunks
    logits, embedding = inputs(100, 13_000, 8, dtype, device)
    logits[:, 5000:] += 60
    logits[:, 10_000:] += 200
    logits[1::2, :5000] = -math.inf
    assert error(soft_embedding(logits, embedding), exact(logits, embedding)) < 4 * torch.finfo(dtype).eps + 1e-4


def test_a_flat_distribution_loses_nothing_to_rounding(device):
    """A probability of 1 / 152,000 is a float16 of few bits."""
    embedded = soft_embedding(torch.zeros(1, 152_000, device=device), torch.ones(152_000, 8, device=device).half())
    assert (embedded - 1).abs().max() <= 2 * torch.finfo(torch.float16).eps


def test_equal_logits_at_a_low_temperature_share_the_mass(device):
    logits, embedding = inputs(2, 70, 16, torch.float32, device)
    logits[:, 3::10] = 31.0  # over the temperature, a number beside which the logarithm of 7 is small
    for temperature in (1e-3, torch.tensor([1e-5, 1e-8], device=device)):
        got = soft_embedding(logits, embedding, temperature=temperature)
        assert error(got, embedding[3::10].double().mean(0).expand(2, -1)) < 1e-5


def test_strides_and_no_rows(device):
    logits, embedding = inputs(6, 1000, 16, torch.bfloat16, device)
    view = logits[::2, 3:900]
    want = soft_embedding(view.contiguous(), embedding[3:900])
    assert error(soft_embedding(view, embedding[3:900]), want.double()) < 1e-2
    assert soft_embedding(logits[:0], embedding).shape == (0, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 4).long(), torch.zeros(4, 2)), "logits is torch.int64"),
        ((torch.zeros(3, 4), torch.zeros(5, 2)), r"embedding is torch.float32 \[5, 2\]; floating \[4, H\]"),
        ((torch.zeros(3, 4), torch.zeros(4, 2), {"temperature": 0.0}), "temperature is 0.0; a number above 0"),
        ((torch.zeros(3, 4), torch.zeros(4, 2), {"temperature": torch.ones(2)}), r"temperature is a tensor \[2\]"),
        ((torch.zeros(3, 4), torch.zeros(4, 2), {"softcap": math.inf}), "softcap is inf; it must be positive"),
    ],
)
def test_refusals_name_the_value(arguments, message):
    logits, embedding, *options = arguments
    with pytest.raises(ValueError, match=message):
        soft_embedding(logits, embedding, **(options[0] if options else {}))


def test_compiles_without_graph_breaks(device):
    logits, embedding = inputs(4, 9001, 16, torch.float32, device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(logits, embedding, temperature):
        return soft_embedding(logits, embedding, temperature=temperature, softcap=30.0)

    temperature = torch.tensor([0.5, 1.0, 2.0, 0.7], device=device)
    want = soft_embedding(logits, embedding, temperature=temperature, softcap=30.0)
    torch.testing.assert_close(compiled(logits, embedding, temperature), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.4}, {"temperature": 2.5, "softcap": 30.0}], ids=str)
@pytest.mark.parametrize("vocab", [8, 4104, 9001, 40_000])
def test_a_draw_and_its_expected_embedding(options, dtype, vocab, device):
    logits, embedding = inputs(12, vocab, 24, dtype, device)
    seed = torch.arange(12, device=device).view(3, 4)
    drawn, embedded = sample_and_embed(logits.view(3, 4, vocab), embedding, seed, **options)
    alone = sample(logits.view(3, 4, vocab), seed, **options)
    want = soft_embedding(logits, embedding, **options).double()
    assert embedded.shape == (3, 4, 24) and embedded.dtype == dtype
    assert error(embedded.view(12, 24), want) < 4 * torch.finfo(dtype).eps
    for name, got, expected in zip(alone._fields, drawn, alone, strict=True):
        if got.dtype == torch.int64:
            assert torch.equal(got, expected), name
        else:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_a_draw_with_an_embedding_from_logits_that_are_not_finite(softcap, device):
    """Late logits that are much larger, too, which the first ones of a row do not announce."""
    logits, embedding = inputs(8, 16_384, 16, torch.bfloat16, device)
    logits[0, 5:16_000], logits[1, ::2], logits[2], logits[3, 9999] = -math.inf, math.nan, math.nan, math.inf
    logits[4, 12_000:] += 200
    logits[5, :8000], logits[6] = -math.inf, -math.inf
    logits[7] *= 1000
    options = {"temperature": 0.05, "softcap": softcap}
    drawn, embedded = sample_and_embed(logits, embedding, 5, **options)
    want, alone = soft_embedding(logits, embedding, **options), sample(logits, 5, **options)
    torch.testing.assert_close(embedded, want, rtol=2e-2, atol=2e-2, equal_nan=True)
    assert embedded[2].isnan().all() and torch.equal(drawn.token, alone.token)
    torch.testing.assert_close(drawn.max_prob, alone.max_prob, rtol=1e-3, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(drawn.entropy, alone.entropy, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_a_draw_with_an_embedding_refuses_what_does_not_fit():
    logits, embedding = inputs(3, 8, 4, torch.float32)
    with pytest.raises(ValueError, match="sample_and_embed: temperature is 0; a number above 0"):
        sample_and_embed(logits, embedding, 1, temperature=0)
    with pytest.raises(ValueError, match="sample_and_embed: embedding is"):
        sample_and_embed(logits, embedding[:5], 1)
    with pytest.raises(TypeError, match="seed is"):
        sample_and_embed(logits, embedding, "1")
