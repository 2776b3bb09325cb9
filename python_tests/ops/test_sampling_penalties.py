"""Penalties and the logit bias of sample and verify, and the counts that they need."""

import math

import pytest
import torch

from dflash_ext import count_tokens_, reference, sample, verify

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FILTERS = [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 5}, {"temperature": 1.3, "top_p": 0.9}]


def tables(rows, vocab, seed=0):
    """Counts and a bias in which some tokens are banned; a few counts are large."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(-1, 3, (rows, vocab), generator=generator)
    counts = torch.where(torch.rand(rows, vocab, generator=generator) < 0.5, 0, counts).int()
    bias = torch.randn(rows, vocab, generator=generator)
    banned = torch.rand(rows, vocab, generator=generator) < 0.1
    banned[:, vocab // 2] = False
    return counts, bias.masked_fill(banned, -math.inf)


def numbers_of(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "repetition_penalty": 0.7 + torch.rand(rows, generator=generator),
        "presence_penalty": torch.randn(rows, generator=generator),
        "frequency_penalty": torch.randn(rows, generator=generator) / 2,
    }


def moved(given, device):
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}


def case(rows, vocab, dtype, form, seed=0):
    """Logits, and the penalties of one of several forms."""
    generator = torch.Generator().manual_seed(seed + 1)
    logits = (2 * torch.randn(rows, vocab, generator=generator)).to(dtype)
    counts, bias = tables(rows + 2, vocab, seed)
    own = {"token_counts": counts[:rows].contiguous(), "logit_bias": bias[:rows]} | numbers_of(rows, seed)
    given = {
        "all": own,
        "counts alone": {"token_counts": own["token_counts"], "frequency_penalty": 0.3, "repetition_penalty": 1.2},
        "one bias": {"logit_bias": bias[0]},
        "tables of other rows": own
        | {
            "token_counts": counts,
            "logit_bias": bias,
            "table_rows": torch.randperm(rows + 2, generator=generator)[:rows],
        },
    }[form]
    return logits, given


FORMS = ["all", "counts alone", "one bias", "tables of other rows"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_draw_is_one_from_the_penalised_logits(form, dtype, device):
    """The same token and the same measures as of logits that were penalised before, for the same seed."""
    for vocab in (1, 7, 64, 1003, 9000):
        logits, given = case(6, vocab, dtype, form, vocab)
        logits, given = logits.to(device), moved(given, device)
        penalised = reference.penalised_logits(logits, **given)
        for options in FILTERS:
            more = {"return_filtered_entropy": True, "return_confidence": True}
            got, *own = sample(logits, 3, **options, **given, **more)
            want, *others = sample(penalised, 3, **options, **more)
            assert torch.equal(got.token, want.token) and torch.equal(got.argmax, want.argmax)
            for a, b in zip((*got, *own), (*want, *others), strict=True):
                torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_draft_is_verified_against_the_penalised_target(form, dtype, device):
    """Slot k counts the drafts before k. Drafts repeat tokens, and some are of the prompt."""
    rows, drafted = 5, 4
    accepted = set()
    for vocab in (3, 40, 1500):
        generator = torch.Generator().manual_seed(vocab)
        _, given = case(rows, vocab, dtype, form, vocab)
        target = torch.randn(rows, drafted + 1, vocab, generator=generator).to(dtype).to(device)
        drafter = torch.randn(rows, drafted, vocab, generator=generator).to(dtype).to(device)
        draft = torch.randint(0, min(vocab, 4), (rows, drafted), generator=generator).to(device)
        target.scatter_add_(2, draft[..., None], torch.full((rows, drafted, 1), 4.0, dtype=dtype, device=device))
        given = moved(given, device)
        uniforms = torch.rand(rows, drafted + 1, dtype=torch.float64, generator=generator).to(device)
        for options in FILTERS:
            options = {"temperature": 1.0} | options
            for more in ({}, {"draft_logits": drafter}, {"draft_lens": torch.arange(rows, device=device)}):
                arguments = {"uniforms": uniforms} | options | given | more
                got, want = verify(draft, target, **arguments), reference.verify(draft, target, **arguments)
                assert torch.equal(got.accepted, want.accepted) and torch.equal(got.next_token, want.next_token)
                accepted |= set(got.accepted.tolist())
    assert len(accepted) > 2


@pytest.mark.parametrize("form", ["point mass", "described"])
def test_verified_tokens_are_distributed_as_plain_decoding_with_penalties(form, device):
    """Two tokens of one row: the second is of a distribution in which the first has been counted."""
    vocab, count = 5, 40_000 if device == "cpu" else 1_000_000
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(1, 3, vocab, generator=generator)
    drafter = torch.randn(1, 2, vocab, generator=generator)
    counts = torch.tensor([[0, -1, 2, 0, 1]], dtype=torch.int32)
    numbers = {"repetition_penalty": 1.5, "presence_penalty": 0.4, "frequency_penalty": 0.6}
    bias = torch.tensor([0.0, 0.5, 0.0, -math.inf, 0.0])
    given = moved(numbers | {"token_counts": counts.repeat(count, 1), "logit_bias": bias}, device)
    z, d = (x.to(device).expand(count, -1, -1) for x in (target, drafter))
    drawn = sample(d.reshape(-1, vocab), 1)
    draft = drawn.token.view(count, 2)
    more = {}
    if form == "described":
        pivot, normaliser = (x.view(count, 2) for x in (drawn.pivot, drawn.normaliser))
        more = {"draft_logits": d, "draft_pivot": pivot, "draft_normaliser": normaliser}
    got = verify(draft, z, seed=2, temperature=1.0, **given, **more)
    first = torch.where(got.accepted > 0, draft[:, 0], got.next_token)
    # After a rejection of the first, the second token is one of the next cycle, which has counted the first.
    after = count_tokens_(given["token_counts"].clone(), first[:, None])
    fresh = sample(z[:, 1].contiguous(), 3, **given | {"token_counts": after}).token
    second = torch.where(got.accepted > 1, draft[:, 1], torch.where(got.accepted == 1, got.next_token, fresh))
    pairs = (first * vocab + second).bincount(minlength=vocab * vocab).double().cpu()
    expected = torch.zeros(vocab, vocab, dtype=torch.float64)
    p = reference.penalised_logits(target[:, 0].double(), **numbers, token_counts=counts, logit_bias=bias).softmax(-1)[
        0
    ]
    for token in range(vocab):
        then = count_tokens_(counts.clone(), torch.tensor([[token]]))
        row = reference.penalised_logits(target[:, 1].double(), **numbers, token_counts=then, logit_bias=bias)
        expected[token] = count * p[token] * row.softmax(-1)[0]
    expected = expected.flatten()
    assert (pairs[expected == 0] == 0).all()
    assert ((pairs - expected) ** 2 / expected)[expected > 0].sum() < 42  # 15 degrees of freedom: p = 0.0002


def test_leading_dimensions_and_numbers_without_dimensions():
    logits, given = case(6, 50, torch.float32, "all")
    want = sample(logits, 3, **given)
    shaped = given | {name: x.view(2, 3) for name, x in given.items() if x.dim() == 1}
    got = sample(logits.view(2, 3, 50), 3, **shaped)
    assert torch.equal(got.token.flatten(), want.token)
    one = given | {"presence_penalty": torch.tensor(0.3), "repetition_penalty": 1.1}
    many = given | {"presence_penalty": torch.full((6,), 0.3), "repetition_penalty": torch.full((6,), 1.1)}
    assert torch.equal(sample(logits, 3, **one).prob, sample(logits, 3, **many).prob)


def test_penalties_that_are_off_change_nothing(device):
    logits, given = case(6, 300, torch.float32, "all")
    logits, counts = logits.to(device), given["token_counts"].to(device)
    want = sample(logits, 3, top_p=0.9)
    for off in (1.0, torch.full((6,), -2.0), torch.full((6,), math.nan)):
        off = off.to(device) if isinstance(off, torch.Tensor) else off
        nan = torch.full((6,), math.nan, device=device)
        got = sample(logits, 3, top_p=0.9, repetition_penalty=off, frequency_penalty=nan, token_counts=counts)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_bans_and_certain_tokens(device):
    logits = torch.randn(4, 90, device=device)
    bias = torch.full((90,), -math.inf, device=device)
    bias[17] = 0.0
    for options in FILTERS:
        drawn = sample(logits, 1, logit_bias=bias, **options)
        assert (drawn.token == 17).all() and (drawn.prob == 1).all()
    bias = torch.zeros(4, 90, device=device)
    bias[:, 23] = math.inf
    assert (sample(logits, 1, logit_bias=bias).token == 23).all()
    assert (sample(logits, 1, logit_bias=bias.neg()).token != 23).all()


def test_counts_of_tokens(device):
    counts = torch.zeros(4, 6, dtype=torch.int32, device=device)
    rows = torch.tensor([2, 0], device=device)
    prompt = torch.tensor([[1, 1, 3, 0], [5, -1, 6, 0]], device=device)
    assert (
        count_tokens_(counts, prompt, lens=torch.tensor([3, 4], device=device), table_rows=rows, prompt=True) is counts
    )
    assert counts.tolist() == [[-1, 0, 0, 0, 0, -1], [0] * 6, [0, -1, 0, -1, 0, 0], [0] * 6]
    output = torch.tensor([[1, 1, 2, 9], [0, 4, 4, 4]], device=device)
    count_tokens_(counts, output, lens=torch.tensor([4, 3], device=device), table_rows=rows)
    assert counts.tolist() == [[1, 0, 0, 0, 2, -1], [0] * 6, [0, 2, 1, -1, 0, 0], [0] * 6]
    count_tokens_(counts, prompt[:1, :1].expand(4, 1), prompt=True)
    assert counts.tolist() == [[1, -1, 0, 0, 2, -1], [0, -1, 0, 0, 0, 0], [0, 2, 1, -1, 0, 0], [0, -1, 0, 0, 0, 0]]


def test_compiles_without_a_break():
    logits, given = case(4, 60, torch.float32, "tables of other rows")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(logits, seed, counts, bias, rows):
        drawn = sample(logits, seed, token_counts=counts, logit_bias=bias, table_rows=rows, frequency_penalty=0.5)
        count_tokens_(counts, drawn.token[:, None], table_rows=rows)
        return drawn.token

    counts, bias, rows = (given[name] for name in ("token_counts", "logit_bias", "table_rows"))
    want = sample(logits, 3, token_counts=counts, logit_bias=bias, table_rows=rows, frequency_penalty=0.5).token
    counted = count_tokens_(counts.clone(), want[:, None], table_rows=rows)
    assert torch.equal(compiled(logits, torch.tensor([3]), counts, bias, rows), want)
    assert torch.equal(counts, counted)


COUNTS = torch.zeros(3, 4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"presence_penalty": 0.5, "frequency_penalty": torch.ones(3)},
            "presence_penalty, frequency_penalty needs token",
        ),
        ({"repetition_penalty": 0.0, "token_counts": COUNTS}, "repetition_penalty is 0.0; a number from 1e-30"),
        ({"repetition_penalty": math.inf, "token_counts": COUNTS}, "repetition_penalty is inf; a number from"),
        ({"presence_penalty": math.nan, "token_counts": COUNTS}, "presence_penalty is nan"),
        ({"presence_penalty": torch.ones(2), "token_counts": COUNTS}, r"presence_penalty is a tensor \[2\]"),
        ({"token_counts": COUNTS.long()}, r"token_counts is torch.int64 \[3, 4\]; contiguous int32 \[3, 4\]"),
        ({"token_counts": COUNTS[:2]}, r"token_counts is torch.int32 \[2, 4\]"),
        ({"token_counts": COUNTS[:, :3]}, r"token_counts is torch.int32 \[3, 3\]"),
        ({"token_counts": COUNTS, "table_rows": torch.zeros(2).long()}, r"table_rows is torch.int64 \[2\]; int \[3\]"),
        ({"logit_bias": torch.zeros(5)}, r"logit_bias is torch.float32 \[5\]; floating \[4\] or \[3, 4\]"),
        ({"logit_bias": torch.zeros(2, 4)}, r"logit_bias is torch.float32 \[2, 4\]"),
    ],
)
def test_refusals_name_the_value(given, message):
    for call in (
        lambda: sample(torch.zeros(3, 4), 1, **given),
        lambda: verify(torch.zeros(3, 1).long(), torch.zeros(3, 2, 4), **given),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_table_row_that_does_not_exist_is_named():
    with pytest.raises(RuntimeError, match="table_rows is 3 for row 1, and there is no such row"):
        sample(torch.zeros(2, 4), 1, token_counts=COUNTS, table_rows=torch.tensor([0, 3]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: count_tokens_(COUNTS, torch.zeros(2, 1).long()),
            r"token_counts is torch.int32 \[3, 4\]; contiguous int32 \[2",
        ),
        (lambda: count_tokens_(COUNTS, torch.zeros(3).long()), r"tokens is torch.int64 \[3\]; int64 \[B, K\]"),
        (lambda: count_tokens_(COUNTS, torch.zeros(3, 1).long(), lens=torch.ones(3)), "lens is torch.float32"),
        (lambda: count_tokens_(COUNTS.T, torch.zeros(4, 1).long()), "contiguous int32"),
    ],
)
def test_counting_refuses_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()
