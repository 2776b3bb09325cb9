"""add_rms_norm, rotate_to_cache, gated and add_halves against their definitions in float64."""

import pytest
import torch

from dflash_ext import IntervalMask
from dflash_ext.ops import block_attn_decode, linear
from dflash_ext.ops.layer import HALVES_RANKS, WEIGHTS, add_halves, add_rms_norm, gated, rotate_to_cache, run_layers
from python_tests.exactness import allowed_error

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def dtypes_on(device):
    return [d for d in DTYPES if device == "cpu" or d != torch.float64]


def rms(x, weight, eps, plus_one):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (weight + plus_one)


def off_by(got, want):
    return ((got.double().cpu() - want).abs().max() / want.abs().max()).item()


def rounding(dtype, steps=1):
    """In float64 the definition rounds as much as the kernel does."""
    return steps * torch.finfo(dtype).eps * (2 if dtype == torch.float64 else 1)


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("width", [8, 64, 576, 1000, 1032, 4096])
def test_add_rms_norm(device, width, plus_one):
    for dtype in dtypes_on(device):
        residual, update = (torch.randn(5, width, dtype=torch.float64).to(dtype).to(device) for _ in range(2))
        norm, update_norm = (torch.randn(width, dtype=torch.float64).to(dtype).to(device) for _ in range(2))
        for added, its_norm in ((None, None), (update, None), (update, update_norm)):
            mine = residual.clone()
            out = add_rms_norm(mine, norm, update=added, update_norm=its_norm, eps=1e-5, plus_one=plus_one)
            sum_ = residual.double().cpu()
            if added is not None:
                term = added.double().cpu()
                sum_ = sum_ + (term if its_norm is None else rms(term, its_norm.double().cpu(), 1e-5, plus_one))
            assert off_by(mine, sum_) <= rounding(dtype, 2)
            # The norm is that of the rounded residual.
            want = rms(mine.double().cpu(), norm.double().cpu(), 1e-5, plus_one)
            torch_own = torch.nn.functional.rms_norm(mine, (width,), norm + plus_one, 1e-5)
            assert off_by(out, want) <= allowed_error(off_by(torch_own, want), rounding(dtype, 2))


def rotated(x, position, cos, sin):
    angles = cos.shape[1]
    first, second, rest = x[..., :angles], x[..., angles : 2 * angles], x[..., 2 * angles :]
    c, s = cos[position], sin[position]
    return torch.cat([first * c - second * s, second * c + first * s, rest], dim=-1)


@pytest.mark.parametrize("head_dim, angles", [(64, 32), (16, 8), (128, 32), (24, 12), (256, 128), (512, 96)])
@pytest.mark.parametrize("normed", [False, True])
def test_rotate_to_cache(device, head_dim, angles, normed):
    heads, kv_heads, batch, rows, slots, capacity = 6, 2, 3, 4, 5, 20
    positions = torch.tensor([[3, 4, 5, 6], [-1, -1, -1, -1], [0, 1, -1, 30]], device=device)
    places = torch.tensor([[9, 8, -1, 0], [-1, -1, -1, -1], [0, 1, -1, 19]], device=device)
    caches = torch.tensor([4, 1, 0], dtype=torch.int32, device=device)
    phase = torch.rand(40, angles, dtype=torch.float64)
    for dtype in dtypes_on(device):
        real = torch.promote_types(dtype, torch.float32)
        cos, sin = (f(phase).to(real).to(device) for f in (torch.cos, torch.sin))
        projected = torch.randn(batch * rows, (heads + 2 * kv_heads) * head_dim, dtype=torch.float64)
        projected = projected.to(dtype).to(device)
        gains = [torch.randn(head_dim).to(dtype).to(device) if normed else None for _ in range(2)]
        k_cache, v_cache = (
            torch.full((slots, kv_heads, capacity, head_dim), 7.0, dtype=dtype, device=device) for _ in range(2)
        )
        q = rotate_to_cache(
            *(projected, k_cache, v_cache, positions, places, caches, cos, sin),
            q_norm=gains[0],
            k_norm=gains[1],
            eps=1e-6,
        )
        assert q.shape == (batch, heads, rows, head_dim) and q.transpose(1, 2).is_contiguous()
        x = projected.double().cpu().view(batch, rows, -1, head_dim)
        want_k, want_v = (torch.full(k_cache.shape, 7.0, dtype=torch.float64) for _ in range(2))
        for b in range(batch):
            for r in range(rows):
                position, place, cache = int(positions[b, r]), int(places[b, r]), int(caches[b])
                queries, keys, values = x[b, r].split([heads, kv_heads, kv_heads])
                if normed:
                    queries, keys = (
                        rms(y, gain.double().cpu(), 1e-6, False) for y, gain in zip((queries, keys), gains, strict=True)
                    )
                tables = cos.double().cpu(), sin.double().cpu()
                if position >= 0:
                    assert off_by(q[b, :, r], rotated(queries, position, *tables)) <= rounding(dtype, 2)
                if place >= 0:
                    want_k[cache, :, place] = rotated(keys, position, *tables)
                    want_v[cache, :, place] = values
        assert off_by(k_cache, want_k) <= rounding(dtype, 2)
        assert off_by(v_cache, want_v) == 0


def test_places_that_do_not_exist_are_refused_on_the_cpu():
    def call(position=0, place=0, cache=0):
        caches = torch.zeros(2, 1, 4, 8), torch.zeros(2, 1, 4, 8)
        at = [torch.tensor([[position]]), torch.tensor([[place]]), torch.tensor([cache], dtype=torch.int32)]
        rotate_to_cache(torch.ones(1, 24), *caches, *at, torch.ones(6, 4), torch.ones(6, 4))

    call(position=5, place=3, cache=1)
    for what, message in (
        (dict(position=6), "position 6 of row 0 is outside the tables of 6 positions"),
        (dict(place=4), "place 4 of cache 0 does not exist: there are 2 caches of 4 places"),
        (dict(cache=2), "place 0 of cache 2 does not exist"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(**what)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("width", [8, 96, 1536])
def test_gated(device, activation, width):
    def own(x):
        return torch.nn.functional.silu(x) if activation == "silu" else torch.nn.functional.gelu(x, approximate="tanh")

    for dtype in dtypes_on(device):
        x = torch.randn(7, 2 * width, dtype=torch.float64).mul(4).to(dtype).to(device)
        x[0, :4] = torch.tensor([-60000.0, 60000.0, -100.0, 100.0])
        gate, up = x.double().cpu().chunk(2, dim=1)
        up[0, :4] = 1.0
        x[0, width : width + 4] = 1.0
        want = own(gate) * up
        torch_own = own(x[:, :width]) * x[:, width:]
        rows = slice(1, None)
        assert off_by(gated(x, activation)[rows], want[rows]) <= allowed_error(
            off_by(torch_own[rows], want[rows]), rounding(dtype, 2)
        )
        torch.testing.assert_close(gated(x, activation)[0].double().cpu(), want[0], rtol=rounding(dtype, 4), atol=1e-4)


@pytest.mark.parametrize("rank", HALVES_RANKS)
@pytest.mark.parametrize("entries, rows, first", [(1, 14, 7), (1, 130, 0), (3, 40, 3)])
@pytest.mark.parametrize("activation", [None, "silu", "gelu_tanh"])
def test_add_halves(device, activation, entries, rows, first, rank):
    """The second projection has no adapter, and the third one takes the columns behind those of the first."""
    sizes, places = (64, 96, 160), (0, 0, rank)
    ends, width = (64, 160, 320), sum(sizes)
    for dtype in dtypes_on(device)[-2:]:
        both = torch.randn(entries * rows, width + 2 * rank, dtype=torch.float64).to(dtype)
        halves = torch.randn(width, rank, dtype=torch.float64).div(rank**0.5)
        halves[64:160] = 0
        halves, base = halves.to(dtype), both[:, :width].clone()
        inner = [both[:, width + place : width + place + rank].double() for place in places]
        added = [x @ half.double().T for x, half in zip(inner, halves.split(sizes), strict=True)]
        has_adapter = torch.arange(rows).repeat(entries)[:, None] >= first
        want = base.double() + has_adapter * torch.cat(added, dim=1)
        mine = both.to(device)
        product, inner = mine.split([width, 2 * rank], dim=1)
        where = {"entries": entries, "first": first, "activation": activation}
        out = add_halves(product, inner, halves.to(device), ends, places, **where)
        assert torch.equal(inner.cpu(), both[:, width:])
        if activation is None:
            assert out is product and off_by(out, want) <= rounding(dtype, 2)
            kept = ~has_adapter[:, 0]
            assert torch.equal(out.cpu()[kept], base[kept])
            continue
        # The sums are rounded before the gate, as those of two operators.
        assert torch.equal(product.cpu(), base)
        apart = gated(want.to(dtype).to(device), activation).double()
        assert off_by(out, apart.cpu()) <= rounding(dtype, 4)


def test_halves_of_another_form_are_refused(device):
    def call(width=64, rank=16, end=64, place=0, inner=16, columns=64):
        rows = torch.zeros(4, columns + inner, dtype=torch.bfloat16, device=device).split([columns, inner], dim=1)
        add_halves(*rows, torch.zeros(width, rank, dtype=torch.bfloat16, device=device), [end], [place])

    call()
    for what, message in (
        (dict(rank=24, inner=24), "rank 24 is not supported; 16, 32, 64 and 128 are"),
        (dict(width=32), r"halves must be contiguous \[64, 16\]"),
        (dict(end=32), "an end and a place in inner for each"),
        (dict(place=8), "begins in inner at 8"),
        (dict(width=48, end=48, columns=48), "a projection ends at 48"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(**what)


@pytest.mark.parametrize("gate", [0, 2])
def test_add_halves_passes_opcheck(device, gate):
    product, inner, halves = (torch.randn(size, device=device).half() for size in ((6, 64), (6, 16), (64, 16)))
    torch.library.opcheck(torch.ops.dflash_ext.add_halves_.default, (product, inner, halves, [64], [0], 2, 1, gate))


@pytest.mark.parametrize("behind", [8, 3])
def test_rows_that_lie_apart_give_the_same_bits(device, behind):
    """Such as the rows of a wider product, of which each holds something else behind them."""

    def apart(rows):
        return torch.cat([rows, rows.new_full((len(rows), behind), torch.nan)], dim=1)[:, : rows.shape[1]]

    for dtype in dtypes_on(device):
        residual, update = (torch.randn(6, 64, dtype=torch.float64).to(dtype).to(device) for _ in range(2))
        norm, projected = torch.ones(64, dtype=dtype, device=device), torch.cat([residual, update], dim=1)
        sums = [residual.clone() for _ in range(2)]
        outs = [add_rms_norm(sum_, norm, update=u) for sum_, u in zip(sums, (update, apart(update)), strict=True)]
        assert torch.equal(*sums) and torch.equal(*outs)
        assert torch.equal(gated(projected), gated(apart(projected)))
        places = torch.arange(6, device=device)[None]
        tables = torch.rand(2, 8, 8, device=device).to(torch.promote_types(dtype, torch.float32)).unbind()
        caches, which = [], torch.zeros(1, dtype=torch.int32, device=device)
        for rows in (projected, apart(projected)):
            k_cache, v_cache = (torch.zeros(1, 2, 8, 16, dtype=dtype, device=device) for _ in range(2))
            caches.append((rotate_to_cache(rows, k_cache, v_cache, places, places, which, *tables), k_cache, v_cache))
        assert all(torch.equal(*pair) for pair in zip(*caches, strict=True))


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="gated: activation is 'relu'; 'silu' and 'gelu_tanh' are supported"):
        gated(torch.ones(1, 2), "relu")


def test_opcheck(device):
    x = torch.randn(3, 16, device=device)
    ops = torch.ops.dflash_ext
    torch.library.opcheck(ops.add_rms_norm.default, (x, x.clone(), None, x[0].clone(), 1e-6, False))
    torch.library.opcheck(ops.gated.default, (x, 0))
    caches = [torch.zeros(2, 1, 4, 8, device=device) for _ in range(2)]
    at = [torch.zeros(1, 1, dtype=torch.int64, device=device)] * 2
    slots = torch.zeros(1, dtype=torch.int32, device=device)
    tables = [torch.ones(6, 4, device=device)] * 2
    projected = torch.randn(1, 32, device=device)
    arguments = (projected, *caches, *at, slots, *tables, None, None, 1e-6, False)
    torch.library.opcheck(ops.rotate_to_cache.default, arguments)


KINDS = {"Llama": (), "Qwen 2": ("qkv_bias", "out_bias"), "Qwen 3": ("q_norm", "k_norm")}
KINDS["Gemma"] = ("q_norm", "k_norm", "after_attention", "after_mlp", "gate_up_bias", "down_bias")


def stack(dtype, optional, *, layers=3, heads=4, kv_heads=2, head_dim=16, inner=40, rows=3):
    """Weights by layer and name, and the arguments of run_layers behind them.

    Layers of the first kind have a page of 32 keys a slot, and those of the second kind 2 pages of 8 keys in turns.
    """
    width = 24
    sizes = {"qkv": ((heads + 2 * kv_heads) * head_dim, width), "out": (width, heads * head_dim)}
    sizes |= {"gate_up": (2 * inner, width), "down": (width, inner)}
    sizes |= {f"{name}_bias": size[:1] for name, size in sizes.items()}
    sizes |= {"q_norm": (head_dim,), "k_norm": (head_dim,)}
    given = [name for name in WEIGHTS if "bias" not in name and name not in KINDS["Gemma"]] + list(optional)
    weights = [
        {name: torch.randn(sizes.get(name, (width,))).div(4).to(dtype) if name in given else None for name in WEIGHTS}
        for _ in range(layers)
    ]
    start = torch.tensor([15, 0])
    positions = start[:, None] + torch.arange(rows)
    slots = torch.tensor([2, 0], dtype=torch.int32)
    phase = torch.rand(32, head_dim // 2, dtype=torch.promote_types(dtype, torch.float32))
    rotary = [phase.cos(), phase.sin(), phase.sin(), phase.cos()]
    masks = [IntervalMask.decode(start, rows, causal=True, kv_len=32, window=window) for window in (None, 4)]
    kinds, forms = [0, 1, 0][:layers], [(3, 32), (6, 8)]
    caches = [
        [torch.randn(forms[kind][0], kv_heads, forms[kind][1], head_dim).to(dtype) for kind in kinds] for _ in range(2)
    ]
    pages = (2 * slots[:, None] + positions // 8 % 2).int().view(-1)
    tables = [slots[:, None], 2 * slots[:, None] + torch.tensor([0, 1, 0, 1], dtype=torch.int32)]
    one_by_one = positions.view(-1, 1)
    where = [[positions, one_by_one], [positions, one_by_one % 8], [slots, pages], tables]
    return weights, [kinds, *caches, *where, rotary, masks]


def layer_by_layer(hidden, weights, kinds, k_caches, v_caches, *where, softcap, **norm):
    """The operators one by one."""
    eps, plus_one = norm["eps"], norm["plus_one"]
    positions, places, pages, tables, rotary, masks = where
    outputs = []
    for layer, kind, k, v in zip(weights, kinds, k_caches, v_caches, strict=True):

        def product(x, name, layer=layer, **around):
            return linear(x, layer[name], layer[f"{name}_bias"], norm_eps=eps, norm_plus_one=plus_one, **around)

        def add(hidden, x, name, after, layer=layer, product=product):
            if after is None:
                return product(x, name, residual=hidden)
            hidden = hidden.clone()
            add_rms_norm(hidden, after, update=product(x, name), update_norm=after, **norm)
            return hidden

        projected = product(hidden, "qkv", norm=layer["attention_norm"])
        q_norm, k_norm = layer["q_norm"], layer["k_norm"]
        to = positions[kind], places[kind], pages[kind], *rotary[2 * kind : 2 * kind + 2]
        q = rotate_to_cache(projected, k, v, *to, q_norm=q_norm, k_norm=k_norm, **norm)
        q = q.transpose(1, 2).reshape(*positions[0].shape, *q.shape[1::2]).transpose(1, 2)
        of_pages = k.transpose(1, 2), v.transpose(1, 2)
        out = block_attn_decode(q, *of_pages, masks[kind], block_table=tables[kind], scale=0.3, softcap=softcap)
        hidden = add(hidden, out.transpose(1, 2).flatten(2).flatten(0, 1), "out", layer["after_attention"])
        inner = product(hidden, "gate_up", norm=layer["mlp_norm"], gate="silu")
        hidden = add(hidden, inner, "down", layer["after_mlp"])
        outputs.append(hidden)
    return outputs


def flat(weights, dtype):
    none = torch.empty(0, dtype=dtype)
    return [none if layer[name] is None else layer[name] for layer in weights for name in WEIGHTS]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("optional", KINDS.values(), ids=list(KINDS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_at_once_are_their_operators_to_the_bit(dtype, optional, threads):
    weights, where = stack(dtype, optional)
    norm = {"eps": 1e-5, "plus_one": "after_mlp" in optional}
    hidden = torch.randn(6, 24).to(dtype)
    copies = [cache.clone() for cache in where[1]], [cache.clone() for cache in where[2]]
    want = layer_by_layer(hidden, weights, where[0], *copies, *where[3:], softcap=20.0, **norm)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        options = {"scale": 0.3, "softcap": 20.0, "activation": "silu", "taps": [2, 0]} | norm
        out, tapped = run_layers(hidden, flat(weights, dtype), *where, **options)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out, want[2])
    assert torch.equal(tapped, torch.stack([want[2], want[0]], dim=1))
    for cache, copy in zip([*where[1], *where[2]], [*copies[0], *copies[1]], strict=True):
        assert torch.equal(cache, copy)


def test_layers_that_do_not_fit_change_nothing():
    """The caches are written when all layers were found to fit."""
    weights, where = stack(torch.float32, ())
    weights[2]["down"] = weights[2]["down"][:, :-1].contiguous()
    before = where[1][0].clone()
    options = {"scale": 0.3, "softcap": None, "activation": "silu", "eps": 1e-5, "plus_one": False}
    with pytest.raises(RuntimeError, match="linear"):
        run_layers(torch.randn(6, 24), flat(weights, torch.float32), *where, **options)
    assert torch.equal(where[1][0], before)
    # No queue is left open behind the error: an operator runs at once.
    assert add_rms_norm(torch.ones(1, 8), torch.ones(8)).sum() > 0


def test_layers_at_once_pass_opcheck():
    weights, (*where, masks) = stack(torch.float32, KINDS["Qwen 3"])
    bounds = [bound for mask in masks for bound in (mask.ctx_lo, mask.ctx_hi, mask.blk_lo, mask.blk_hi)]
    planned = 32, [torch.empty(0)] * 2, [], [0]
    arguments = torch.randn(6, 24), flat(weights, torch.float32), *where, bounds, *planned, 1e-5, False, 1, 0.3, None
    torch.library.opcheck(torch.ops.dflash_ext.run_layers.default, (*arguments, False))
