"""Every operator but attention on random shapes, strides, dtypes and options, against its definition in float64."""

import math

import pytest
import torch

from dflash_ext import (
    kv_inject,
    linear,
    linear_cross_entropy,
    masked_cross_entropy,
    reference,
    reveal,
    sample,
    verify,
)
from dflash_ext.ops.random import SAMPLE, uniforms_of
from dflash_ext.reference.sampling import plain_logits

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LARGEST = 400  # numbers in a row


def pick(*choices):
    return choices[torch.randint(len(choices), ()).item()]


def size(most):
    """Often one of the sizes at which loops begin and end."""
    return min(most, pick(1, 2, 7, 8, 9, 31, 33, *torch.randint(1, most + 1, (5,)).tolist()))


def count(most):
    return pick(0, 1, *torch.randint(0, most + 1, (4,)).tolist())


def laid_out(x):
    """The same numbers with other strides; the last dimension stays contiguous."""
    if x.dim() < 2:
        return x
    layout = pick("dense", "turned", "part", "steps")
    if layout == "turned" and x.dim() > 2:
        return x.transpose(0, -2).contiguous().transpose(0, -2)
    if layout == "part":
        larger = torch.full((*x.shape[:-1], x.shape[-1] + 3), math.nan, dtype=x.dtype)
        larger[..., 1:-2] = x
        return larger[..., 1:-2]
    if layout == "steps":
        larger = torch.full((2 * x.shape[0], *x.shape[1:]), math.nan, dtype=x.dtype)
        larger[::2] = x
        return larger[::2]
    return x


def near(got, want, limit):
    """Relative to the largest number that is wanted, or to 1."""
    got, want = got.double(), want.double()
    finite = want[want.isfinite()]
    top = max(1.0, finite.abs().max().item() if finite.numel() else 0.0)
    torch.testing.assert_close(got, want, atol=limit * top, rtol=0, equal_nan=True)


# ---- losses ----------------------------------------------------------------------------------------------


def loss_case(shape, vocab, dtype):
    """target, weight, and the options both losses take; rows of weight 0 hold a target far outside."""
    weight = pick(None, torch.rand(shape) + 0.1, torch.rand(shape, dtype=torch.float64) + 0.1, torch.ones(shape))
    target = torch.randint(0, vocab, shape)
    if weight is not None:
        dropped = torch.rand(shape) < pick(0.0, 0.4, 1.0)
        weight, target = weight.masked_fill(dropped, 0.0), target.masked_fill(dropped, -100)
        weight = pick(weight, weight != 0, (weight > 0.5).int()) if not dropped.all() else weight
        target = target.where(weight != 0, -100)
    options = {
        "ignore_index": pick(-100, -100, None, pick(*range(vocab))),
        "reduction": pick("mean", "sum", "none"),
        "softcap": pick(None, 3.0, 30.0),
        "label_smoothing": pick(0.0, 0.1, 1.0),
        "z_loss": pick(0.0, 1e-2),
        "teacher_kind": pick("kl", "tv"),
        "teacher_mix": pick(0.0, 0.3, 1.0),
    }
    if options["reduction"] == "mean" and pick(True, False):
        options["normaliser"] = pick(7, 0.5, torch.tensor(3), torch.tensor(100.0))
    if options["ignore_index"] == -100 and pick(True, False):
        target = target.masked_fill(torch.rand(shape) < 0.3, -100)
    if options["teacher_mix"] or pick(True, False):
        options["teacher"] = laid_out((2 * torch.randn(*shape, vocab)).to(dtype))
    return pick(target, target.int()), weight, options


def compare_losses(ours, definition, leaves, others, options, limit):
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in leaves]
    teachers = ("teacher", "teacher_hidden", "teacher_head")
    exact = options | {name: options[name].double() for name in teachers if name in options}
    exact.pop("max_rows", None), exact.pop("chunk_rows", None)
    target, weight = others
    got, want = ours(*leaves, target, weight, **options), definition(*wide, target.long(), weight, **exact)
    for name in ("loss", "nll", "entropy"):
        near(getattr(got, name), getattr(want, name), limit)
    if leaves[0].dtype in (torch.float32, torch.float64):
        assert torch.equal(got.correct, want.correct)
    upstream = torch.randn(want.loss.shape, dtype=torch.float64)
    trained = [(x, y) for x, y in zip(leaves, wide, strict=True) if x.requires_grad]
    if trained:
        grads = torch.autograd.grad(got.loss, [x for x, _ in trained], upstream.to(got.loss.dtype))
        exact = torch.autograd.grad(want.loss, [y for _, y in trained], upstream)
        for a, b in zip(grads, exact, strict=True):
            near(a, b, limit)


LOSS_LIMITS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def check_masked_cross_entropy():
    dtype, vocab = pick(*DTYPES), size(LARGEST)
    shape = tuple(count(6) for _ in range(pick(0, 1, 1, 2, 2, 3)))
    logits = (pick(1, 4) * torch.randn(*shape, vocab)).to(dtype)
    target, weight, options = loss_case(shape, vocab, dtype)
    if weight is not None:
        logits = logits.masked_fill((weight == 0)[..., None], math.nan)
    if options["ignore_index"] is not None:
        logits = logits.masked_fill((target == options["ignore_index"])[..., None], math.nan)
    leaf = laid_out(logits).detach().requires_grad_()
    others = target, weight
    limit = LOSS_LIMITS[dtype]
    compare_losses(masked_cross_entropy, reference.masked_cross_entropy, [leaf], others, options, limit)


def teacher_states(shape, vocab, dtype):
    """Hidden states, from which the teacher's logits are computed."""
    width, row = size(20), None
    states = shape
    if pick(True, False):
        states = pick((3,), (2, 5))
        row = torch.randint(0, math.prod(states), shape)
    return {
        "teacher_hidden": laid_out(torch.randn(*states, width).to(dtype)),
        "teacher_head": laid_out((2 * torch.randn(vocab, width) / width**0.5).to(dtype)),
        "teacher_row": row,
        "teacher_softcap": pick(None, 3.0),
    }


def check_linear_cross_entropy():
    dtype, vocab, width = pick(*DTYPES), size(150), size(40)
    shape = tuple(count(9) for _ in range(pick(1, 1, 2, 3)))
    target, weight, options = loss_case(shape, vocab, dtype)
    hidden = laid_out(torch.randn(*shape, width).to(dtype)).detach().requires_grad_(pick(True, True, False))
    head = laid_out((torch.randn(vocab, width) / width**0.5).to(dtype)).detach().requires_grad_(pick(True, False))
    kept = (target != options["ignore_index"]) & (torch.tensor(True) if weight is None else weight != 0)
    kept = kept.sum().item() if options["ignore_index"] is not None or weight is not None else target.numel()
    options["max_rows"] = pick(None, max(1, kept), kept + 3)
    options["chunk_rows"] = pick(None, 1, 4)
    if "teacher" in options and pick(True, False):
        del options["teacher"]
        options |= teacher_states(shape, vocab, dtype)
    # Its logits are rounded to the dtype.
    limit = LOSS_LIMITS[dtype] * (1 if dtype.itemsize > 2 else 4)
    functions = linear_cross_entropy, reference.linear_cross_entropy
    compare_losses(*functions, [hidden, head], (target, weight), options, limit)


# ---- sampling --------------------------------------------------------------------------------------------


def odd_logits(*shape, dtype):
    """With ties, with -inf and +inf, and with rows that are all equal."""
    z = pick(0.5, 3.0) * torch.randn(*shape)
    kind = torch.randint(6, shape[:-1])[..., None]
    z = torch.where(kind == 0, z.round(), z)
    z = torch.where((kind == 1) & (torch.rand(shape) < 0.7), -math.inf, z)
    z = torch.where(kind == 2, 0.5, z)
    z[..., shape[-1] // 2] = 1.0
    z = torch.where((kind == 3) & (torch.rand(shape) < pick(0.0, 0.1)), math.inf, z)
    return laid_out(z.to(dtype))


def filters(rows):
    def choice(*values, odd=()):
        """Odd values have a meaning in tensors alone."""
        by_row = torch.tensor([float(pick(*values, *odd)) for _ in range(rows)])
        number = pick(*values)
        return pick(None, number, torch.tensor(number), by_row)

    given = {
        "temperature": choice(0.0, 0.3, 1.0, 1.7),
        "top_k": choice(-1, 0, 1, 3, 60, 9999, odd=(2.5, math.nan)),
        "top_p": choice(0.0, 0.2, 0.87, 0.99, 1.0, odd=(-1.0, math.nan)),
        "min_p": choice(0.0, 0.03, 0.1, 1.0, odd=(1.5, math.nan)),
    }
    return {name: value for name, value in given.items() if value is not None}


def check_sample():
    dtype, rows, vocab = pick(*DTYPES), count(8), size(LARGEST)
    logits, options = odd_logits(rows, vocab, dtype=dtype), filters(rows)
    seed = torch.randint(-(2**62), 2**62, (pick(1, rows),))
    drawn, entropy = sample(logits, seed, **options, return_filtered_entropy=True)
    exact = {
        name: value.double() if isinstance(value, torch.Tensor) and name != "top_k" else value
        for name, value in options.items()
    }
    slack = 1e-6 if dtype != torch.float64 else 1e-13
    temperature = torch.as_tensor(options.get("temperature", 1.0), dtype=torch.float64).reshape(-1, 1)
    plain = plain_logits(logits)
    z = plain.double() / torch.where(temperature == 0, 1.0, temperature)
    # As sample does it: the pivot is one of these numbers.
    scaled = plain / torch.where(temperature == 0, 1.0, temperature).to(drawn.pivot.dtype)
    p = z.softmax(-1)
    uniform = uniforms_of(seed, SAMPLE, rows, 1)[:, 0]
    # A token whose cumulative mass is a filter's bound but for rounding may be kept or not.
    matched = torch.zeros(rows, dtype=torch.bool)
    for shift in (0.0, 10 * slack, -10 * slack):
        moved = exact | {
            name: exact[name] * (1 + sign * shift) for name, sign in (("top_p", 1), ("min_p", -1)) if name in exact
        }
        q = reference.filter_logits(logits.double(), **moved)
        mass = q.softmax(-1)
        token = drawn.token[:, None]
        passed = mass.cumsum(-1).gather(1, token)[:, 0]
        own = mass.gather(1, token)[:, 0]
        same = (own > 0) & (passed - own <= uniform + slack) & (uniform <= passed + slack)
        same &= (entropy - torch.special.entr(mass).sum(-1)).abs() < 50 * slack
        same &= (drawn.normaliser - q.logsumexp(-1)).abs() < 50 * slack
        reaches = scaled >= drawn.pivot[:, None]
        described = torch.where(reaches, z - drawn.normaliser[:, None], -math.inf)
        greedy = (temperature == 0).flatten().expand(rows)
        same &= greedy | (drawn.pivot == math.inf) | ((described.exp() - mass).abs().amax(-1) < 50 * slack)
        matched |= same
    assert matched.all(), (~matched).nonzero()
    near(drawn.prob, p.gather(1, drawn.token[:, None])[:, 0], 10 * slack)
    near(drawn.logprob, p.log().gather(1, drawn.token[:, None])[:, 0], 10 * slack)
    near(drawn.entropy, torch.special.entr(p).sum(-1), 20 * slack)
    top = torch.cat((p, torch.zeros(rows, 1, dtype=p.dtype)), -1).topk(2).values
    near(drawn.max_prob, top[:, 0], 10 * slack)
    near(drawn.margin, top[:, 0] - top[:, 1], 10 * slack)
    assert torch.equal(drawn.argmax, logits.double().argmax(-1))


def check_verify():
    dtype, rows, drafted, vocab = pick(*DTYPES), count(5), pick(0, 1, 2, 5), size(LARGEST)
    target, options = odd_logits(rows, drafted + 1, vocab, dtype=dtype), {"temperature": 1.0} | filters(rows)
    drafter = target[:, :-1] + pick(0.0, 0.3, 2.0) * torch.randn(rows, drafted, vocab).to(dtype)
    by_token = {
        name: value.repeat_interleave(drafted) if isinstance(value, torch.Tensor) and value.dim() else value
        for name, value in options.items()
    }
    drawn = sample(drafter.flatten(0, 1), torch.tensor([3]), **by_token)
    given = options | {"uniforms": torch.rand(rows, drafted + 1, dtype=torch.float64)}
    form = pick("point mass", "logits", "described")
    if form != "point mass":
        given["draft_logits"] = laid_out(drafter)
    if form == "described":
        given["draft_pivot"] = drawn.pivot.view(rows, drafted)
        given["draft_normaliser"] = drawn.normaliser.view(rows, drafted)
    draft = drawn.token.view(rows, drafted)
    if pick(True, False):
        given["draft_lens"] = torch.randint(0, drafted + 1, (rows,), dtype=pick(torch.int32, torch.int64))
        draft = draft.where(torch.arange(drafted) < given["draft_lens"][:, None], -7)
    # In the logits' own precision: in another the pivot would be another number.
    got, want = verify(draft, target, **given), reference.verify(draft, target, **given)
    assert torch.equal(got.accepted, want.accepted) and torch.equal(got.next_token, want.next_token)


def check_reveal():
    dtype, rows, length = pick(*DTYPES), count(5), count(90)
    scores, entropy = torch.rand(2, rows, length)
    if pick(True, False):
        scores, entropy = (scores * 8).round() / 8, (entropy * 8).round() / 8
    scores, entropy = (laid_out(x.to(dtype)) for x in (scores, entropy))
    masked = torch.rand(rows, length) < pick(0.0, 0.3, 0.8, 1.0)
    rule = pick("count", "threshold", "at_least", "factor", "entropy_bound")
    limits = {
        "count": (0, 1, 3, 1000),
        "threshold": (0.0, 0.5, 0.9, 2.0),
        "at_least": (0.0, 0.5, 0.875, 2.0),
        "factor": (0.0, 0.3, 1.0, 5.0),
        "entropy_bound": (0.0, 0.25, 2.0, 1e9),
    }[rule]
    limit = pick(pick(*limits), torch.tensor([pick(*limits) for _ in range(rows)], dtype=torch.float64))
    order = pick(scores, -entropy, None)
    if order is None and rule in ("threshold", "at_least", "factor"):
        order = scores
    got = reveal(order, masked, entropy=entropy, **{rule: limit})
    assert torch.equal(got, reference.reveal(order, masked, entropy=entropy, **{rule: limit}))


# ---- kv_inject -------------------------------------------------------------------------------------------


def check_kv_inject():
    dtype, cache_dtype = pick(*DTYPES), torch.float64
    if dtype != torch.float64:
        cache_dtype = pick(*DTYPES[1:])
    layers, batch, heads, length, width = pick(1, 2, 3), pick(1, 2, 3), pick(1, 2, 5), count(9), size(40)
    head_dim, page_size, paged = pick(8, 14, 20, 33, 64), pick(1, 4), pick(True, False)
    rotary = pick(0, 2, head_dim // 2 * 2, head_dim // 2 // 2 * 2)
    capacity = 12
    pages = batch * capacity // page_size
    places = (pages + pick(0, 1), page_size, heads) if paged else (batch, heads, capacity)
    shape = (layers, *places, head_dim)
    around = [torch.full((*shape[:-1], head_dim + pick(0, 3)), 7.0, dtype=cache_dtype) for _ in range(2)]
    angles = torch.randn(*pick((layers, 40), (40,)), rotary // 2, dtype=torch.float64)
    projections = layers * 2 * heads * head_dim
    slots = torch.stack([torch.randperm(capacity)[:length] for _ in range(batch)])
    positions = torch.randint(40, (batch, length))
    padding = torch.rand(batch, length) < 0.2
    case = {
        "features": laid_out(torch.randn(batch, length, width).to(dtype)),
        "weight": (torch.randn(projections, width) / width**0.5).to(dtype),
        "positions": pick(positions, positions.int()),
        "cos": angles.cos().to(dtype if dtype.itemsize > 2 else torch.float32),
        "sin": angles.sin().to(dtype if dtype.itemsize > 2 else torch.float32),
        "slots": slots.masked_fill(padding, -1),
        "norm_plus_one": pick(True, False),
        "norm_after_rope": pick(True, False),
        "norm_eps": pick(1e-6, 1e-2),
        "v_norm": pick(True, False),
        "rope_interleaved": pick(True, False),
        "bias": pick(None, torch.randn(projections).to(dtype)),
        "k_norm": pick(None, torch.randn(layers, head_dim).to(dtype)),
        "block_table": torch.randperm(places[0])[:pages].view(batch, -1).int() if paged else None,
    }
    exact = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in case.items()
    }
    wanted = [cache.double() for cache in around]
    for function, caches, given in ((kv_inject, around, case), (reference.kv_inject, wanted, exact)):
        k_caches, v_caches = (cache[..., :head_dim] for cache in caches)
        function(k_caches=pick(k_caches, list(k_caches)), v_caches=v_caches, **given)
    # The product is rounded to the features' dtype, and a norm may enlarge that; the result to the cache's.
    limit = 8 * max(torch.finfo(dtype).eps, torch.finfo(cache_dtype).eps)
    for cache, want in zip(around, wanted, strict=True):
        near(cache, want, limit)
        assert torch.equal(cache == 7.0, want == 7.0)


# ---- linear ----------------------------------------------------------------------------------------------


def check_linear():
    dtype, gate = pick(*DTYPES), pick(None, "silu", "gelu_tanh")
    shape = [(count(70),), (pick(1, 2, 3), count(9)), ()][pick(0, 0, 1, 2)]
    inner, columns = size(LARGEST), count(150)
    in_weight = 2 * columns if gate else columns

    def randn(*sizes):
        return torch.randn(sizes).to(dtype)

    case = {
        "x": laid_out(randn(*shape, inner)),
        "weight": randn(in_weight, inner) / inner**0.5,
        "bias": pick(None, randn(in_weight)),
        "norm": pick(None, randn(inner)),
        "norm_eps": pick(1e-6, 1e-2),
        "norm_plus_one": pick(True, False),
        "gate": gate,
        "residual": pick(None, laid_out(randn(*shape, columns))),
    }
    exact = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in case.items()}
    near(linear(**case), reference.linear(**exact), 8 * max(torch.finfo(dtype).eps, 1e-14))


CHECKS = (
    check_masked_cross_entropy,
    check_linear_cross_entropy,
    check_sample,
    check_verify,
    check_reveal,
    check_kv_inject,
    check_linear,
)


def run(check, cases):
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory not filled yet holds NaN
    try:
        for seed in range(cases):
            torch.manual_seed(seed)
            try:
                check()
            except Exception as error:
                raise AssertionError(f"{check.__name__}, torch.manual_seed({seed}): {error}") from error
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[len("check_") :])
def test_random_cases(check):
    run(check, 25)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[len("check_") :])
def test_many_random_cases(check):
    run(check, 600)
