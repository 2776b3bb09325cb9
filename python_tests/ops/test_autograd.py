"""The transforms of torch.func on the operators, against PyTorch's own attention and cross-entropy."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vjp, vmap

from dflash_ext import IntervalMask, block_attn, linear_cross_entropy, masked_cross_entropy
from dflash_ext.ops.trained_layer import gated_linear, rms_norm, rotate_heads

VISIBLE = IntervalMask.causal(torch.tensor([6, 4]), max_len=6)


@pytest.fixture(autouse=True)
def no_fallback():
    """PyTorch warns if it has no rule of vmap for an operator."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*rule for dflash_ext")
        yield


def heads(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 4, 6, 8, dtype=torch.float64)


def attend(q, k, v, mask=VISIBLE):
    return block_attn(q, k, v, mask)


def sdpa(q, k, v, mask=VISIBLE):
    visible = mask.to_bool()
    empty = ~visible.any(-1, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, visible | empty).masked_fill(empty, 0.0)


def of(function):
    """A scalar that weights every output differently."""
    return lambda *inputs: (function(*inputs) * torch.arange(1.0, 9.0, dtype=torch.float64)).square().sum()


@pytest.mark.parametrize("argument", range(3))
def test_gradients_of_attention(argument):
    inputs = heads(2), heads(2), heads(2)
    torch.testing.assert_close(grad(of(attend), argument)(*inputs), grad(of(sdpa), argument)(*inputs))
    upstream = heads(2)
    got, want = (vjp(function, *inputs)[1](upstream)[argument] for function in (attend, sdpa))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (1, 0, None)])
@pytest.mark.parametrize("rows", ["a mask each", "one mask"])
def test_gradients_of_attention_per_sample(in_dims, rows):
    mask = VISIBLE if rows == "a mask each" else VISIBLE[:1]
    inputs = [heads(2) if dim is None else heads(3, 2).transpose(0, dim) for dim in in_dims]
    for transform in (lambda f: vmap(f, in_dims), lambda f: vmap(grad(of(f), (0, 1, 2)), in_dims)):
        got, want = (transform(lambda *x, f=f: f(*x, mask))(*inputs) for f in (attend, sdpa))
        torch.testing.assert_close(got, want)


def test_masks_per_sample():
    """A mask is a pytree, so vmap maps its bounds, too."""
    masks = [IntervalMask.causal(torch.tensor(lens), max_len=6) for lens in ([6], [3])]
    bounds = [torch.stack([getattr(mask, name) for mask in masks]) for name in ("ctx_lo", "ctx_hi", "blk_lo", "blk_hi")]
    inputs = heads(2, 2), heads(2, 2), heads(2, 2)
    got = vmap(lambda q, k, v, *each: block_attn(q, k, v, IntervalMask(*each, 6)))(*inputs, *bounds)
    want = torch.stack([sdpa(*each, mask) for *each, mask in zip(*inputs, masks, strict=True)])
    torch.testing.assert_close(got, want)


def test_gradients_of_losses_per_sample():
    logits, labels = torch.randn(3, 5, 11), torch.randint(11, (3, 5))
    labels[0, 2] = -100

    def ours(x, y):
        return masked_cross_entropy(x, y).loss

    for transform in (grad, lambda f: vmap(grad(f))):
        inputs = (logits[0], labels[0]) if transform is grad else (logits, labels)
        torch.testing.assert_close(transform(ours)(*inputs), transform(F.cross_entropy)(*inputs))
    hidden, head = torch.randn(3, 5, 4), torch.randn(11, 4)

    def linear(x, w, y):
        return linear_cross_entropy(x, w, y).loss

    def stock(x, w, y):
        return F.cross_entropy(x @ w.T, y)

    for argument in ((0,), (1,), (0, 1)):
        per_sample = [vmap(grad(f, argument), (0, None, 0))(hidden, head, labels) for f in (linear, stock)]
        torch.testing.assert_close(*per_sample)


def test_gradients_of_a_layer_per_sample():
    x, weight = torch.randn(3, 5, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    got, want = (
        vmap(grad(of(f), (0, 1)), (0, None))(x, weight)
        for f in (
            lambda x, w: rms_norm(x, w),
            lambda x, w: x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w,
        )
    )
    torch.testing.assert_close(got, want)
    down = torch.randn(8, 8, dtype=torch.float64)
    got, want = (
        vmap(grad(of(f), (0, 1)), (0, None))(x, down)
        for f in (lambda x, w: gated_linear(x, x + 1, w), lambda x, w: (F.silu(x) * (x + 1)) @ w.T)
    )
    torch.testing.assert_close(got, want)
    each, angles = torch.randn(3, 1, 5, 2, 8, dtype=torch.float64), torch.randn(1, 5, 4, dtype=torch.float64)
    rotated = vmap(lambda x: rotate_heads(x, weight, angles.cos(), angles.sin()))(each)
    alone = torch.stack([rotate_heads(x, weight, angles.cos(), angles.sin()) for x in each])
    torch.testing.assert_close(rotated, alone)


@pytest.mark.parametrize("name", ["attention", "logits", "hidden"])
def test_second_derivatives_are_refused(name):
    functions = {
        "attention": (lambda q: block_attn(q, q, q, VISIBLE).sum(), heads(2)),
        "logits": (lambda x: masked_cross_entropy(x, torch.zeros(5, dtype=torch.int64)).loss, torch.randn(5, 11)),
        "hidden": (
            lambda x: linear_cross_entropy(x, torch.ones(7, 4), torch.zeros(5, dtype=torch.int64)).loss,
            torch.randn(5, 4),
        ),
    }
    function, x = functions[name]
    with pytest.raises(RuntimeError, match="its gradient has no derivative"):
        grad(lambda x: grad(function)(x).square().sum())(x)
