"""verify on a GPU against its definition and the CPU kernel, and its output against the target's distribution."""

import math

import pytest
import torch

from dflash_ext import reference, sample, verify
from python_tests.ops.test_verify import DRAFTED, OPTIONS, case, same

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def moved(given, device="cuda"):
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}


def cpu(got):
    return type(got)(*(x.cpu() for x in got))


@pytest.mark.parametrize("form", ["logits", "described", "point mass"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_matches_the_cpu_kernel(options, form):
    lengths, wrong = set(), 0
    for seed, vocab in enumerate([2, 9, 63, 1030, 2500, 40, 300, 5, 20_011, 50_000]):
        for dtype in DTYPES:
            draft, target, given = case(vocab, dtype, form, options, seed)
            lens = torch.tensor([0, 1, 2, 3, 4, 5])
            short = draft.where(torch.arange(DRAFTED) < lens[:, None], -7)
            for tokens, more in ((draft, {}), (short, {"draft_lens": lens.int()})):
                got = cpu(verify(tokens.cuda(), target.cuda(), **moved(given | more)))
                want = verify(tokens, target, **given, **more)
                wrong += (got.accepted != want.accepted).sum() + (got.next_token != want.next_token).sum()
                lengths |= set(got.accepted.tolist())
    assert {0, DRAFTED} <= lengths and len(lengths) > 3
    assert wrong <= 2  # of 720: where a uniform number lies within rounding of an edge


@pytest.mark.parametrize("form", ["logits", "described", "point mass"])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7, "top_k": 3}, {"temperature": 1.3, "top_p": 0.8, "min_p": 0.05}],
    ids=str,
)
@pytest.mark.parametrize("distance", [0.3, 1.5])
def test_the_output_is_distributed_as_the_targets(distance, options, form):
    """A million drafts of two tokens, drawn from another distribution: the first two tokens are the target's."""
    options = {"temperature": 1.0} | options
    vocab, count = 7, 500_000
    generator = torch.Generator().manual_seed(1)
    target = 1.5 * torch.randn(1, 3, vocab, generator=generator)
    drafter = target[:, :2] + distance * torch.randn(1, 2, vocab, generator=generator)
    pairs = torch.zeros(vocab * vocab, dtype=torch.float64)
    for part in range(2):
        z, d = (x.cuda().expand(count, -1, -1) for x in (target, drafter))
        drawn = sample(d.reshape(-1, vocab), part, **options)
        given = {} if form == "point mass" else {"draft_logits": d}
        if form == "described":
            given |= {"draft_pivot": drawn.pivot.view(count, 2), "draft_normaliser": drawn.normaliser.view(count, 2)}
        draft = drawn.token.view(count, 2)
        got = verify(draft, z, seed=part, **given, **options)
        first = torch.where(got.accepted > 0, draft[:, 0], got.next_token)
        # After a rejection the second token comes from the next cycle, whose draft has the second position alone.
        again = verify(
            draft[:, 1:],
            z[:, 1:],
            seed=part + 100,
            **{name: x[:, 1:] for name, x in given.items()},
            **options,
        )
        fresh = torch.where(again.accepted > 0, draft[:, 1], again.next_token)
        second = torch.where(got.accepted > 1, draft[:, 1], torch.where(got.accepted == 1, got.next_token, fresh))
        pairs += (first * vocab + second).bincount(minlength=vocab * vocab).double().cpu()
    p = reference.filter_logits(target[0].double(), **options).softmax(-1)
    expected = 2 * count * (p[0][:, None] * p[1][None]).flatten()
    assert (pairs[expected == 0] == 0).all()
    used = expected > 0
    statistic = ((pairs - expected) ** 2 / expected)[used].sum()
    freedom = used.sum() - 1
    assert statistic < freedom + 4.5 * (2 * freedom).sqrt() + 8


@pytest.mark.parametrize("vocab", [300, 60_001])
@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 0.8}, {"temperature": 1.2, "top_p": 0.9}], ids=str
)
def test_a_captured_graph_verifies_new_drafts(options, vocab):
    draft, target, given = case(vocab, torch.bfloat16, "described", options, 1)
    draft, target, given = draft.cuda(), target.cuda(), moved(given)
    del given["uniforms"]
    given = {n: torch.full((6,), x, device="cuda") if n in options else x for n, x in given.items()}
    given |= {"seed": torch.arange(6, device="cuda"), "draft_lens": torch.full((6,), DRAFTED, device="cuda")}
    verify(draft, target, **given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = verify(draft, target, **given)
    seen = set()
    for step in range(4):
        other = case(vocab, torch.bfloat16, "described", options, step)
        draft.copy_(other[0])
        target.copy_(other[1])
        for name in ("draft_logits", "draft_pivot", "draft_normaliser"):
            given[name].copy_(other[2][name])
        given["seed"].add_(1)
        given["draft_lens"].fill_(DRAFTED - step)
        given["temperature"].mul_(0.9)
        graph.replay()
        same(got, verify(draft, target, **given))
        assert (got.accepted <= DRAFTED - step).all()
        seen |= set(got.accepted.tolist())
    assert len(seen) > 2


def test_replays_of_one_graph_are_distributed_as_the_target():
    """A million drafts of one token: every replay draws the draft, verifies it, and moves the seed on."""
    vocab, count, options = 7, 50_000, {"temperature": 0.9, "top_p": 0.8}
    generator = torch.Generator().manual_seed(3)
    target, drafter = (1.5 * torch.randn(1, 2, vocab, generator=generator) for _ in range(2))
    z, d = target.cuda().expand(count, -1, -1), drafter[:, 0].cuda().expand(count, -1)
    seed = torch.zeros(1, dtype=torch.int64, device="cuda")
    counts, tokens = torch.zeros(vocab, device="cuda"), torch.arange(vocab, device="cuda")

    def step():
        drawn = sample(d, seed, **options)
        q = {"draft_pivot": drawn.pivot[:, None], "draft_normaliser": drawn.normaliser[:, None]}
        got = verify(drawn.token[:, None], z, draft_logits=d[:, None], seed=seed, **q, **options)
        first = torch.where(got.accepted > 0, drawn.token, got.next_token)
        counts.add_((first[:, None] == tokens).sum(0))
        seed.add_(1)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    counts.zero_()
    for _ in range(20):
        graph.replay()
    p = reference.filter_logits(target[0, :1].double(), **options).softmax(-1)[0]
    expected, seen = 20 * count * p, counts.double().cpu()
    assert (seen[p == 0] == 0).all()
    assert ((seen - expected) ** 2 / expected)[p > 0].sum() < 24  # at most 6 degrees of freedom: p = 0.0005


@pytest.mark.parametrize("form", ["logits", "described", "point mass"])
def test_verify_takes_at_most_three_launches(form):
    draft, target, given = case(60_001, torch.bfloat16, form, OPTIONS["top-p"], 1)
    draft, target, given = draft.cuda(), target.cuda(), moved(given)
    verify(draft, target, **given)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        verify(draft, target, **given)
        torch.cuda.synchronize()
    launches = sum("dflash" in event.name for event in profile.events())
    assert launches == (3 if form == "logits" else 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        verify(draft, target, **(given | {"temperature": 0.0}))
        torch.cuda.synchronize()
    assert sum("dflash" in event.name for event in profile.events()) == 2


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 3}], ids=str)
def test_a_drafted_token_outside_the_vocabulary_is_rejected(options):
    draft, target = torch.tensor([[9, 1], [-1, 1], [2**40, 1]], device="cuda"), torch.randn(3, 3, 9, device="cuda")
    uniforms = torch.rand(3, 3, device="cuda")
    alone = verify(draft[:, :0], target[:, :1], uniforms=uniforms[:, 2:], **options)
    for given in ({}, {"draft_logits": torch.full_like(target[:, :2], -math.inf)}):
        got = verify(draft, target, uniforms=uniforms, **given, **options)
        assert (got.accepted == 0).all() and torch.equal(got.next_token, alone.next_token)


@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_rows_take_the_first_of_their_largest_logits(dtype):
    vocab = 20_011
    target = torch.full((5, 3, vocab), -2.0, dtype=dtype)
    target[0, :, [8190, 8191, 8192, 16_500]] = 3.0  # in three blocks' parts
    target[1, :, [9000, 30, 20_010]] = torch.tensor([0.0, -0.0, 0.0], dtype=dtype)
    target[2, :, ::2] = math.nan
    target[2, :, 20_009] = math.inf
    target[3] = -math.inf
    target[3, 0] = math.nan
    target[4, :, 20_010] = 1.0
    draft = torch.tensor([[8190, 8190], [30, 9000], [20_009, 20_009], [0, 0], [20_010, 20_010]])
    counts = torch.zeros(5, vocab, dtype=torch.int32)
    counts[0, 8190] = 1
    for penalties in ({}, {"repetition_penalty": 2.0, "token_counts": counts}):
        for temperature in (0.0, torch.zeros(5)):  # known to the host, or not
            given = penalties | {"temperature": temperature, "uniforms": torch.rand(5, 3)}
            same(cpu(verify(draft.cuda(), target.cuda(), **moved(given))), verify(draft, target, **given))


def test_rows_of_any_strides_and_many_rows():
    draft, target, given = case(1000, torch.float32, "logits", OPTIONS["top-p"], 4)
    wide = torch.randn(6, 2 * DRAFTED + 2, 1150, device="cuda")
    view = wide[:, ::2, 27:1027]
    view.copy_(target)
    given = moved(given)
    same(verify(draft.cuda(), view, **given), verify(draft.cuda(), target.cuda(), **given))
    many = [x.repeat(300, *(1 for _ in x.shape[1:])) for x in (draft.cuda(), target.cuda())]
    given = {
        n: x.repeat(300, *(1 for _ in x.shape[1:])) if isinstance(x, torch.Tensor) else x for n, x in given.items()
    }
    got, once = (
        verify(*many, **given),
        verify(
            draft.cuda(), target.cuda(), **{n: x[:6] if isinstance(x, torch.Tensor) else x for n, x in given.items()}
        ),
    )
    assert torch.equal(got.accepted, once.accepted.repeat(300)) and torch.equal(
        got.next_token, once.next_token.repeat(300)
    )
