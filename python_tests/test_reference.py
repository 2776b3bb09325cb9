"""The definitions themselves, against PyTorch's own functions and against rules written out row by row."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_ext import IntervalMask, reference

examples = settings(max_examples=40, deadline=None)


def randn(*shape, seed=0, **options):
    options.setdefault("dtype", torch.float64)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


def chi_square_p(counts, probs):
    """p-value of counts under probs, by the Wilson-Hilferty normal approximation."""
    expected = probs * counts.sum()
    assert (counts[expected == 0] == 0).all()
    counts, expected = counts[expected > 0].double(), expected[expected > 0].double()
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = counts.numel() - 1
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


# ---- attention -------------------------------------------------------------------------------------------

MASKS = {
    "prefix_block": IntervalMask.prefix_block(9, 4),
    "block_diffusion": IntervalMask.block_diffusion(4, 2),
    "by row": IntervalMask.causal(torch.tensor([5, 7]), max_len=7),
    "anchors, one dropped": IntervalMask.anchor_blocks(
        5, torch.tensor([[4, 1], [2, 3]]), 2, keep=torch.tensor([[True, False], [True, True]])
    ),
}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_block_attn_is_sdpa_and_its_lse_the_log_of_the_row_sums(mask, kv_heads):
    q = randn(2, 4, mask.q_len, 8)
    k, v = randn(2, 2, kv_heads, mask.kv_len, 8, seed=1)
    out, lse = reference.block_attn(q, k, v, mask, scale=0.3, return_lse=True)
    visible = mask.to_bool()
    some = visible.any(-1, keepdim=True).expand(2, 4, -1, -1)
    want = F.scaled_dot_product_attention(q, k, v, visible, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out[some[..., 0]], want[some[..., 0]])
    sums = ((q @ k.repeat_interleave(4 // kv_heads, 1).mT * 0.3).exp() * visible).sum(-1)
    torch.testing.assert_close(lse, sums.log())
    assert (out[~some[..., 0]] == 0).all() and (lse[~some[..., 0]] == -math.inf).all()


def test_block_attn_softcap():
    q, k, v = randn(3, 1, 2, 6, 8) * 3
    mask = IntervalMask.causal(6)
    scores = 2.0 * torch.tanh((q @ k.mT) * 8**-0.5 / 2.0)
    want = scores.masked_fill(~mask.to_bool(), -math.inf).softmax(-1) @ v
    torch.testing.assert_close(reference.block_attn(q, k, v, mask, softcap=2.0), want)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_block_attn_gradients_of_output_and_lse(softcap):
    mask = MASKS["anchors, one dropped"]
    q = randn(2, 2, mask.q_len, 4).requires_grad_()
    k, v = (x.requires_grad_() for x in randn(2, 2, 1, mask.kv_len, 4, seed=1))
    empty = ~mask.to_bool().any(-1).expand(-1, 2, -1)

    def attend(q, k, v):
        out, lse = reference.block_attn(q, k, v, mask, softcap=softcap, return_lse=True)
        return out, lse.masked_fill(empty, 0.0)

    assert torch.autograd.gradcheck(attend, (q, k, v))
    out, lse = reference.block_attn(q, k, v, mask, softcap=softcap, return_lse=True)
    grads = torch.autograd.grad((out.sum() + lse.sum()), (q, k, v))
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][empty] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_also_under_autocast(dtype):
    q, k, v = randn(3, 1, 2, 6, 8).to(dtype)
    mask = IntervalMask.causal(6)
    want = reference.block_attn(q.float(), k.float(), v.float(), mask)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = reference.block_attn(q, k, v, mask, return_lse=True)
        wide = reference.block_attn(q.float(), k.float(), v.float(), mask)
    assert torch.equal(out, want.to(dtype)) and torch.equal(wide, want) and lse.dtype == torch.float32


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["k", "v"])
def test_a_broken_key_reaches_the_rows_that_see_it_and_no_other(which, broken):
    mask = MASKS["by row"]  # of 5 and 7 tokens, causal: key 3 is seen from row 3 on
    q = randn(2, 4, mask.q_len, 8)
    k, v = randn(2, 2, 2, mask.kv_len, 8, seed=1)
    want = reference.block_attn(q, k, v, mask)
    (k if which == "k" else v)[:, :, 3] = broken
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = reference.block_attn(*leaves, mask)
    sees = mask.to_bool()[:, 0, :, 3][:, None].expand(-1, 4, -1)
    assert sees.any() and not sees.all()
    assert torch.equal(out[~sees], want[~sees]) and out[sees].isnan().all()
    if which == "v":
        grads = torch.autograd.grad(out[~sees].sum(), leaves)
        assert all(grad.isfinite().all() for grad in grads)


def test_decode_reads_contiguous_and_paged_caches_and_nothing_outside_the_intervals():
    cached, block_len, page_size = torch.tensor([3, 6]), 2, 4
    mask = IntervalMask.decode(cached, block_len, kv_len=10)
    q = randn(2, 4, block_len, 8)
    k, v = randn(2, 2, 2, 12, 8, seed=1)
    want = reference.block_attn(q, k[:, :, :10], v[:, :, :10], mask)
    hidden = torch.arange(12) >= (cached + block_len)[:, None]
    k, v = (x.masked_fill(hidden[:, None, :, None], math.nan) for x in (k, v))
    torch.testing.assert_close(reference.block_attn_decode(q, k, v, mask), want)

    table = torch.tensor([[4, 1, -1], [0, 3, 2]], dtype=torch.int32)
    pages = torch.full((2, 5, page_size, 2, 8), math.nan, dtype=torch.float64)
    for cache, paged in zip((k, v), pages, strict=True):
        for b, row in enumerate(table.tolist()):
            for j, page in enumerate(row):
                if page >= 0:
                    paged[page] = cache[b, :, j * page_size : (j + 1) * page_size].transpose(0, 1)
    torch.testing.assert_close(reference.block_attn_decode(q, *pages, mask, block_table=table), want)


# ---- loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_cross_entropy_is_pytorchs_with_a_weight_per_row(reduction, smoothing):
    logits, target = randn(2, 3, 7) * 3, torch.tensor([[0, 6, 3], [2, 99, -5]])
    weight = torch.tensor([[1.0, 0.5, 2.0], [0.25, 0.0, 0.0]])
    safe = target.where(weight != 0, 0)
    each = F.cross_entropy(logits.flatten(0, 1), safe.flatten(), reduction="none", label_smoothing=smoothing)
    want = each.view(2, 3) * weight
    want = {"none": want, "sum": want.sum(), "mean": want.sum() / weight.sum()}[reduction]
    logits[1, 2] = math.nan
    logits.requires_grad_()
    got = reference.masked_cross_entropy(logits, target, weight, reduction=reduction, label_smoothing=smoothing)
    torch.testing.assert_close(got.loss, want)
    (grad,) = torch.autograd.grad(got.loss.sum(), logits)
    assert (grad[1, 1:] == 0).all() and (grad[0] != 0).all()


def test_cross_entropy_statistics_per_row():
    logits, target = randn(5, 7), torch.arange(5)
    logits[3, 3], logits[4, :3] = 9.0, -math.inf
    weight = torch.tensor([1.0, 1.0, 0.0, 3.0, 1.0])
    got = reference.masked_cross_entropy(logits, target, weight)
    rows = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(got.nll, -rows.log_prob(target) * (weight != 0))
    probs = rows.probs
    entropy = -(probs * probs.clamp(min=1e-300).log()).sum(-1)
    torch.testing.assert_close(got.entropy, entropy * (weight != 0))
    assert got.correct.tolist() == [bool(i != 2 and logits[i].argmax() == i) for i in range(5)]
    assert got.correct[3] and not got.nll.requires_grad


def test_cross_entropy_without_any_weight_is_zero():
    logits = randn(3, 4).requires_grad_()
    loss = reference.masked_cross_entropy(logits, torch.zeros(3).long(), torch.zeros(3)).loss
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss == 0 and (grad == 0).all()


@pytest.mark.parametrize("kind", ["kl", "tv"])
def test_cross_entropy_with_softcap_z_loss_and_teacher(kind):
    logits, teacher = randn(3, 6) * 4, randn(3, 6, seed=1)
    teacher[:, 0] = -math.inf
    target = torch.tensor([1, 2, 3])
    got = reference.masked_cross_entropy(
        logits,
        target,
        reduction="none",
        softcap=3.0,
        z_loss=0.1,
        label_smoothing=0.1,
        teacher=teacher,
        teacher_kind=kind,
        teacher_mix=0.25,
    ).loss
    z = 3.0 * torch.tanh(logits / 3.0)
    logp, t = z.log_softmax(-1), teacher.softmax(-1)
    if kind == "kl":
        divergence = F.kl_div(logp, t, reduction="none").sum(-1)
    else:
        divergence = (t - logp.exp()).abs().sum(-1) / 2
    hard = F.cross_entropy(z, target, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(got, 0.75 * hard + 0.25 * divergence + 0.1 * z.logsumexp(-1) ** 2)

    logits.requires_grad_()
    options = dict(softcap=3.0, z_loss=0.1, teacher=teacher, teacher_kind=kind, teacher_mix=0.25)
    assert torch.autograd.gradcheck(
        lambda x: reference.masked_cross_entropy(x, target, reduction="none", **options).loss, logits
    )


def test_linear_cross_entropy_is_the_loss_of_the_products():
    hidden, head, target = randn(5, 4), randn(7, 4, seed=1), torch.tensor([0, 1, 2, 3, 4])
    weight = torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0])
    got = reference.linear_cross_entropy(hidden, head, target, weight, max_rows=3, label_smoothing=0.1)
    want = reference.masked_cross_entropy(hidden @ head.T, target, weight, label_smoothing=0.1)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="3 rows have a weight, more than max_rows = 2"):
        reference.linear_cross_entropy(hidden, head, target, weight, max_rows=2)


# ---- sampling --------------------------------------------------------------------------------------------

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


@examples
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


# ---- verification ----------------------------------------------------------------------------------------


@examples
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


# ---- reveal ----------------------------------------------------------------------------------------------


def revealed(scores, masked, entropy, rule, limit):
    """The positions of one row, from the rules."""
    order = sorted((i for i, m in enumerate(masked) if m), key=lambda i: (-scores[i], i))
    if rule == "count":
        return set(order[:limit])
    if rule == "threshold":
        return set(order[:1]) | {i for i in order if scores[i] > limit}
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


@examples
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
@pytest.mark.parametrize("steps", [1, 3, 8, 20])
def test_reveal_counts_add_up(schedule, steps):
    total = torch.tensor([0, 1, 7, 8, 33])
    counts = torch.stack([reference.reveal_count(total, s, steps, schedule=schedule) for s in range(steps)])
    assert torch.equal(counts.sum(0), total) and (counts >= 0).all() and counts.dtype == total.dtype
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
