"""A linear layer with a low-rank update against its definition."""

import pytest
import torch
from torch.nn.functional import linear

from dflash_ext.models.lora.linear import lora_linear

SHAPES = [(2, 5, 16), (12, 16), (12,), (3, 16), (12, 3)]


def inputs(device, dtype, trained=torch.float32):
    torch.manual_seed(0)
    x, weight, bias, a, b = (torch.randn(shape, dtype=torch.float64) for shape in SHAPES)
    frozen = [each.to(device, dtype) for each in (x, weight, bias)]
    return *frozen, *(each.to(device, trained) for each in (a, b))


def run(call, x, weight, bias, a, b):
    leaves = [each.clone().requires_grad_() for each in (x, a, b)]
    out = call(leaves[0], weight, bias, *leaves[1:])
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
    return out, *torch.autograd.grad(out, leaves, upstream)


def definition(x, weight, bias, a, b):
    return linear(x, weight, bias) + 1.5 * linear(linear(x, a), b)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_it_is_its_definition(device, dtype, tolerance, has_bias):
    trained = torch.float64 if dtype == torch.float64 else torch.float32
    given = list(inputs(device, dtype, trained))
    if not has_bias:
        given[2] = None
    want = run(definition, *(None if each is None else each.double() for each in given))
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        got = run(lambda *each: lora_linear(*each, 1.5), *given)
    assert got[0].dtype == got[1].dtype == dtype and got[2].dtype == got[3].dtype == trained
    for ours, exact in zip(got, want, strict=True):
        assert (ours.double() - exact).norm() < tolerance * exact.norm()


def test_it_keeps_its_input_and_the_inner_product_alone(device):
    x, weight, bias, a, b = inputs(device, torch.float32)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: sizes.append(kept.numel()) or kept, lambda kept: kept):
        lora_linear(x.requires_grad_(), weight, bias, a.requires_grad_(), b.requires_grad_(), 1.0)
    assert sum(sizes) == x.numel() + 10 * 3 + weight.numel() + a.numel() + b.numel()


def test_what_is_frozen_gets_no_gradient(device):
    x, weight, bias, a, b = inputs(device, torch.float32)
    (grad,) = torch.autograd.grad(lora_linear(x, weight, bias, a, b.requires_grad_(), 2.0).sum(), b)
    assert grad.abs().sum() > 0
