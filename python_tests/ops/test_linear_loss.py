"""linear_cross_entropy against its definition in float64."""

import pytest
import torch

from dflash_ext import linear_cross_entropy, reference

OPTIONS = {
    "softcap": 4.0,
    "label_smoothing": 0.1,
    "z_loss": 1e-2,
    "teacher_kind": "tv",
    "teacher_mix": 0.3,
}


def inputs(rows=30, width=16, vocab=50, dtype=torch.float32, device="cpu", kept=9):
    hidden = torch.randn(rows, width).to(dtype)
    head = (torch.randn(vocab, width) / 2).to(dtype)
    target = torch.randint(0, vocab, (rows,))
    weight = torch.rand(rows) + 0.1
    dropped = torch.randperm(rows)[kept:]
    weight[dropped], target[dropped] = 0.0, -100
    return tuple(t.to(device) for t in (hidden, head, target, weight))


def run(function, hidden, head, target, weight, dtype, train_head, grad=None, **options):
    hidden = hidden.detach().clone().to(dtype).requires_grad_()
    head = head.detach().clone().to(dtype).requires_grad_(train_head)
    if "teacher" in options:
        options["teacher"] = options["teacher"].to(dtype)
    out = function(hidden, head, target, weight, **options)
    out.loss.backward(None if grad is None else grad.to(out.loss.dtype))
    return [*out, hidden.grad] + ([head.grad] if train_head else [])


@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("max_rows", [None, 9, 12, 100])
def test_matches_the_definition(max_rows, reduction, train_head, device):
    torch.manual_seed(0)
    data = inputs(device=device)
    options = OPTIONS | {"reduction": reduction, "teacher": torch.randn(30, 50, device=device)}
    grad = torch.randn(30, device=device) if reduction == "none" else None
    expected = run(reference.linear_cross_entropy, *data, torch.float64, train_head, grad, **options)
    options |= {"max_rows": max_rows, "chunk_rows": 4}
    actual = run(linear_cross_entropy, *data, torch.float32, train_head, grad, **options)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype, train_head, device):
    torch.manual_seed(1)
    data = inputs(64, 128, 1000, dtype, device, kept=20)
    actual = run(linear_cross_entropy, *data, dtype, train_head)
    expected = run(reference.linear_cross_entropy, *data, torch.float64, train_head)
    for ours, theirs in zip(actual[3:], expected[3:], strict=True):
        error = (ours.double() - theirs).abs().max() / theirs.abs().max()
        assert error < {torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert actual[4].dtype == dtype


@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trainable"])
def test_gradient(train_head):
    torch.manual_seed(2)
    hidden, head, target, weight = inputs(7, 5, 11, torch.float64, kept=4)

    def loss(hidden, head):
        head = head if train_head else head.detach()
        return linear_cross_entropy(hidden, head, target, weight, chunk_rows=3, reduction="none").loss

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), head.requires_grad_(train_head)))


def test_all_rows_and_leading_dimensions(device):
    torch.manual_seed(3)
    hidden, head, target, _ = inputs(kept=30, device=device)
    rest = (None, torch.float32, True)
    flat = run(linear_cross_entropy, hidden, head, target, *rest, chunk_rows=7)
    hidden, target = hidden.view(2, 15, 16), target.view(2, 15)
    folded = run(linear_cross_entropy, hidden, head, target, *rest, chunk_rows=7)
    for a, b in zip(flat, folded, strict=True):
        assert torch.equal(a, b.view(a.shape))


@pytest.mark.parametrize("max_rows", [None, 5])
def test_no_row_counts(max_rows, device):
    data = inputs(kept=0, device=device)
    for tensor in run(linear_cross_entropy, *data, torch.float32, True, max_rows=max_rows):
        assert not tensor.any()


def test_more_rows_than_max_rows():
    with pytest.raises(ValueError, match="9 rows count, more than max_rows = 8"):
        linear_cross_entropy(*inputs(kept=9), max_rows=8)


@pytest.mark.gpu
def test_more_rows_than_max_rows_on_the_gpu():
    assert linear_cross_entropy(*inputs(kept=9, device="cuda"), max_rows=8).loss.isnan()


def test_the_logits_never_exist_in_full(device):
    hidden, head, target, _ = inputs(64, 8, 500, kept=64, device=device)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    with Watch():
        run(linear_cross_entropy, hidden, head, target, None, torch.float32, False, chunk_rows=8)
    assert largest <= 8 * 500


def test_under_autocast(device):
    torch.manual_seed(4)
    hidden, head, target, weight = inputs(device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        mixed = run(linear_cross_entropy, hidden, head, target, weight, torch.float32, True)
    low = run(linear_cross_entropy, hidden, head, target, weight, torch.bfloat16, True)
    assert torch.equal(mixed[0], low[0])
    assert mixed[4].dtype == torch.float32 and torch.equal(mixed[4].bfloat16(), low[4])


@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trainable"])
def test_compiles_without_a_graph_break(train_head, device):
    torch.manual_seed(5)
    data = inputs(device=device)
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    options = {"max_rows": 9, "chunk_rows": 8}
    for a, b in zip(
        run(compiled, *data, torch.float32, train_head, **options),
        run(linear_cross_entropy, *data, torch.float32, train_head, **options),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"head": torch.zeros(50, 15)}, r"hidden is \[3, 16\], head is \[50, 15\]"),
        ({"head": torch.zeros(50, 16).half()}, "head is torch.float16"),
        ({"weight": torch.ones(2)}, r"weight has shape \[2\]"),
        ({"max_rows": 0}, "max_rows is 0"),
        ({"teacher": torch.zeros(3, 9), "teacher_mix": 0.1}, r"teacher has shape \[3, 9\]"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {
        "hidden": torch.zeros(3, 16),
        "head": torch.zeros(50, 16),
        "target": torch.zeros(3, dtype=torch.long),
    } | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)
