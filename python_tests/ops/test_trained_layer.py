"""rms_norm, rotate_heads and gated_linear, and their gradients, against their definitions in float64."""

import pytest
import torch

from dflash_ext import reference
from dflash_ext.ops.trained_layer import gated_linear, gated_pair, rms_norm, rotate_heads
from python_tests.exactness import allowed_error

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5


def dtypes_on(device):
    return [d for d in DTYPES if device == "cpu" or d != torch.float64]


def check(device, ours, definition, shapes, inputs=()):
    """Compares results and gradients of a call with those of its definition.

    The call may be at most 1.5 times as wrong as the definition in the same dtype, composed of PyTorch's operators.
    """
    torch.manual_seed(0)
    leaves = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    for dtype in dtypes_on(device):
        mine = [x.to(device, dtype) for x in leaves]
        exact = run(definition, [x.double() for x in mine], inputs)
        for part, (got, torchs, want) in enumerate(
            zip(run(ours, mine, inputs), run(definition, mine, inputs), exact, strict=True)
        ):
            assert got.dtype == dtype and got.shape == want.shape
            off, torchs_off = (((x.double() - want).norm() / want.norm()).item() for x in (got, torchs))
            assert off <= allowed_error(torchs_off, 2 * torch.finfo(dtype).eps), (dtype, part)


def run(function, leaves, inputs):
    """The results, and the gradients of the leaves for upstream gradients that are the same for all functions."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    results = function(*leaves, *(x.to(leaves[0].device) for x in inputs))
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in results]
    return [*(x.detach() for x in results), *torch.autograd.grad(results, leaves, upstream)]


@pytest.mark.parametrize("rows", [1, 5, 700])
@pytest.mark.parametrize("width", [8, 96, 1000, 4096])
def test_rms_norm(device, rows, width):
    def own(x, weight):
        return reference.rms_norm(x, weight, EPS)

    def own_of_sum(x, update, weight):
        return x + update, reference.rms_norm(x + update, weight, EPS)

    shape = (rows, width)
    check(device, lambda x, weight: rms_norm(x, weight, eps=EPS), own, [shape, (width,)])
    check(
        device,
        lambda x, update, weight: rms_norm(x, weight, update=update, eps=EPS),
        own_of_sum,
        [shape, shape, (width,)],
    )


@pytest.mark.parametrize("length", [1, 70])
@pytest.mark.parametrize("head_dim", [8, 24, 64, 128, 256, 512])
def test_rotate_heads(device, length, head_dim):
    angles = torch.rand(2, length, head_dim // 2, dtype=torch.float64).repeat(1, 1, 2)
    check(
        device,
        lambda *leaves_and_tables: rotate_heads(*leaves_and_tables, eps=EPS),
        lambda *leaves_and_tables: reference.rotate_heads(*leaves_and_tables, EPS),
        [(2, length, 3, head_dim), (head_dim,)],
        (angles.cos(), angles.sin()),
    )


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("rows, inner", [(1, 8), (7, 96), (130, 1536)])
def test_gated_linear(device, activation, rows, inner):
    check(
        device,
        lambda *leaves: gated_linear(*leaves, activation),
        lambda *leaves: reference.gated_linear(*leaves, activation),
        [(rows, inner), (rows, inner), (16, inner)],
    )


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("rows, inner", [(3, 8), (130, 96)])
def test_gated_pair(device, activation, rows, inner):
    check(
        device,
        lambda *leaves: gated_pair(*leaves, activation),
        lambda *leaves: reference.gated_pair(*leaves, activation),
        [(rows, inner), (rows, inner)],
    )


def test_large_gates(device):
    gate = torch.tensor([[-60000.0, 60000.0, -100.0, 100.0, 0.0, -3.0, 3.0, 0.5]], device=device, requires_grad=True)
    up, weight = torch.ones_like(gate), torch.eye(8, device=device)
    for activation in ("silu", "gelu_tanh"):
        (grad,) = torch.autograd.grad(gated_linear(gate, up, weight, activation).sum(), gate)
        exact = reference.gated_linear(gate.double(), up, weight.double(), activation)
        (want,) = torch.autograd.grad(exact.sum(), gate)
        torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-6)


def test_strides_and_leading_dimensions(device):
    x = torch.randn(2, 3, 32, device=device)[..., ::2].requires_grad_()
    weight = torch.randn(16, device=device, requires_grad=True)
    upstream = torch.randn(3, 2, 16, device=device).transpose(0, 1)
    got = torch.autograd.grad(rms_norm(x, weight, eps=EPS), (x, weight), upstream)
    want = torch.autograd.grad(reference.rms_norm(x, weight, EPS), (x, weight), upstream)
    torch.testing.assert_close(got, want)


def test_only_what_needs_a_gradient_gets_one(device):
    gate, up, weight = (torch.randn(shape, device=device) for shape in ((3, 8), (3, 8), (5, 8)))
    for leaf in (gate, up, weight):
        leaf.requires_grad_()
        want = reference.gated_linear(gate, up, weight, "silu").sum()
        torch.testing.assert_close(
            torch.autograd.grad(gated_linear(gate, up, weight).sum(), leaf), torch.autograd.grad(want, leaf)
        )
        leaf.requires_grad_(False)


def test_a_backward_may_run_twice(device):
    """Nothing that was kept is overwritten."""
    gate, up, weight = (torch.randn(shape, device=device).requires_grad_() for shape in ((3, 8), (3, 8), (5, 8)))
    out = gated_linear(gate, up, weight).square().sum()
    first, second = (torch.autograd.grad(out, (gate, up, weight), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_norm_keeps_the_dtype_of_its_input(device):
    """Under autocast weights are float32, and what they meet is not."""
    x = torch.randn(3, 2, 1, 8, device=device, dtype=torch.bfloat16)
    weight, table = torch.ones(8, device=device), torch.ones(1, 2, 4, device=device)
    assert rms_norm(x, weight).dtype == rotate_heads(x, weight, table, table).dtype == torch.bfloat16
    total, normed = rms_norm(x.float(), weight, update=x)
    assert total.dtype == normed.dtype == torch.float32


def test_autocast(device):
    gate, up, weight = (torch.randn(shape, device=device).requires_grad_() for shape in ((3, 8), (3, 8), (5, 8)))
    with torch.autocast(device, torch.bfloat16):
        out = gated_linear(gate, up, weight)
    assert out.dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(out.sum(), (gate, up, weight)))


def test_second_derivatives_are_refused(device):
    x, weight = torch.randn(2, 8, device=device, requires_grad=True), torch.ones(8, device=device)
    (grad,) = torch.autograd.grad(rms_norm(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="rms_norm: its gradient has no derivative"):
        grad.sum().backward()


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="gated_linear: activation is 'relu'; 'silu' and 'gelu_tanh' are supported"):
        gated_linear(*torch.ones(3, 1, 1), "relu")
    with pytest.raises(ValueError, match="gated_pair: activation is 'relu'"):
        gated_pair(*torch.ones(2, 1, 1), "relu")


def test_opcheck(device):
    ops = torch.ops.dflash_ext
    x, update = (torch.randn(3, 16, device=device, requires_grad=True) for _ in range(2))
    weight = torch.randn(16, device=device, requires_grad=True)
    torch.library.opcheck(ops.rms_norm.default, (x, update, weight, EPS))
    torch.library.opcheck(ops.rms_norm.default, (x, None, weight, EPS))
    plain = [y.detach() for y in (x, update, weight)]
    torch.library.opcheck(ops.rms_norm_backward.default, (plain[0], plain[1], plain[0], plain[2], EPS))
    heads, table = torch.randn(3, 2, 16, device=device, requires_grad=True), torch.randn(3, 8, device=device)
    torch.library.opcheck(ops.rotate_heads.default, (heads, weight, table, table.clone(), EPS))
    arguments = (heads.detach(), heads.detach().clone(), plain[2], table, table.clone(), EPS)
    torch.library.opcheck(ops.rotate_heads_backward.default, arguments)
    torch.library.opcheck(ops.gated_pair.default, (x, update, 0))
    torch.library.opcheck(ops.gated_pair_backward.default, (plain[0], *plain[:2], 0))
    torch.library.opcheck(ops.gated_pair_backward_.default, (plain[0].clone(), plain[1].clone(), *plain[:2], 1))
    head = torch.randn(5, 16, device=device, requires_grad=True)
    torch.library.opcheck(ops.gated_linear.default, (x, update, head, 0))


def test_only_inputs_are_kept(device):
    def kept(call):
        """The elements that a call keeps for its backward."""
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            call()
        return sum(sizes)

    rows, weight = (torch.randn(shape, device=device, requires_grad=True) for shape in ((6, 16), (16,)))
    head, table = torch.randn(5, 16, device=device, requires_grad=True), torch.ones(1, 6, 8, device=device)
    assert kept(lambda: rms_norm(rows, weight)) == rows.numel() + weight.numel()
    assert kept(lambda: rms_norm(rows, weight, update=rows.detach())) == rows.numel() + weight.numel()  # the sum
    assert kept(lambda: gated_pair(rows, rows.detach())) == 2 * rows.numel()
    assert kept(lambda: gated_linear(rows, rows.detach(), head)) == 2 * rows.numel() + head.numel()
    heads = rows.view(1, 6, 1, 16)
    assert kept(lambda: rotate_heads(heads, weight, table, table)) == rows.numel() + weight.numel() + 2 * table.numel()
