"""The engine's own forward of a target, layer by layer, against the model's modules."""

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dflash_ext.decode.forward import LeanForward
from dflash_ext.decode.forward.families import FAMILIES, has_lean_forward
from dflash_ext.decode.forward.layers import Stack
from dflash_ext.models import Target
from python_tests.tiny import GEMMA, SHAPE, tiny_model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "llama": lambda: tiny_model("llama"),
    "llama, biases and scaled rotary factors": lambda: LlamaForCausalLM(
        LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, head_dim=24, sliding_window=8)),
    "mistral, no window": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=8, max_window_layers=3)
    ),
    "qwen3": lambda: tiny_model("qwen3"),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE | GEMMA | {"query_pre_attn_scalar": 24})),
    "gemma3": lambda: tiny_model("gemma3"),
}
TAPS = [0, 3, 5]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def made(name: str, dtype: torch.dtype = torch.float32) -> Target:
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).eval().requires_grad_(False)
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or "bias" in parameter_name:
            parameter.data.normal_(0.5, 0.2)
    return Target(model, TAPS)


def test_every_family_is_here():
    assert {type(make()).__name__ for make in MODELS.values()} == set(FAMILIES)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_and_logits_are_the_models_own(name):
    """In pieces of several sizes, of rows that have different lengths and stand in any slots."""
    target = made(name)
    assert has_lean_forward(target)
    ids = torch.randint(3, 96, (2, 40))
    own = target.model(ids, output_hidden_states=True)
    want = torch.cat([own.hidden_states[tap + 1] for tap in TAPS], dim=-1)
    forward = LeanForward(target, slots=4, tokens=100)
    slots = torch.tensor([2, 0], dtype=torch.int32)
    lengths = torch.tensor([0, 0])
    for counts in ([11, 7], [1, 1], [0, 9], [16, 5], [1, 16], [11, 2]):
        counts = torch.tensor(counts)
        rows = torch.zeros(2, int(counts.max()), dtype=torch.int64)
        for row, (start, count) in enumerate(zip(lengths, counts, strict=True)):
            rows[row, :count] = ids[row, start : start + count]
        column = torch.arange(rows.shape[1])
        positions = torch.where(column < counts[:, None], lengths[:, None] + column, -1)
        hidden, features = forward.hidden(rows, positions, lengths, counts, slots, TAPS)
        logits = forward.logits(hidden)
        for row, (start, count) in enumerate(zip(lengths, counts, strict=True)):
            there = slice(start, start + count)
            torch.testing.assert_close(features[row, :count], want[row, there], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(logits[row, :count], own.logits[row, there], atol=1e-4, rtol=1e-4)
        lengths = lengths + counts
    assert lengths.tolist() == [40, 40]


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_rounding_in_bfloat16_is_no_worse_than_the_models_own(name):
    exact, rounded = made(name, torch.float64), made(name, torch.bfloat16)
    for parameter, other in zip(exact.model.parameters(), rounded.model.parameters(), strict=True):
        parameter.data = other.data.double()
    ids = torch.randint(3, 96, (4, 40))
    want = exact.features(ids)
    forward = LeanForward(rounded, slots=4, tokens=100)
    positions = torch.arange(40).expand(4, -1).contiguous()
    start, counts = torch.zeros(4, dtype=torch.int64), torch.full((4,), 40)
    got = forward.hidden(ids, positions, start, counts, torch.arange(4, dtype=torch.int32), TAPS)[1]
    own = rounded.features(ids)
    for tap in range(len(TAPS)):
        there = slice(64 * tap, 64 * (tap + 1))
        mine, theirs = ((x[..., there].double() - want[..., there]).square().mean() for x in (got, own))
        assert mine <= 1.5**2 * theirs


@torch.no_grad()
def test_packed_weights_are_the_models_own_memory():
    target = made("qwen2")
    ids = torch.randint(3, 96, (1, 9))
    before = target.model(ids).logits
    size = sum(p.numel() for p in target.model.parameters())
    first, second = LeanForward(target, slots=1, tokens=20), LeanForward(target, slots=1, tokens=20)
    for layer, one, other in zip(target.layers, first.stack.layers, second.stack.layers, strict=True):
        attention = layer.self_attn
        assert one.qkv.data_ptr() == other.qkv.data_ptr() == attention.q_proj.weight.data_ptr()
        assert one.gate_up.data_ptr() == other.gate_up.data_ptr() == layer.mlp.gate_proj.weight.data_ptr()
        assert torch.equal(
            one.qkv, torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        )
        assert torch.equal(one.qkv_bias[-32:], attention.v_proj.bias)
    assert sum(p.numel() for p in target.model.parameters()) == size
    assert torch.equal(target.model(ids).logits, before)
    target.layers[0].self_attn.k_proj.weight.mul_(2)
    assert torch.equal(first.stack.layers[0].qkv[64:96], target.layers[0].self_attn.k_proj.weight)


def test_what_has_no_forward_of_our_own():
    target = made("llama")
    mlp, own = target.layers[1].mlp, target.layers[1].mlp.up_proj
    for other in (torch.nn.Sequential(own), torch.nn.Linear(64, 96, bias=False, dtype=torch.bfloat16)):
        mlp.up_proj = other
        assert not has_lean_forward(target)
    mlp.up_proj = own
    assert has_lean_forward(target)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("entries, rows", [(1, 1), (3, 11), (5, 16), (2, 40), (3, 100)])
@pytest.mark.parametrize("dtype, exact", [(torch.bfloat16, False), (torch.float16, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("name", MODELS)
def test_layers_at_once_have_the_bits_of_layers_one_by_one_on_a_gpu(name, dtype, exact, entries, rows, monkeypatch):
    """With few rows, which a kernel of the package serves, and with so many that PyTorch's products do."""
    target = made(name, dtype)
    target.model.cuda()
    target = Target(target.model, TAPS)
    slots = torch.arange(1, entries + 1, dtype=torch.int32, device="cuda")
    results = []
    for at_once in (True, False):
        if not at_once:
            monkeypatch.setattr(Stack, "_runs_at_once", lambda *_: False)
        forward = LeanForward(target, slots=entries + 1, tokens=2 * rows, exact=exact)
        torch.manual_seed(1)
        found = []
        for part in range(2):
            ids = torch.randint(3, 96, (entries, rows), device="cuda")
            start = torch.full((entries,), part * rows, device="cuda")
            positions = start[:, None] + torch.arange(rows, device="cuda")
            counts = torch.full((entries,), rows, device="cuda")
            # With and without the last layer's output.
            found += [*forward.hidden(ids, positions, start, counts, slots, TAPS[: 3 - part])]
        results.append(
            [*found, forward.hidden(ids, positions, start, counts, slots)[0], *forward.cache.buffers.values()]
        )
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other) and one.isfinite().all()
