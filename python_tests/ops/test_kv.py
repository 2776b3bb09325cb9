"""kv_inject against the same steps written for one token, layer and head at a time."""

import math

import pytest
import torch

from dflash_ext import kv_inject

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
        ({"positions": torch.zeros(2, 3)}, "positions"),
        ({"slots": torch.zeros(2, 3)}, "slots"),
        ({"k_norm": torch.zeros(8)}, r"k_norm is \[8\]; \[3, 8\]"),
        ({"cos": torch.zeros(30, 5), "sin": torch.zeros(30, 5)}, "R at most 4"),
        ({"cos": torch.zeros(2, 30, 4), "sin": torch.zeros(2, 30, 4)}, r"\[2, 30, 4\]"),
        ({"sin": torch.zeros(30, 3)}, "sin"),
        ({"features": torch.zeros(1, 4, 10), "positions": torch.zeros(1, 4)}, "for batch 2"),
        ({"block_table": torch.zeros(2, 3)}, "weight"),
    ],
)
def test_refusals_name_the_value(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        kv_inject(**arguments(**changes))
    assert "\n" not in str(caught.value)
