"""kv_inject's CUDA kernel: every layout against the definition, places that do not exist, and graphs."""

import pytest
import torch

from dflash_ext import kv_inject, reference
from python_tests.ops.test_kv import random_case

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

OPTIONS = {
    "qwen3": (2, 128, 128, {"k_norm": True}),
    "gemma": (1, 256, 256, {"k_norm": True, "norm_plus_one": True, "v_norm": True}),
    "long heads": (1, 512, 128, {"bias": True, "k_norm": True}),
    "partial": (3, 64, 32, {"bias": True, "k_norm": True, "norm_plus_one": True, "v_norm": True}),
    "interleaved": (3, 20, 20, {"bias": True, "rope_interleaved": True}),
    "norm after rope": (2, 18, 6, {"k_norm": True, "norm_after_rope": True}),
    "odd": (2, 7, 6, {"bias": True, "k_norm": True, "v_norm": True}),
    "long and odd": (1, 510, 34, {"k_norm": True, "rope_interleaved": True}),
}


def on_gpu(case):
    return {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in case.items()}


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
    ],
    ids=str,
)
def test_matches_the_definition(dtype, cache_dtype, option, paged):
    heads, head_dim, rotary, options = option
    case, caches = random_case(dtype, cache_dtype, heads, head_dim, rotary, paged, **options)
    wide = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in case.items()
    }
    want = [cache.double() for cache in caches]
    inner = (slice(None), *[slice(0, -1)] * 3, slice(0, head_dim))
    wide["positions"] = wide["positions"].clamp(max=39)
    reference.kv_inject(k_caches=want[0][inner], v_caches=want[1][inner], **wide)
    caches = [cache.cuda() for cache in caches]
    kv_inject(k_caches=caches[0][inner], v_caches=caches[1][inner], **on_gpu(case))
    rounding = max(torch.finfo(dtype).eps, torch.finfo(cache_dtype).eps, 1e-5)
    for cache, expected in zip(caches, want, strict=True):
        torch.testing.assert_close(cache.cpu().double(), expected, rtol=2 * rounding, atol=2 * rounding)
        assert (cache.cpu()[expected == 7.0] == 7.0).all()  # nothing else is written


def many_layers(layers=30, batch=2, length=3, heads=2, head_dim=64, capacity=16):
    """Arguments on the GPU, with more layers than one launch serves, and a theta for each."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).cuda()

    angles = randn(layers, 40, head_dim // 2)
    return {
        "features": randn(batch, length, 24).bfloat16(),
        "weight": (randn(layers * 2 * heads * head_dim, 24) / 5).bfloat16(),
        "k_caches": torch.zeros(layers, batch, heads, capacity, head_dim, device="cuda", dtype=torch.bfloat16),
        "v_caches": torch.zeros(layers, batch, heads, capacity, head_dim, device="cuda", dtype=torch.bfloat16),
        "positions": torch.arange(length).expand(batch, -1).contiguous().cuda(),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "k_norm": randn(layers, head_dim).bfloat16(),
    }


def expected(given):
    wide = {name: x.double().cpu() if x.is_floating_point() else x.cpu() for name, x in given.items()}
    reference.kv_inject(**wide)
    return wide["k_caches"], wide["v_caches"]


def test_one_graph_serves_all_positions():
    given = many_layers()
    given["slots"] = given["positions"].clone()
    kv_inject(**given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kv_inject(**given)
    for first in (5, 9):
        given["features"].normal_()
        given["positions"].add_(first)
        given["slots"].copy_(torch.tensor([[first, -1, first + 2], [0, first, -1]]))
        before = expected(given | {"slots": given["slots"].clone()})
        graph.replay()
        for got, want in zip((given["k_caches"], given["v_caches"]), before, strict=True):
            torch.testing.assert_close(got.double().cpu(), want, rtol=0.02, atol=0.02)


def test_places_that_do_not_exist():
    given = many_layers(layers=2)
    given["slots"] = torch.tensor([[0, 16, 1], [2, 3, 1 << 40]], device="cuda")
    given["positions"] = torch.tensor([[0, 1, 40], [-1, 4, 5]], device="cuda")
    kv_inject(**given)
    keys, values = given["k_caches"], given["v_caches"]
    written = values.any(-1).any(2).any(0)
    assert written.cpu().nonzero().tolist() == [[0, 0], [0, 1], [1, 2], [1, 3]]
    assert keys[:, 0, :, 1].isnan().all() and keys[:, 1, :, 2].isnan().all()
    assert keys[:, 0, :, 0].isfinite().all() and keys[:, 1, :, 3].isfinite().all() and values.isfinite().all()


def test_a_page_that_does_not_exist_is_not_written():
    given = many_layers(layers=2)
    pages = torch.zeros(2, 8, 4, 2, 64, device="cuda", dtype=torch.bfloat16)
    table = torch.tensor([[0, 1], [9, -1]], dtype=torch.int32, device="cuda")
    kv_inject(**given | {"k_caches": pages, "v_caches": pages.clone(), "block_table": table})
    assert pages[:, 0, :3].all(-1).all() and not pages[:, 1:].any()
