"""add_rms_norm, rotate_to_cache and gated against their definitions in float64."""

import pytest
import torch

from dflash_ext.ops.layer import add_rms_norm, gated, rotate_to_cache
from python_tests.exactness import allowed_error

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def dtypes_on(device):
    return [d for d in DTYPES if device == "cpu" or d != torch.float64]


def rms(x, weight, eps, plus_one):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (weight + plus_one)


def off_by(got, want):
    return ((got.double().cpu() - want).abs().max() / want.abs().max()).item()


def rounding(dtype, steps=1):
    return steps * torch.finfo(dtype).eps


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
