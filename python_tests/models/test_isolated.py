"""Layers that get inputs of their own."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dflash_ext.models.isolated import isolated, layer_outputs, near, random_states
from python_tests.tiny import random_prompts, tiny_gemma4, tiny_model

IDS = torch.tensor(random_prompts(7))


@pytest.mark.parametrize("family", ["llama", "gemma4"])
def test_a_layer_does_not_see_what_the_one_before_it_puts_out(family):
    model = tiny_gemma4() if family == "gemma4" else tiny_model(family)
    layers = model.get_decoder().layers
    states = random_states(1, 7, 64)
    first = layer_outputs(layers, states, lambda: model(IDS))
    assert {number for number, _ in first} == set(range(6)) and (3, "self_attn") in first
    torch.testing.assert_close(first[0, "input"], model.get_input_embeddings()(IDS))
    layers[2].mlp.register_forward_hook(lambda _, __, output: output * 2)
    second = layer_outputs(layers, states, lambda: model(IDS))
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert (2, "mlp") in changed and {number for number, _ in changed} == {2}


def test_other_threads_are_left_alone():
    model = tiny_model("llama")
    want = model(IDS).logits
    with isolated(model.model.layers, random_states(1, 7, 64), lambda *_: None), ThreadPoolExecutor(1) as pool:
        assert not torch.equal(model(IDS).logits, want)
        assert torch.equal(pool.submit(lambda: model(IDS).logits).result(), want)
    assert torch.equal(model(IDS).logits, want)


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.03), (torch.float16, 0.0036), (torch.float32, 2.5e-4)])
def test_what_is_near(dtype, share):
    row = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert near(row.double().mul(1 + share).to(dtype), row)
    assert not near(row.double().mul(1 + 1.5 * share).to(dtype), row)
    assert near(torch.zeros(3), torch.zeros(3)) and not near(torch.full((3,), torch.nan), torch.ones(3))
