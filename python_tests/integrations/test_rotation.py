"""The rotary embedding in fewer kernels, inside the models of transformers."""

import importlib

import pytest
import torch

from dflash_ext.integrations.rotation import NAME, replaced_rotation, rotated, rotating_modules
from python_tests.tiny import tiny_model


def angles(batch: int, length: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    halves = torch.randn(batch, length, dim // 2, dtype=torch.float64)
    both = torch.cat([halves, halves], dim=-1)
    return both.cos(), both.sin()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_values_and_gradients_are_those_of_the_models_own_function(family):
    torch.manual_seed(0)
    (module,) = rotating_modules(tiny_model(family))
    q, k = (torch.randn(2, heads, 5, 16, dtype=torch.float64, requires_grad=True) for heads in (3, 1))
    cos, sin = angles(2, 5, 16)
    ours, theirs = rotated(q, k, cos, sin), getattr(module, NAME)(q, k, cos, sin)
    torch.testing.assert_close(ours, theirs)
    grads = [torch.randn_like(each) for each in ours]
    torch.testing.assert_close(torch.autograd.grad(ours, (q, k), grads), torch.autograd.grad(theirs, (q, k), grads))


def test_it_runs_within_the_context_alone():
    model = tiny_model("llama")
    modules = rotating_modules(model)
    (own,) = (getattr(module, NAME) for module in modules)
    with replaced_rotation(modules):
        assert getattr(modules[0], NAME) is rotated
    assert getattr(modules[0], NAME) is own


@pytest.mark.parametrize("family", ["phi3", "cohere", "glm"])
def test_functions_that_rotate_other_pairs_or_a_part_stay(family):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    part = type("Attention", (torch.nn.Module,), {"num_key_value_groups": 1, "__module__": module.__name__})()
    assert rotating_modules(part) == []
