"""Fused operators in the place of transformers' modules."""

import pytest
import torch
from torch import nn

from dflash_ext.integrations.fused_layers import fused_forwards, replaced_forwards
from python_tests.tiny import FAMILIES, random_prompts, tiny_model

IDS = torch.tensor(random_prompts(9, 9))


def gradient(model) -> torch.Tensor:
    inputs = model.get_input_embeddings()(IDS).requires_grad_()
    model(inputs_embeds=inputs).logits.square().sum().backward()
    return inputs.grad


def randomised(model: nn.Module) -> nn.Module:
    """Norms of random weights, which a new model does not have."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            nn.init.normal_(module.weight, mean=0.5, std=0.3)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_mlps_of_every_family_are_replaced_and_compute_the_same(family):
    model = randomised(tiny_model(family))
    forwards = fused_forwards(model)
    named = {name for name, module in model.named_modules() if module in forwards}
    expected = {n for n, m in model.named_modules() if type(m).__name__.endswith("RMSNorm") or n.endswith(".mlp")}
    assert named == expected and len(named) >= 6 * 3 + 1
    calls, want = [], gradient(model)
    counted = {
        module: lambda *args, forward=forward: calls.append(1) or forward(*args) for module, forward in forwards.items()
    }
    with replaced_forwards(counted):
        got = gradient(model)
    assert len(calls) == len(forwards)
    assert (got - want).norm() < 1e-5 * want.norm()
    assert torch.equal(gradient(model), want) and not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_norms_of_large_weights_are_told_apart_in_bfloat16(family):
    """Trained ones of Gemma 3 270M have weights of 10 to 100, beside which the 1 that it adds is hard to see."""
    norm = tiny_model(family).model.norm.bfloat16()
    nn.init.uniform_(norm.weight, 40, 80)
    row = torch.randn(64, 64).bfloat16()
    want, got = norm(row).float(), fused_forwards(norm)[norm](row).float()
    assert (got - want).norm() < 4e-3 * want.norm()


def test_a_weight_that_is_put_in_the_place_of_another_is_read():
    """As FSDP does."""
    model = tiny_model("llama")
    norm = model.model.norm
    forward, row = fused_forwards(model)[norm], torch.randn(1, 64)
    norm.weight = nn.Parameter(torch.rand(64))
    torch.testing.assert_close(forward(row), norm(row))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_mlp_that_clamps_large_numbers_keeps_its_forward(dtype):
    """As those of DeepSeek-V4, which have the modules of any other gated MLP."""
    mlp = tiny_model("llama").model.layers[0].mlp.to(dtype)
    gate, up = mlp.gate_proj, mlp.up_proj
    assert mlp in fused_forwards(mlp)
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(gate(x).clamp(max=1)) * up(x).clamp(-1, 1))
    assert mlp not in fused_forwards(mlp)


def test_a_module_that_computes_something_else_keeps_its_forward():
    model = tiny_model("llama")
    norm, mlp = model.model.norm, model.model.layers[0].mlp
    norm.forward = lambda x: x * 2
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.up_proj(x)) * mlp.gate_proj(x))
    own = norm.forward
    forwards = fused_forwards(model)
    assert norm not in forwards and mlp not in forwards and model.model.layers[1].mlp in forwards
    with replaced_forwards({norm: lambda x: x}):
        assert norm.forward is not own
    assert norm.forward is own
