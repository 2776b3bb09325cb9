"""Every build of the kernels gives the same results; attention is compared with its definition in each."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dflash_ext import native

MEASURE = """
import torch
from dflash_ext import kv_inject, linear, masked_cross_entropy, sample, verify
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    logits = (3 * torch.randn(6, 7, 1100, dtype=torch.float64)).to(dtype)
    logits[1, :, ::3] = -torch.inf
    logits[2, 1, 5] = logits[2, 3, 1098:] = torch.inf
    flat, seed = logits.flatten(0, 1), torch.tensor([1])
    for filters in ({}, {"top_k": 20, "temperature": 0.7}, {"top_k": 500}, {"top_p": 0.9, "min_p": 0.001}):
        drawn, entropy, confidence = sample(
            flat, seed, return_filtered_entropy=True, return_confidence=True, **filters
        )
        print(*confidence.tolist(), *drawn.token.tolist(), *drawn.argmax.tolist())
        print(*entropy.tolist(), *drawn.entropy.tolist(), *drawn.margin.tolist(), *drawn.pivot.tolist())
        draft = drawn.token.view(6, 7)[:, :6]
        noisy = logits.roll(1, -1) * 0.1 + logits
        print(*torch.cat(verify(draft, noisy, draft_logits=logits[:, :6], seed=seed, temperature=1.0)).tolist())
    counts, bias = torch.arange(2200).remainder(5).sub(1).int().view(2, 1100), torch.randn(1100)
    tables = {"token_counts": counts, "table_rows": torch.arange(42) % 2, "logit_bias": bias}
    print(*sample(flat, seed, repetition_penalty=1.3, frequency_penalty=0.2, **tables).prob.tolist())
    cache = torch.zeros(2, 1, 2, 3, 8, 20, dtype=dtype)
    x, w, turn = torch.randn(2, 4, 16).to(dtype), torch.randn(120, 16).to(dtype), torch.randn(9, 9)
    slots = torch.arange(8).view(2, 4)
    kv_inject(x, w, cache[0], cache[1], slots, turn.cos(), turn.sin(), k_norm=torch.ones(1, 20), v_norm=True)
    print(*cache.flatten().tolist())
    x, w, bias = torch.randn(13, 700).to(dtype), torch.randn(2 * 51, 700).div(26).to(dtype), torch.randn(102).to(dtype)
    for gate in ("silu", "gelu_tanh"):
        print(*linear(x, w, bias, norm=x[0], gate=gate).flatten().tolist())
    x = torch.randn(3, 999, dtype=torch.float64).mul(4).to(dtype)
    x[1, ::3] = -torch.inf
    x[1, 1], x[2, 7] = 6e-8, 60000.0
    leaf = x.clone().requires_grad_()
    out = masked_cross_entropy(leaf, torch.tensor([5, 1, 7]), softcap=30.0)
    out.loss.backward()
    print(*out.nll.tolist(), *out.entropy.tolist(), leaf.grad.double().abs().sum().item())
"""


ATTENTION = """
from python_tests.ops import test_attention
test_attention.check_random_cases(40)
for dtype in test_attention.DTYPES:
    for options in ({}, {"causal": True, "window": 50}):
        test_attention.test_decode_against_caches_of_any_length(dtype, options)
"""


@functools.cache
def measure(isa):
    done = subprocess.run(
        [sys.executable, "-c", (ATTENTION if isa else "") + MEASURE],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"DFLASH_EXT_CPU_ISA": isa, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [torch.tensor([float(word) for word in line.split()]) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_instruction_sets_agree(isa):
    if isa not in (native.build_info() or {"cpu_isas": "baseline"})["cpu_isas"].split(","):
        pytest.skip(f"this build has no kernels for {isa}")
    best = measure("")
    for got, want in zip(measure(isa), best, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-5)
