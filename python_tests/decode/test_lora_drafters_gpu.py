"""LoRA drafters in CUDA graphs, in bfloat16."""

import pytest
import torch

from dflash_ext.decode import Engine, decode
from dflash_ext.decode.one_forward import OneForwardCycle
from dflash_ext.models import LoraDrafter, Target
from python_tests.decode.test_engine_gpu import FAMILIES, SHAPES, assert_nothing_waits, graphs_and_calls, regret
from python_tests.decode.test_lora_drafters import CYCLES, KINDS, WAYS, pair_of
from python_tests.tiny import random_prompts, tiny_model

pytestmark = pytest.mark.gpu


def pair(family: str, cycle: str, **options) -> tuple[Target, LoraDrafter, dict]:
    return pair_of(tiny_model(family, **SHAPES[family]).to("cuda", torch.bfloat16), cycle, rank=8, **options)


@CYCLES
@WAYS
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_join_and_leave_get_the_targets_tokens(family, merged, cycle):
    target, drafter, forwards = pair(family, cycle, causal=family == "llama", sampler_width=16)
    prompts = random_prompts(3, 300, 17, 40, 5, 1, 60, 9)
    for batch_size in (1, 3):
        options = dict(max_new_tokens=24, batch_size=batch_size, stop_token_ids=[7, 8])
        decoded = decode(target, drafter, prompts, **options, **forwards)
        for completion in decoded.completions:
            assert completion.tokens[-1] in (7, 8) or len(completion.tokens) == 24
        assert regret(target.model, prompts, [completion.tokens for completion in decoded.completions]) < 0.05


@WAYS
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_mode_gives_the_same_bits_whatever_is_drafted(family, merged):
    prompts = random_prompts(300, 3, 40)
    texts = []
    for cycle in (None, *KINDS):
        target, drafter, forwards = pair(family, cycle or "whole")
        options = dict(max_new_tokens=60, exact=True, batch_size=2)
        decoded = (
            decode(target, drafter, prompts, **options, **forwards)
            if cycle
            else decode(target, None, prompts, **options)
        )
        texts.append([completion.tokens for completion in decoded.completions])
    assert all(text == texts[0] for text in texts)


@CYCLES
@WAYS
@pytest.mark.parametrize("temperature, sampler", [(0.0, None), (1.0, 16)])
def test_a_graph_does_what_the_cycle_does(cycle, merged, temperature, sampler):
    target, drafter, forwards = pair("qwen3", cycle, sampler_width=sampler)
    options = dict(max_new_tokens=40, temperature=temperature, top_p=0.9 if temperature else None)
    texts = graphs_and_calls(target, drafter, random_prompts(4, 9, 70, 31), engine_options=forwards, **options)
    assert texts[0] == texts[1]


@CYCLES
def test_nothing_waits_for_the_device_in_a_cycle(cycle):
    target, drafter, forwards = pair("llama", cycle, sampler_width=16)
    assert_nothing_waits(Engine(target, drafter, slots=2, max_length=200, **forwards))


@pytest.mark.parametrize("large, most", [(False, 2), (True, 4)])
def test_few_rows_take_one_forward(large, most, monkeypatch):
    """With 5 groups of 5 mask rows a slot has 30 rows."""
    if large:
        monkeypatch.setattr("dflash_ext.decode.forward.adapted.MOST_MERGED", 0)
    target, drafter, _ = pair("llama", "one forward")
    kinds = [type(Engine(target, drafter, slots=n, max_length=100).cycle) is OneForwardCycle for n in (most, most + 1)]
    assert kinds == [True, False]
