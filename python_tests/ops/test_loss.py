"""masked_cross_entropy against its definition in float64 and against torch's own cross_entropy."""

import pytest
import torch
import torch.nn.functional as F

from dflash_ext import masked_cross_entropy, reference
from python_tests.exactness import allowed_error

OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 4.0},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "kl": {"teacher_kind": "kl", "teacher_mix": 0.4},
    "tv": {"teacher_kind": "tv", "teacher_mix": 0.4},
    "all": {
        "softcap": 4.0,
        "label_smoothing": 0.1,
        "z_loss": 1e-2,
        "teacher_kind": "kl",
        "teacher_mix": 0.5,
    },
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(shape, dtype=torch.float32, device="cpu", teacher=False, keep=0.7):
    """logits, target, weight, teacher. Rows of weight 0 hold NaN and a target far outside."""
    logits = (3 * torch.randn(shape)).to(dtype)
    target = torch.randint(0, shape[-1], shape[:-1])
    weight = torch.rand(shape[:-1]) + 0.1
    dropped = torch.rand(shape[:-1]) > keep
    weight[dropped], target[dropped], logits[dropped] = 0.0, -7, torch.nan
    teachers = (3 * torch.randn(shape)).to(dtype) if teacher else None
    return tuple(t if t is None else t.to(device) for t in (logits, target, weight, teachers))


def both(logits, target, weight, teacher, grad=None, **options):
    """The results and the gradient of the operator, and of the definition in float64."""
    results = []
    functions = {masked_cross_entropy: logits.dtype, reference.masked_cross_entropy: torch.float64}
    for function, dtype in functions.items():
        leaf = logits.detach().clone().to(dtype).requires_grad_()
        teacher = None if teacher is None else teacher.to(dtype)
        out = function(leaf, target, weight, teacher=teacher, **options)
        out.loss.backward(None if grad is None else grad.to(out.loss.dtype))
        results.append((out, leaf.grad))
    return results


def relative_error(actual, expected):
    """Relative to the largest entry; gradients that are 0 in exact arithmetic are held against 1e-2."""
    return ((actual.double() - expected.double()).abs().max() / expected.abs().max().clamp(min=1e-2)).item()


@pytest.mark.parametrize("vocab", [1, 2, 7, 64, 1000, 50257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_matches_the_definition(options, dtype, vocab, device):
    torch.manual_seed(vocab)
    data = inputs((3, 5, vocab), dtype, device, teacher="teacher_mix" in options)
    (out, grad), (expected, expected_grad) = both(*data, **options)
    atol = 1e-5 if vocab < 10_000 else 2e-5
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=5e-6, atol=atol)
    torch.testing.assert_close(out.nll.double(), expected.nll, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(out.entropy.double(), expected.entropy, rtol=5e-6, atol=5e-6)
    assert torch.equal(out.correct, expected.correct)
    assert out.nll.dtype == out.entropy.dtype == torch.float32
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert relative_error(grad, expected_grad) < rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_as_exact_as_torch(dtype, device):
    torch.manual_seed(0)
    logits, target, *_ = inputs((64, 32000), dtype, device, keep=1.1)
    (out, grad), (expected, expected_grad) = both(logits, target, None, None)
    leaf = logits.clone().requires_grad_()
    torchs = F.cross_entropy(leaf, target, reduction="none")
    torchs.mean().backward()
    half_ulp = 2**-24  # of float32: errors below it tell nothing
    for ours, torchs_own, exact in ((out.nll, torchs, expected.nll), (grad, leaf.grad, expected_grad)):
        assert relative_error(ours, exact) <= allowed_error(relative_error(torchs_own, exact), half_ulp)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradient(options, reduction):
    torch.manual_seed(1)
    logits, target, weight, teacher = inputs((2, 3, 11), torch.float64, teacher="teacher_mix" in options)
    logits = logits.nan_to_num(0.0).requires_grad_()

    def loss(x):
        return masked_cross_entropy(x, target, weight, teacher=teacher, reduction=reduction, **options).loss

    assert torch.autograd.gradcheck(loss, logits)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_reduction(reduction, device):
    torch.manual_seed(2)
    data = inputs((4, 9, 33), device=device)
    grad = torch.randn(4, 9, device=device) if reduction == "none" else None
    (out, got), (expected, expected_grad) = both(*data, grad=grad, reduction=reduction)
    assert out.loss.shape == expected.loss.shape
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
    assert relative_error(got, expected_grad) < 1e-6


@pytest.mark.parametrize("shape", [(7,), (0, 7), (1, 7), (2, 3, 4, 7)])
def test_any_number_of_rows(shape, device):
    torch.manual_seed(3)
    logits, target = torch.randn(shape, device=device), torch.randint(0, 7, shape[:-1], device=device)
    (out, grad), (expected, expected_grad) = both(logits, target, None, None, reduction="sum")
    torch.testing.assert_close(out.loss.double(), expected.loss)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-5, atol=1e-6)
    assert out.nll.shape == out.correct.shape == out.entropy.shape == shape[:-1]


def test_strided_rows_are_not_copied(device):
    torch.manual_seed(4)
    padded = torch.randn(3, 6, 40, device=device)
    shifted = padded[:, 1:, 3:36]  # rows of 33 logits, starts not aligned
    target = torch.randint(0, 33, (3, 5), device=device)
    strided = masked_cross_entropy(shifted.requires_grad_(), target)
    (grad,) = torch.autograd.grad(strided.loss, shifted)
    (dense, dense_grad), _ = both(shifted, target, None, None)
    assert torch.allclose(strided.nll, dense.nll, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, dense_grad, rtol=1e-5, atol=1e-7)
    transposed = torch.randn(33, 5, device=device).T
    with pytest.raises(ValueError, match="last dimension must be contiguous"):
        masked_cross_entropy(transposed, target[0])


def test_no_row_counts(device):
    logits = torch.full((4, 9), torch.nan, device=device, requires_grad=True)
    target = torch.full((4,), -1, device=device)
    out = masked_cross_entropy(logits, target, torch.zeros(4, device=device))
    out.loss.backward()
    for tensor in (*out, logits.grad):
        assert not tensor.any()


@pytest.mark.parametrize("options", ["plain", "softcap", "kl", "tv"])
def test_extreme_logits(options, device):
    torch.manual_seed(5)
    logits = 1e4 * torch.randn(6, 101, device=device)
    logits[1, ::2] = -torch.inf  # target 3 stays finite
    logits[2], logits[3, 50] = 1e4, 3e4
    target = torch.tensor([3, 3, 3, 50, 7, 8], device=device)
    teacher = 1e4 * torch.randn(6, 101, device=device) if options in ("kl", "tv") else None
    if teacher is not None:
        teacher[1, ::2] = -torch.inf
    (out, grad), (expected, expected_grad) = both(logits, target, None, teacher, **OPTIONS[options])
    torch.testing.assert_close(out.nll.double(), expected.nll, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(out.entropy.double(), expected.entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=1e-5, atol=1e-5)
    # The definition's softcap has no gradient where a logit is -inf; ours is 0 there.
    torch.testing.assert_close(grad.double(), expected_grad.nan_to_num(0.0), rtol=1e-4, atol=1e-7)


def test_not_a_number_is_not_hidden(device):
    logits = torch.randn(3, 5000, device=device)
    logits[0, 17], logits[1, 4999] = torch.nan, torch.inf
    out = masked_cross_entropy(logits, torch.zeros(3, dtype=torch.long, device=device), reduction="none")
    assert out.loss.isnan().tolist() == [True, True, False]


def test_correct_means_the_first_argmax(device):
    logits = torch.zeros(4, 2000, device=device, dtype=torch.bfloat16)
    logits[:, 700] = logits[:, 1300] = 2.0
    target = torch.tensor([700, 1300, 0, 1999], device=device)
    assert masked_cross_entropy(logits, target).correct.tolist() == [True, False, False, False]
    flat = masked_cross_entropy(torch.zeros(2, 9, device=device), target[2:] % 9)
    assert flat.correct.tolist() == [True, False]


def test_target_outside_the_vocabulary():
    logits = torch.randn(2, 3, 10)
    target = torch.zeros(2, 3, dtype=torch.long)
    target[1, 0] = 10
    with pytest.raises(RuntimeError, match=r"^masked_cross_entropy: target 10 of row 3 is outside"):
        masked_cross_entropy(logits, target)


OUTSIDE = [1, 10, -1, -100, 2**40, -(2**40)]


def check_rows_outside(function, device, **options):
    """The targets OUTSIDE of a vocabulary of 10 make their rows NaN, and no other."""
    logits = torch.randn(6, 10, device=device, requires_grad=True)
    out = function(logits, torch.tensor(OUTSIDE, device=device), reduction="none", **options)
    (grad,) = torch.autograd.grad(out.loss.sum(), logits)
    nan = [False, True, True, False, True, True]
    assert out.loss.isnan().tolist() == out.nll.isnan().tolist() == nan
    assert grad.isnan().any(-1).tolist() == nan and (grad[3] == 0).all() and not out.correct[1:].any()


@pytest.mark.gpu
def test_target_outside_the_vocabulary_on_the_gpu():
    check_rows_outside(masked_cross_entropy, "cuda")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_target_outside_the_vocabulary_of_the_definition(options, device):
    teacher = {"teacher": torch.randn(6, 10, device=device)} if "teacher_mix" in options else {}
    check_rows_outside(reference.masked_cross_entropy, device, **options, **teacher)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_an_ignored_label_is_a_weight_of_0(weighted, reduction, device):
    torch.manual_seed(9)
    logits, target, weight, _ = inputs((4, 9, 33), device=device)
    dropped = weight == 0
    weight = weight if weighted else (~dropped).float()
    grad = torch.randn(4, 9, device=device) if reduction == "none" else None
    (want, want_grad), _ = both(logits, target, weight, None, grad, reduction=reduction)
    weight = weight.masked_fill(dropped, 5.0) if weighted else None
    for kind in (torch.int64, torch.int32, torch.int8):
        labels = target.masked_fill(dropped, -100).to(kind)
        (got, got_grad), (exact, exact_grad) = both(logits, labels, weight, None, grad, reduction=reduction)
        assert torch.equal(got_grad, want_grad) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        torch.testing.assert_close(got.loss.double(), exact.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got_grad.double(), exact_grad, rtol=1e-5, atol=1e-6)


def test_an_ignored_label_is_that_of_torch(device):
    logits, target = torch.randn(6, 20, device=device), torch.tensor([3, -100, 7, 7, -100, 0], device=device)
    for index in (-100, 7):
        labels = target.where(target != -100, index)
        got = masked_cross_entropy(logits, labels, ignore_index=index)
        torch.testing.assert_close(got.loss, F.cross_entropy(logits, labels, ignore_index=index))
        assert (got.nll == 0).tolist() == (labels == index).tolist()
    labels = target.where(target != -100, 0)
    for index in (-100, None):
        got = masked_cross_entropy(logits, labels, ignore_index=index)
        torch.testing.assert_close(got.loss, F.cross_entropy(logits, labels))
    with pytest.raises(RuntimeError, match="target -100 of row 1 is outside"):
        masked_cross_entropy(logits.cpu(), target.cpu(), ignore_index=None)


def test_an_unsigned_target_has_no_negative_label():
    """As uint8, -100 would be 156."""
    got = masked_cross_entropy(torch.randn(2, 200), torch.tensor([156, 3], dtype=torch.uint8), reduction="none")
    assert (got.loss > 0).all()


@pytest.mark.parametrize("normaliser", [36, 36.0, torch.tensor(36), torch.tensor([36.0]).double()], ids=str)
def test_a_normaliser_replaces_the_sum_of_weights(normaliser, device):
    """LLaDA and BD3-LM: weights 1/t, divided by the number of tokens."""
    torch.manual_seed(10)
    data = inputs((4, 9, 33), device=device)
    normaliser = normaliser.to(device) if isinstance(normaliser, torch.Tensor) else normaliser
    (want, want_grad), _ = both(*data, reduction="sum")
    for (got, grad), dtype in zip(both(*data, normaliser=normaliser), (torch.float32, torch.float64), strict=True):
        torch.testing.assert_close(got.loss, (want.loss / 36).to(dtype), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad, (want_grad / 36).to(dtype), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normaliser", [0, torch.tensor(0)], ids=str)
def test_a_batch_without_tokens_has_a_loss_of_0(normaliser):
    logits, labels = torch.randn(3, 5, requires_grad=True), torch.full((3,), -100)
    for function in (masked_cross_entropy, reference.masked_cross_entropy):
        loss = function(logits, labels, normaliser=normaliser).loss
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss == 0 and (grad == 0).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"target": torch.zeros(4, dtype=torch.long)}, r"target has shape \[4\]"),
        ({"weight": torch.ones(2)}, r"weight has shape \[2\]"),
        ({"weight": torch.ones(3, requires_grad=True)}, "weight requires a gradient"),
        ({"target": torch.zeros(3)}, "target is torch.float32"),
        ({"reduction": "avg"}, "reduction is 'avg'"),
        ({"teacher_kind": "js"}, "teacher_kind is 'js'"),
        ({"teacher_mix": 0.5}, "no teacher is given"),
        ({"teacher": torch.zeros(3, 5).half(), "teacher_mix": 0.5}, "teacher is torch.float16"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5"),
        ({"z_loss": float("nan")}, "z_loss is nan; a finite number is needed"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"normaliser": 3, "reduction": "sum"}, "normaliser is given with reduction 'sum'"),
        ({"normaliser": 3, "reduction": "none"}, "normaliser is given with reduction 'none'"),
        ({"normaliser": -1.0}, "normaliser is -1.0"),
        ({"normaliser": float("nan")}, "normaliser is nan"),
        ({"normaliser": torch.ones(3)}, r"normaliser is torch.float32 \[3\]"),
        ({"normaliser": torch.tensor(3.0, requires_grad=True)}, "normaliser is .* that requires grad"),
        ({"normaliser": torch.ones((), device="meta")}, "logits is on cpu, normaliser on meta"),
        ({"target": torch.zeros(3, dtype=torch.bool)}, "target is torch.bool"),
        ({"logits": torch.zeros(3, 5).int()}, r"logits is torch.int32 \[3, 5\]"),
        ({"logits": torch.zeros(3, 0)}, r"logits is torch.float32 \[3, 0\]"),
        ({"logits": torch.tensor(3.0), "target": torch.tensor(0)}, r"logits is torch.float32 \[\]"),
        ({"weight": torch.ones(3, device="meta")}, "logits is on cpu, weight on meta; one device is needed"),
        ({"weight": torch.ones(3, requires_grad=True)}, "weight requires a gradient"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {"logits": torch.zeros(3, 5), "target": torch.zeros(3, dtype=torch.long)} | change
    with pytest.raises(ValueError, match=f"^masked_cross_entropy: .*{message}"):
        masked_cross_entropy(**arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"softcap": "30"}, r"softcap is '30' \(str\); a number or None"),
        (
            {"z_loss": torch.tensor(0.1, requires_grad=True)},
            r"z_loss is torch.float32 \[\] that requires grad; a number",
        ),
        ({"label_smoothing": torch.tensor(0.1)}, r"label_smoothing is torch.float32 \[\]; a number"),
        ({"z_loss": None}, "z_loss is None; a number is needed"),
        ({"reduction": None}, "reduction is None; 'mean', 'sum' and 'none'"),
    ],
)
def test_what_is_no_tensor_or_number(change, message):
    arguments = {"logits": torch.zeros(3, 5), "target": torch.zeros(3, dtype=torch.long)} | change
    with pytest.raises((TypeError, ValueError), match=message):
        masked_cross_entropy(**arguments)


def test_only_the_loss_has_a_gradient():
    out = masked_cross_entropy(torch.randn(3, 5, requires_grad=True), torch.zeros(3, dtype=torch.long))
    assert [field.requires_grad for field in out] == [True, False, False, False]


def test_registrations(device):
    torch.manual_seed(6)
    logits, target, weight, teacher = inputs((2, 3, 17), device=device, teacher=True, keep=1.1)
    options = (1, 0.3, 4.0, 0.1, 1e-3)
    ops = torch.ops.dflash_ext
    grad_losses = torch.rand(2, 3, device=device)
    stats = ops.masked_cross_entropy(logits, target, weight, teacher, *options)[-1]
    leaf = logits.clone().requires_grad_()
    torch.library.opcheck(ops.masked_cross_entropy, (leaf, target, weight, teacher, *options))
    torch.library.opcheck(ops.masked_cross_entropy, (leaf, target, None, None, *options))
    torch.library.opcheck(ops.masked_cross_entropy_, (logits.clone(), target, weight, teacher, *options))
    torch.library.opcheck(
        ops.masked_cross_entropy_backward, (grad_losses, logits, target, weight, teacher, stats, *options)
    )


def test_compiles_without_a_graph_break(device):
    torch.manual_seed(7)
    logits, target, weight, teacher = inputs((2, 3, 17), device=device, teacher=True)
    options = OPTIONS["all"]
    compiled = torch.compile(masked_cross_entropy, backend="aot_eager", fullgraph=True)
    for more in ({}, {"normaliser": 7.0}, {"normaliser": torch.tensor(7, device=device), "ignore_index": None}):
        grads = []
        for function in (compiled, masked_cross_entropy):
            leaf = logits.clone().requires_grad_()
            function(leaf, target, weight, teacher=teacher, **options, **more).loss.backward()
            grads.append(leaf.grad)
        assert torch.equal(*grads)


def test_under_autocast(device):
    logits, target, *_ = inputs((4, 50), torch.float32, device, keep=1.1)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = masked_cross_entropy(logits, target)
    assert torch.equal(out.loss, masked_cross_entropy(logits, target).loss)


def test_a_teacher_is_cast_under_autocast(device):
    logits, target, _, teacher = inputs((4, 50), torch.bfloat16, device, teacher=True, keep=1.1)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = masked_cross_entropy(logits, target, teacher=teacher.float(), teacher_mix=0.5)
        with pytest.raises(ValueError, match="teacher is torch.int32"):
            masked_cross_entropy(logits, target, teacher=teacher.int(), teacher_mix=0.5)
    assert torch.equal(out.loss, masked_cross_entropy(logits, target, teacher=teacher, teacher_mix=0.5).loss)


def test_a_second_derivative_is_refused(device):
    logits, target, *_ = inputs((4, 50), device=device, keep=1.1)
    loss = masked_cross_entropy(logits.requires_grad_(), target).loss
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="masked_cross_entropy: its gradient has no derivative"):
        (loss + grad.square().sum()).backward()


def test_threads_do_not_change_the_result():
    torch.manual_seed(8)
    logits, target, weight, _ = inputs((64, 3000))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            leaf = logits.clone().requires_grad_()
            out = masked_cross_entropy(leaf, target, weight, reduction="none")
            out.loss.sum().backward()
            results.append((out.nll, out.entropy, leaf.grad))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
def test_does_not_depend_on_what_memory_held():
    torch.manual_seed(9)
    logits, target, weight, _ = inputs((64, 5001), torch.bfloat16, "cuda")
    results = []
    for poison in (0.0, torch.nan):
        torch.full((8 << 20,), poison, device="cuda")  # freed at once, and its memory handed out again
        leaf = logits.clone().requires_grad_()
        out = masked_cross_entropy(leaf, target, weight)
        out.loss.backward()
        results.append((*out, leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
def test_cuda_graph():
    torch.manual_seed(10)
    data = [inputs((3, 7, 1001), torch.bfloat16, "cuda") for _ in range(2)]
    logits, target, weight = (t.clone() for t in data[0][:3])
    logits.requires_grad_()

    def step():
        out = masked_cross_entropy(logits, target, weight)
        return out, torch.autograd.grad(out.loss, logits)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grad = step()
    with torch.no_grad():
        for held, new in zip((logits, target, weight), data[1][:3], strict=True):
            held.copy_(new)
    graph.replay()
    (expected, expected_grad), _ = both(*data[1])
    assert torch.equal(out.nll, expected.nll) and torch.equal(out.loss, expected.loss)
    assert torch.equal(grad, expected_grad)


def test_forward_mode_is_refused():
    logits, target = torch.randn(3, 5), torch.zeros(3, dtype=torch.long)
    with pytest.raises(RuntimeError, match="masked_cross_entropy: forward-mode derivatives are not supported"):
        torch.func.jvp(lambda x: masked_cross_entropy(x, target).loss, (logits,), (logits,))
