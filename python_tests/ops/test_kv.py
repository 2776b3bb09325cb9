"""kv_inject against the same steps written for one token, layer and head at a time."""

import math
from functools import partial

import pytest
import torch

from dflash_ext import IntervalMask, block_attn, kv_inject, reference

LAYERS, BATCH, LENGTH, WIDTH, HEADS, HEAD_DIM, CAPACITY, PAGE = 3, 2, 4, 10, 2, 8, 12, 4


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def tables(rotary, per_layer):
    def table(theta):
        frequency = theta ** (-torch.arange(0, rotary, 2) / rotary)
        return torch.outer(torch.arange(30), frequency).double()

    angles = torch.stack([table(10.0 * (i + 1)) for i in range(LAYERS)]) if per_layer else table(100.0)
    return angles.cos(), angles.sin()


def normalised(x, eps):
    return x / math.sqrt(sum(float(value) ** 2 for value in x) / len(x) + eps)


def rotated(x, cos, sin, interleaved):
    out, pairs = x.clone(), len(cos)
    for r in range(pairs):
        i, j = (2 * r, 2 * r + 1) if interleaved else (r, r + pairs)
        out[i] = x[i] * cos[r] - x[j] * sin[r]
        out[j] = x[j] * cos[r] + x[i] * sin[r]
    return out


CASES = {
    "plain": {},
    "qwen3": {"k_norm": True},
    "gemma3, theta by layer": {"k_norm": True, "norm_plus_one": True, "per_layer": True, "norm_eps": 1e-2},
    "gemma4": {"k_norm": True, "v_norm": True, "norm_eps": 1e-2},
    "interleaved, partial, bias": {"bias": True, "rope_interleaved": True, "rotary": 4},
    "norm after rope, partial": {"k_norm": True, "norm_after_rope": True, "rotary": 6},
}


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_keys_and_values_of_every_token(case, paged, device):
    options = dict(case)
    cos, sin = tables(options.pop("rotary", HEAD_DIM), options.pop("per_layer", False))
    if "bias" in options:
        options["bias"] = randn(LAYERS * 2 * HEADS * HEAD_DIM)
    if "k_norm" in options:
        options["k_norm"] = randn(LAYERS, HEAD_DIM)
    features, weight = randn(BATCH, LENGTH, WIDTH), randn(LAYERS * 2 * HEADS * HEAD_DIM, WIDTH)
    positions = torch.tensor([[3, 4, 5, 6], [20, 21, 0, 22]])
    slots = torch.tensor([[3, 4, 5, 6], [7, 8, -1, 0]])
    table = torch.tensor([[4, 0, 1], [2, 5, 3]], dtype=torch.int32)
    shape = (LAYERS, BATCH * CAPACITY // PAGE, PAGE, HEADS, HEAD_DIM)
    shape = shape if paged else (LAYERS, BATCH, HEADS, CAPACITY, HEAD_DIM)
    caches = torch.full((2, *shape), 7.0, dtype=torch.float64)

    want = caches.clone()
    projected = features @ weight.T + options.get("bias", 0.0)
    for b in range(BATCH):
        for s in range(LENGTH):
            slot, pos = int(slots[b, s]), int(positions[b, s])
            if slot < 0:
                continue
            for layer in range(LAYERS):
                turn = [(t[layer] if t.dim() == 3 else t)[pos] for t in (cos, sin)]
                for head in range(HEADS):
                    k, v = projected[b, s].view(LAYERS, 2, HEADS, HEAD_DIM)[layer, :, head]
                    steps = [lambda x, turn=turn: rotated(x, *turn, options.get("rope_interleaved", False))]
                    if "k_norm" in options:
                        gain = options["k_norm"][layer] + options.get("norm_plus_one", 0)
                        eps = options.get("norm_eps", 1e-6)
                        norm = [lambda x, gain=gain, eps=eps: normalised(x, eps) * gain]
                        steps = steps + norm if options.get("norm_after_rope") else norm + steps
                    for step in steps:
                        k = step(k)
                    if options.get("v_norm"):
                        v = normalised(v, options["norm_eps"])
                    for kind, x in ((0, k), (1, v)):
                        if paged:
                            want[kind, layer, table[b, slot // PAGE], slot % PAGE, head] = x
                        else:
                            want[kind, layer, b, head, slot] = x

    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    caches, cos, sin, features, weight = (x.to(device) for x in (caches, cos, sin, features, weight))
    kv_inject(
        features,
        weight,
        list(caches[0]),
        caches[1],
        positions.to(device),
        cos,
        sin,
        slots=slots.to(device),
        block_table=table.to(device) if paged else None,
        **options,
    )
    torch.testing.assert_close(caches.cpu(), want)


def test_slots_are_the_positions_and_the_cache_keeps_its_dtype():
    cos, sin = tables(HEAD_DIM, False)
    cache = torch.zeros(2, 1, BATCH, HEADS, CAPACITY, HEAD_DIM, dtype=torch.bfloat16)
    positions = torch.tensor([[0, 1, 2, 3], [5, 6, 7, 8]])
    features, weight = randn(BATCH, LENGTH, WIDTH), randn(2 * HEADS * HEAD_DIM, WIDTH)
    kv_inject(features.float(), weight.float(), cache[0], cache[1], positions, cos.float(), sin.float())
    written = (cache != 0).any(-1).all(0).all(0).all(1)  # [B, capacity], in K and V, in every head
    assert [row.nonzero().flatten().tolist() for row in written] == positions.tolist()


def arguments(**changes):
    cos, sin = tables(HEAD_DIM, False)
    cache = torch.zeros(LAYERS, BATCH, HEADS, CAPACITY, HEAD_DIM)
    given = {
        "features": torch.zeros(BATCH, LENGTH, WIDTH),
        "weight": torch.zeros(LAYERS * 2 * HEADS * HEAD_DIM, WIDTH),
        "k_caches": cache,
        "v_caches": cache.clone(),
        "positions": torch.zeros(BATCH, LENGTH, dtype=torch.int64),
        "cos": cos,
        "sin": sin,
    }
    return given | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(96, 9)}, r"weight is \[96, 9\]; \[96, 10\]"),
        ({"v_caches": []}, "3 k_caches, 0 v_caches"),
        ({"k_caches": torch.zeros(3, 2, 2, 8)}, r"a cache is \[2, 2, 8\]"),
        ({"k_caches": torch.zeros(3, 2, 2, 9, 8)}, "differ in shape"),
        ({"v_caches": torch.zeros(3, 1, 2, 12, 8).expand(3, 2, 2, 12, 8)}, r"v_caches\[0\] has strides \(0, 96, "),
        ({"features": torch.zeros(4, 10)}, r"features is torch.float32 \[4, 10\]"),
        ({"positions": torch.zeros(2, 3).long()}, r"positions is \[2, 3\]"),
        ({"positions": torch.zeros(2, 4)}, "positions is torch.float32"),
        ({"slots": torch.zeros(2, 3).long()}, r"slots is \[2, 3\]"),
        ({"weight": torch.zeros(96, 10, device="meta")}, "features is on cpu, weight on meta; one device is needed"),
        ({"v_caches": torch.zeros(3, 2, 2, 12, 8, device="meta")}, r"v_caches\[0\] on meta"),
        ({"k_norm": torch.zeros(8)}, r"k_norm is \[8\]; \[3, 8\]"),
        ({"cos": torch.zeros(30, 5), "sin": torch.zeros(30, 5)}, "R at most 4"),
        ({"cos": torch.zeros(2, 30, 4), "sin": torch.zeros(2, 30, 4)}, r"\[2, 30, 4\]"),
        ({"sin": torch.zeros(30, 3)}, "sin"),
        ({"cos": torch.zeros(30)}, r"cos is \[30\]; \[P, R\] or \[3, P, R\]"),
        ({"features": torch.zeros(1, 4, 10), "positions": torch.zeros(1, 4).long()}, "for batch 2"),
        ({"block_table": torch.zeros(2, 3)}, "weight"),
        (
            {"block_table": torch.zeros(2).int(), "weight": torch.zeros(576, 10), "k_norm": torch.zeros(3, 8)},
            r"block_table is torch.int32 \[2\]; int32 \[2, max_pages\]",
        ),
    ],
)
def test_refusals_name_the_value(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        kv_inject(**arguments(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k_caches": None}, "^kv_inject: k_caches is None; a tensor for each layer is needed"),
        ({"k_caches": torch.ones(())}, r"^kv_inject: k_caches is torch.float32 \[\]; a tensor for each layer"),
        ({"v_caches": [1, 2, 3]}, r"^kv_inject: v_caches\[0\] is 1 \(int\); a tensor is needed"),
        ({"norm_eps": None}, "^kv_inject: norm_eps is None; a number is needed"),
    ],
)
def test_refuses_what_is_no_tensor_or_number(changes, message):
    with pytest.raises(TypeError, match=message):
        kv_inject(**arguments(**changes))


def test_caches_may_come_from_anything_that_gives_them():
    inputs = {
        "features": randn(BATCH, LENGTH, WIDTH).float(),
        "weight": randn(LAYERS * 2 * HEADS * HEAD_DIM, WIDTH).float(),
        "positions": torch.arange(LENGTH).expand(BATCH, -1),
    }
    want, got = arguments(**inputs), arguments(**inputs)
    kv_inject(**want)
    values = torch.nn.ParameterList(torch.nn.Parameter(cache, requires_grad=False) for cache in got["v_caches"])
    kv_inject(**got | {"k_caches": iter(got["k_caches"]), "v_caches": values})
    for name in ("k_caches", "v_caches"):
        assert want[name].any() and torch.equal(want[name], got[name])


def random_case(dtype, cache_dtype, heads, head_dim, rotary, paged, **options):
    """Arguments of kv_inject, and caches that are a part of larger tensors of sevens."""
    layers, batch, length, width, capacity, page_size = 2, 3, 5, 24, 16, 4
    generator = torch.Generator().manual_seed(head_dim)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = (batch * capacity // page_size, page_size, heads) if paged else (batch, heads, capacity)
    shape = (layers, *(size + 1 for size in shape), head_dim + 3)
    caches = [torch.full(shape, 7.0, dtype=cache_dtype) for _ in range(2)]
    angles = randn(layers, 40, rotary // 2)
    case = {
        "features": randn(batch, length, width).to(dtype),
        "weight": (randn(layers * 2 * heads * head_dim, width) / width**0.5).to(dtype),
        "positions": torch.randint(40, (batch, length), generator=generator),
        "cos": angles.cos().float(),
        "sin": angles.sin().float(),
        "slots": torch.stack([torch.randperm(capacity, generator=generator)[:length] for _ in range(batch)]),
    }
    case["slots"][1, 2:4], case["positions"][1, 2:4] = -1, 999  # padding may hold any position
    if paged:
        case["block_table"] = torch.randperm(shape[1] - 1, generator=generator).view(batch, -1).int()
    if options.get("k_norm"):
        options["k_norm"] = randn(layers, head_dim).to(dtype)
    if options.get("bias"):
        options["bias"] = randn(layers * 2 * heads * head_dim).to(dtype)
    return case | options, caches


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(
    ("heads", "head_dim", "rotary", "options"),
    [
        (2, 128, 128, {"k_norm": True}),
        (1, 64, 32, {"bias": True, "k_norm": True, "norm_plus_one": True, "v_norm": True}),
        (3, 20, 20, {"bias": True, "rope_interleaved": True}),
        (2, 18, 6, {"k_norm": True, "norm_after_rope": True}),
    ],
    ids=["qwen3", "gemma", "interleaved", "norm after rope"],
)
@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_matches_the_definition(dtype, cache_dtype, heads, head_dim, rotary, options, paged):
    case, caches = random_case(dtype, cache_dtype, heads, head_dim, rotary, paged, **options)
    wide = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in case.items()
    }
    expected = [cache.double() for cache in caches]
    inner = (slice(None), *[slice(0, -1)] * 3, slice(0, head_dim))
    kv_inject(k_caches=caches[0][inner], v_caches=caches[1][inner], **case)
    wide["positions"] = wide["positions"].clamp(max=39)
    reference.kv_inject(k_caches=expected[0][inner], v_caches=expected[1][inner], **wide)
    # The product is rounded to the features' dtype, the result to the cache's.
    rounding = max(torch.finfo(dtype).eps, torch.finfo(cache_dtype).eps, 1e-6)
    for cache, want in zip(caches, expected, strict=True):
        torch.testing.assert_close(cache.double(), want, rtol=2 * rounding, atol=2 * rounding)
        assert torch.equal(cache == 7.0, want == 7.0)  # nothing else is written


@pytest.mark.parametrize("narrow", ["features", "weight"])
def test_features_and_weights_of_two_dtypes(narrow, device):
    inputs = {
        "features": randn(BATCH, LENGTH, WIDTH),
        "weight": randn(2 * HEADS * HEAD_DIM, WIDTH),
        "positions": torch.arange(LENGTH).expand(BATCH, -1),
        "cos": randn(LENGTH, HEAD_DIM // 2),
        "sin": randn(LENGTH, HEAD_DIM // 2),
    }
    inputs = {name: x.to(device) for name, x in inputs.items()}
    inputs[narrow] = inputs[narrow].float()
    wide = inputs | {narrow: inputs[narrow].double()}
    caches = torch.zeros(6, 1, BATCH, HEADS, LENGTH, HEAD_DIM, dtype=torch.float64, device=device)
    kv_inject(k_caches=caches[0], v_caches=caches[1], **inputs)
    reference.kv_inject(k_caches=caches[2], v_caches=caches[3], **inputs)
    reference.kv_inject(k_caches=caches[4], v_caches=caches[5], **wide)
    for other in (caches[:2], caches[2:4]):
        torch.testing.assert_close(other, caches[4:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"positions": torch.tensor([[0, 1, 2, 3], [4, 5, 11, 12]])},
            "slot 12 of row 1, token 3, is outside the cache of 12",
        ),
        (
            {"positions": torch.tensor([[0, 30, 2, 3]] * 2), "slots": torch.arange(4).expand(2, -1)},
            "position 30 of row 0, token 1, is outside the tables of 30 positions",
        ),
        ({"positions": torch.full((2, 4), -1), "slots": torch.zeros(2, 4, dtype=torch.int64)}, "position -1"),
    ],
)
def test_places_outside_caches_and_tables_are_named(changes, message):
    given = arguments(**changes)
    with pytest.raises(RuntimeError, match=message):
        kv_inject(**given)
    assert (given["k_caches"] == 0).all()


def test_a_page_that_does_not_exist_is_named():
    pages = torch.zeros(LAYERS, 6, PAGE, HEADS, HEAD_DIM)
    table = torch.tensor([[0, 1, 2], [3, 6, 5]], dtype=torch.int32)
    given = arguments(k_caches=pages, v_caches=pages.clone(), block_table=table)
    with pytest.raises(RuntimeError, match="names page 6 of 6 for slot 5 of row 1"):
        kv_inject(**given | {"positions": torch.tensor([[0, 1, 2, 3], [3, 5, 6, 7]])})


def test_the_native_operator_names_the_shape_that_it_needs():
    cache, table, places = torch.zeros(2, HEADS, 5, HEAD_DIM), torch.zeros(5, 2), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(
        RuntimeError, match=rf"projected must be contiguous \[6, {2 * HEADS * HEAD_DIM}\], of the right"
    ):
        torch.ops.dflash_ext.kv_write(
            torch.zeros(8, 2 * HEADS * HEAD_DIM),
            [cache],
            [cache.clone()],
            places,
            places,
            table,
            table,
            None,
            None,
            None,
            1e-6,
            False,
            False,
            False,
            False,
        )


def test_neither_autocast_nor_gradients_reach_it():
    case, caches = random_case(torch.float32, torch.float32, 2, 16, 16, False, k_norm=True)
    again = [cache.clone() for cache in caches]
    inner = (slice(None), *[slice(0, -1)] * 3, slice(0, 16))
    kv_inject(k_caches=caches[0][inner], v_caches=caches[1][inner], **case)
    case["weight"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kv_inject(k_caches=again[0][inner], v_caches=again[1][inner], **case)
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(caches, again, strict=True))


def test_no_tokens_write_nothing():
    given = arguments(features=torch.zeros(BATCH, 0, WIDTH), positions=torch.zeros(BATCH, 0, dtype=torch.int64))
    kv_inject(**given)
    assert (given["k_caches"] == 0).all()


def test_meta_tensors():
    given = arguments(k_norm=torch.ones(LAYERS, HEAD_DIM))
    kv_inject(**{name: value.to("meta") for name, value in given.items()})


def test_registration():
    case, caches = random_case(torch.float32, torch.float32, 2, 16, 8, False)
    k, v = (cache[:, :-1, :-1, :-1, :16].contiguous() for cache in caches)
    projected = case["features"].flatten(0, 1) @ case["weight"].T
    slots = case["slots"].clamp(min=0)
    arguments = (projected, list(k), list(v), slots, slots, case["cos"], case["sin"], None, None, None, 1e-6)
    torch.library.opcheck(torch.ops.dflash_ext.kv_write, (*arguments, False, False, True, False))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(k, v):
        kv_inject(k_caches=k, v_caches=v, **case)
        return k + v

    other_k, other_v = k.clone(), v.clone()
    added = compiled(k, v)
    kv_inject(k_caches=other_k, v_caches=other_v, **case)
    assert torch.equal(k, other_k) and torch.equal(v, other_v) and torch.equal(added, k + v)


def one_layer(**changes):
    """Arguments of a call over 4 tokens of width 5, one head of 8."""
    given = {"features": torch.randn(1, 4, 5), "weight": torch.randn(16, 5), "slots": None} | changes
    caches = torch.zeros(2, 1, 1, 4, 8).unbind()
    rope = torch.ones(4, 4), torch.zeros(4, 4)
    inject = partial(
        kv_inject,
        given["features"],
        given["weight"],
        caches[:1],
        caches[1:],
        torch.arange(4)[None],
        *rope,
        slots=given["slots"],
    )
    return inject, caches


def test_a_backward_that_saved_a_cache_notices_the_write():
    inject, (k, v) = one_layer()
    q = torch.randn(1, 2, 2, 8, requires_grad=True)
    out = block_attn(q, k, v, IntervalMask.full(4, q_len=2)).sum()
    inject()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
    with pytest.raises(ValueError, match="a cache requires a gradient"):
        inject.func(*inject.args[:2], [k.requires_grad_()], *inject.args[3:])


def test_a_token_without_a_slot_may_hold_anything():
    for dtype, width in ((torch.bfloat16, 33), (torch.float32, 5)):
        features, weight = torch.randn(1, 4, width, dtype=dtype), torch.randn(16, width, dtype=dtype)
        slots = torch.tensor([[0, -1, 1, 2]])
        inject, clean = one_layer(features=features, weight=weight, slots=slots)
        inject()
        features = features.index_fill(1, torch.tensor([1]), torch.nan)
        inject, dirty = one_layer(features=features, weight=weight, slots=slots)
        inject()
        assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
