"""linear_cross_entropy against its definition in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from dflash_ext import linear_cross_entropy, reference
from python_tests.exactness import allowed_error
from python_tests.pairwise import pairwise

OPTIONS = {
    "softcap": 4.0,
    "label_smoothing": 0.1,
    "z_loss": 1e-2,
    "teacher_kind": "tv",
    "teacher_mix": 0.3,
}


def inputs(rows=30, width=16, vocab=50, dtype=torch.float32, device="cpu", kept=9):
    """hidden, head, target and weight. Some targets are the argmax; rows of weight 0 have a target far outside."""
    hidden = torch.randn(rows, width).to(dtype)
    head = (torch.randn(vocab, width) / 2).to(dtype)
    target = torch.randint(0, vocab, (rows,))
    target[::2] = (hidden @ head.T).argmax(1)[::2]
    weight = torch.rand(rows) + 0.1
    dropped = torch.randperm(rows)[kept:]
    weight[dropped], target[dropped] = 0.0, -7
    return tuple(t.to(device) for t in (hidden, head, target, weight))


def run(function, hidden, head, target, weight, dtype, train_head, grad=None, **options):
    """The results of a loss, and the gradients of hidden and of a head that is trained."""
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
    for chunk_rows in (
        None,
        4,
    ):  # with a trainable head: the gradient of the logits is kept; it is made in the backward
        bounds = {"max_rows": max_rows, "chunk_rows": chunk_rows}
        actual = run(linear_cross_entropy, *data, torch.float32, train_head, grad, **options, **bounds)
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("max_rows, chunk_rows", [(None, None), (24, None), (None, 7)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_a_trainable_head_are_as_exact_as_those_of_torch(
    dtype, reduction, max_rows, chunk_rows, weighted, device
):
    torch.manual_seed(11)
    hidden, head, target, weight = inputs(96, 64, 3000, dtype, device, kept=24)
    weight = weight if weighted else (weight != 0).float()
    grad = (torch.rand(96, device=device) + 0.5) / 24 if reduction == "none" else None
    data = hidden, head, target, weight
    exact = run(reference.linear_cross_entropy, *data, torch.float64, True, grad, reduction=reduction)[4:]
    bounds = {"max_rows": max_rows, "chunk_rows": chunk_rows}
    ours = run(linear_cross_entropy, *data, dtype, True, grad, reduction=reduction, **bounds)[4:]

    leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    rows = weight.nonzero()[:, 0]
    losses = F.cross_entropy(leaves[0][rows] @ leaves[1].T, target[rows], reduction="none") * weight[rows]
    (losses.sum() / weight.sum() if grad is None else (losses * grad[rows]).sum()).backward()
    for got, leaf, want in zip(ours, leaves, exact, strict=True):
        largest = want.abs().max()
        error, torchs = (((x.double() - want).abs().max() / largest).item() for x in (got, leaf.grad))
        # Sums of float32 products are added in different orders.
        assert error <= allowed_error(torchs, 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)


def test_a_trainable_head_is_multiplied_three_times(device):
    """The logits of all rows that count are computed once, and each gradient is one product."""
    hidden, head, target, weight = inputs(64, 8, 500, kept=20, device=device)
    with torch.profiler.profile(record_shapes=True) as profile:
        run(linear_cross_entropy, hidden, head, target, weight, torch.float32, True)
    products = [event.input_shapes[:2] for event in profile.events() if event.name == "aten::mm"]
    assert products == [[[20, 8], [8, 500]], [[500, 20], [20, 8]], [[20, 500], [500, 8]]]


@pytest.mark.gpu
def test_memory_of_a_trainable_head_is_at_most_that_of_torch():
    hidden, head, target, weight = inputs(2048, 1024, 4096, torch.bfloat16, "cuda", kept=512)
    hidden, head = hidden.requires_grad_(), head.requires_grad_()

    def ours():
        return linear_cross_entropy(hidden, head, target, (weight != 0).float()).loss

    def torchs():
        rows = weight.nonzero()[:, 0]
        return F.cross_entropy(hidden[rows] @ head.T, target[rows])

    peaks = []
    for loss in (ours, torchs):
        for _ in range(2):  # the first call also allocates what cuBLAS keeps
            hidden.grad = head.grad = None
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss().backward()
            peak = torch.cuda.max_memory_allocated() - before
        peaks.append(peak)
    assert peaks[0] <= peaks[1]


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("with_teacher", [False, True])
def test_a_captured_graph_with_max_rows(with_teacher, reduction):
    """Replays see other rows, and another number of them."""
    torch.manual_seed(12)
    many = [inputs(64, 16, 200, torch.bfloat16, "cuda", kept=kept) for kept in (9, 20, 0, 17)]
    teachers = teacher_inputs(64, 200, "cuda") | {"teacher_mix": 0.5} if with_teacher else {}
    ones = torch.ones(64, device="cuda") if reduction == "none" else None
    held = [x.clone() for x in many[0]]
    leaves = held[0].requires_grad_(), held[1].requires_grad_()

    def step():
        loss = linear_cross_entropy(*held, max_rows=20, reduction=reduction, **teachers).loss
        return loss, *torch.autograd.grad(loss.sum(), leaves)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for data in many:
        with torch.no_grad():
            for old, new in zip(held, data, strict=True):
                old.copy_(new)
        graph.replay()
        captured = [x.clone() for x in got]
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
        exact = run(reference.linear_cross_entropy, *data, torch.float64, True, ones, reduction=reduction, **teachers)
        for ours, theirs in zip(captured[1:], exact[4:], strict=True):
            assert (ours.double() - theirs).abs().max() <= 2e-2 * theirs.abs().max()


# ---- a teacher's hidden states ----------------------------------------------------------------------------


def teacher_inputs(rows, vocab, device="cpu", states=11, width=6):
    return {
        "teacher_hidden": torch.randn(states, width, device=device),
        "teacher_head": torch.randn(vocab, width, device=device),
        "teacher_row": torch.randint(0, states, (rows,), device=device),
        "teacher_softcap": 2.0,
    }


@pytest.mark.parametrize("kind", ["kl", "tv"])
@pytest.mark.parametrize("max_rows, chunk_rows", [(None, None), (12, 4), (9, None), (None, 4)])
@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hidden_states_of_a_teacher_are_its_logits(reduction, train_head, max_rows, chunk_rows, kind, device):
    torch.manual_seed(13)
    data = inputs(device=device)
    states = teacher_inputs(30, 50, device)
    states["teacher_row"][data[3] == 0] = -5  # rows that do not count may name any row
    grad = torch.randn(30, device=device) if reduction == "none" else None
    options = {"teacher_kind": kind, "teacher_mix": 0.6, "reduction": reduction, "softcap": 4.0}
    logits = 2.0 * torch.tanh(states["teacher_hidden"] @ states["teacher_head"].T / 2.0)
    logits = logits[states["teacher_row"].clamp(min=0)]
    want = run(reference.linear_cross_entropy, *data, torch.float64, train_head, grad, teacher=logits, **options)
    bounds = {"max_rows": max_rows, "chunk_rows": chunk_rows}
    for got in (
        run(linear_cross_entropy, *data, torch.float32, train_head, grad, **states, **options, **bounds),
        run(reference.linear_cross_entropy, *data, torch.float64, train_head, grad, **states, **options),
    ):
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=1e-4, atol=2e-5)


def test_a_teacher_that_is_the_student_has_no_divergence(device):
    """KL to the model itself: the teacher's head is the head, its rows are named in any order."""
    torch.manual_seed(14)
    hidden, head, target, weight = inputs(device=device)
    order = torch.randperm(30, device=device)
    options = {"teacher_head": head, "teacher_row": order.argsort(), "teacher_mix": 1.0, "reduction": "none"}
    for kind in ("kl", "tv"):
        got = run(
            linear_cross_entropy,
            hidden,
            head,
            target,
            weight,
            torch.float32,
            True,
            torch.ones(30, device=device),
            teacher_hidden=hidden[order],
            teacher_kind=kind,
            **options,
        )
        for each in (got[0], got[4], got[5]):
            torch.testing.assert_close(each, torch.zeros_like(each), rtol=0, atol=2e-5)


def test_a_teacher_gets_no_gradient_and_another_dtype_is_cast(device):
    hidden, head, target, weight = inputs(dtype=torch.bfloat16, device=device)
    states, teacher_head = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((30, 6), (50, 6)))
    options = {"teacher_hidden": states, "teacher_head": teacher_head, "teacher_mix": 0.5}
    got = run(linear_cross_entropy, hidden, head, target, weight, torch.bfloat16, True, **options)
    logits = (states @ teacher_head.T).detach()
    want = run(
        linear_cross_entropy, hidden, head, target, weight, torch.bfloat16, True, teacher=logits, teacher_mix=0.5
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert states.grad is None and teacher_head.grad is None


def test_a_distribution_of_a_teacher_is_never_stored(device):
    hidden, head, target, _ = inputs(64, 8, 500, kept=64, device=device)
    states = teacher_inputs(64, 500, device) | {"teacher_mix": 0.5}
    with torch.profiler.profile(record_shapes=True) as profile:
        run(linear_cross_entropy, hidden, head, target, None, torch.float32, False, chunk_rows=8, **states)
    shapes = [shape for event in profile.events() for shape in event.input_shapes if all(shape)]
    assert max(math.prod(shape) for shape in shapes) <= 8 * 500


def test_a_row_of_a_teacher_that_does_not_exist():
    states = teacher_inputs(30, 50) | {"teacher_mix": 0.5}
    states["teacher_row"][4] = 11
    hidden, head, target, _ = inputs(kept=30)
    message = r"^linear_cross_entropy: teacher_row 11 of row 4 is outside the teacher's rows \[0, 11\)"
    with pytest.raises(RuntimeError, match=message):
        linear_cross_entropy(hidden, head, target, **states)


@pytest.mark.gpu
@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_a_row_of_a_teacher_that_does_not_exist_makes_its_row_nan_on_the_gpu(chunk_rows):
    states = teacher_inputs(30, 50, "cuda") | {"teacher_mix": 0.5, "chunk_rows": chunk_rows}
    states["teacher_row"][4], states["teacher_row"][7] = 11, -1
    hidden, head, target, _ = inputs(kept=30, device="cuda")
    out = linear_cross_entropy(hidden.requires_grad_(), head.requires_grad_(), target, reduction="none", **states)
    out.loss.sum().backward()
    assert out.loss.isnan().nonzero().flatten().tolist() == [4, 7]
    assert hidden.grad.isnan().any(1).nonzero().flatten().tolist() == [4, 7]


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
    with torch.profiler.profile(record_shapes=True) as profile:
        run(linear_cross_entropy, hidden, head, target, None, torch.float32, False, chunk_rows=8)
    shapes = [shape for event in profile.events() for shape in event.input_shapes if all(shape)]
    assert [8, 500] in shapes and max(math.prod(shape) for shape in shapes) <= 8 * 500


def test_under_autocast(device):
    torch.manual_seed(4)
    hidden, head, target, weight = inputs(device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        mixed = run(linear_cross_entropy, hidden, head, target, weight, torch.float32, True)
    low = run(linear_cross_entropy, hidden, head, target, weight, torch.bfloat16, True)
    assert torch.equal(mixed[0], low[0])
    assert mixed[4].dtype == torch.float32 and torch.equal(mixed[4].bfloat16(), low[4])


def test_autocast_casts_nothing_but_floats():
    hidden, head, target, _ = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for pair in ((hidden.int(), head.int()), (hidden, head.int()), (hidden.to(torch.complex64), head)):
            with pytest.raises(ValueError, match=f"hidden is {pair[0].dtype}, head is {pair[1].dtype}"):
                linear_cross_entropy(*pair, target)


def test_autocast_leaves_float64_alone(device):
    hidden, head, target, weight = inputs(dtype=torch.float64)
    want = run(linear_cross_entropy, hidden, head, target, weight, torch.float64, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(linear_cross_entropy, hidden, head, target, weight, torch.float64, True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    "max_rows, reduction, train_head", pairwise([None, 9], ["mean", "none"], [False, True]), ids=str
)
def test_compiles_once_for_all_lengths(max_rows, reduction, train_head, device):
    torch.manual_seed(5)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_cross_entropy, backend=graphs, fullgraph=True, dynamic=True)
    options = {"max_rows": max_rows, "chunk_rows": 8, "reduction": reduction}
    counts = []
    for rows in (30, 31, 77):
        data = *inputs(rows, device=device), torch.float32, train_head
        grad = torch.rand(rows, device=device) if reduction == "none" else None
        got, want = (run(function, *data, grad, **options) for function in (compiled, linear_cross_entropy))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        counts.append(graphs.frame_count)
    assert counts[0] == counts[-1] > 0
    if max_rows and device == "cpu":
        with pytest.raises(ValueError, match="10 rows count, more than max_rows = 9"):
            run(compiled, *inputs(kept=10), torch.float32, train_head, grad, **options)


@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused(reduction, train_head, device):
    hidden, head, target, weight = inputs(device=device)
    leaves = [hidden.requires_grad_(), head.requires_grad_()] if train_head else [hidden.requires_grad_()]
    loss = linear_cross_entropy(hidden, head, target, weight, reduction=reduction).loss
    grads = torch.autograd.grad(loss, leaves, torch.ones_like(loss), create_graph=True)
    for grad in grads:
        with pytest.raises(RuntimeError, match="linear_cross_entropy: its gradient has no derivative"):
            (loss.sum() + grad.square().sum()).backward(retain_graph=True)


def test_backward_twice(device):
    hidden, head, target, weight = inputs(device=device)
    leaves = hidden.requires_grad_(), head.requires_grad_()
    loss = linear_cross_entropy(hidden, head, target, weight).loss
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    twice = torch.autograd.grad(2 * loss, leaves)
    assert all(torch.equal(2 * a, b) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize("max_rows", [None, 9])
def test_meta_tensors_give_meta_tensors(max_rows):
    data = inputs(device="meta")
    results = run(linear_cross_entropy, *data, torch.bfloat16, True, max_rows=max_rows)
    assert all(result.is_meta for result in results)
    assert [tuple(result.shape) for result in results] == [(), (30,), (30,), (30,), (30, 16), (50, 16)]


def test_registrations(device):
    torch.manual_seed(6)
    hidden, head, target, weight = inputs(device=device)
    teacher, states, per_row = (torch.randn(*shape, device=device) for shape in ((30, 50), (7, 5), (30,)))
    states_head, row = torch.randn(50, 5, device=device), torch.arange(30, device=device) % 7
    data, bounds, options = (hidden, head, target, weight), (12, 4, 20), (3.0, 1, 0.3, 4.0, 0.1, 1e-3)
    teachers = (teacher, None, None), (states, states_head, row)
    ops = torch.ops.dflash_ext
    for made in ((False, False, True), (True, True, False)):
        leaves = (hidden.clone().requires_grad_(), head.clone().requires_grad_(made[2]))
        for each in teachers:
            torch.library.opcheck(ops.linear_cross_entropy, (*leaves, *data[2:], *each, *bounds, *made, *options))
    for each in teachers:
        arguments = (*data, *each, *bounds)
        for made in ((False, False, True), (False, True, False), (False, False, False)):
            *_, grad_hidden, grad_logits, rows = ops.linear_cross_entropy(*arguments, *made, *options)
            trained = (True, not grad_hidden.numel())
            saved = (per_row.sum(), grad_hidden, grad_logits, rows)
            torch.library.opcheck(ops.linear_cross_entropy_backward, (*saved, *arguments, *trained, *options))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"head": torch.zeros(50, 15)}, r"hidden is \[3, 16\], head is \[50, 15\]"),
        ({"head": torch.zeros(50, 16).half()}, "head is torch.float16"),
        ({"weight": torch.ones(2)}, r"weight has shape \[2\]"),
        ({"max_rows": 0}, "max_rows is 0"),
        ({"teacher": torch.zeros(3, 9), "teacher_mix": 0.1}, r"teacher is torch.float32 \[3, 9\]"),
        ({"teacher": torch.zeros(3, 50).half(), "teacher_mix": 0.1}, r"teacher is torch.float16 \[3, 50\]"),
        ({"hidden": torch.zeros(3, 16).int(), "head": torch.zeros(50, 16).int()}, "hidden is torch.int32"),
        ({"head": torch.zeros(0, 16)}, r"head is \[0, 16\]"),
        ({"head": torch.zeros(50, 16, device="meta")}, "hidden is on cpu, head on meta; one device is needed"),
        ({"target": torch.zeros(3, dtype=torch.long, device="meta")}, "hidden is on cpu, target on meta"),
        ({"teacher": torch.zeros(3, 50, device="meta"), "teacher_mix": 0.1}, "teacher on meta"),
        ({"teacher_hidden": torch.zeros(3, 6)}, r"teacher_head is None; .* it must be torch.float32 \[50, 6\]"),
        (
            {"teacher_hidden": torch.zeros(3, 6), "teacher_head": torch.zeros(49, 6)},
            r"teacher_head is torch.float32 \[49, 6\]; .* a vocabulary of 50 .* torch.float32 \[50, 6\]",
        ),
        (
            {"teacher_hidden": torch.zeros(3, 6), "teacher_head": torch.zeros(50, 6).half()},
            "teacher_head is torch.float16",
        ),
        (
            {"teacher_hidden": torch.zeros(4, 6), "teacher_head": torch.zeros(50, 6)},
            r"teacher_hidden is torch.float32 \[4, 6\]; without teacher_row .* \[3\]",
        ),
        (
            {
                "teacher_hidden": torch.zeros(4, 6),
                "teacher_head": torch.zeros(50, 6),
                "teacher_row": torch.zeros(4, dtype=torch.long),
            },
            r"teacher_row is torch.int64 \[4\]; integers \[3\]",
        ),
        (
            {
                "teacher": torch.zeros(3, 50),
                "teacher_hidden": torch.zeros(3, 6),
                "teacher_head": torch.zeros(50, 6),
            },
            "teacher and teacher_hidden are given",
        ),
        (
            {
                "teacher_hidden": torch.zeros(3, 6),
                "teacher_head": torch.zeros(50, 6),
                "teacher_softcap": -1.0,
            },
            "teacher_softcap is -1.0",
        ),
        ({"teacher_head": torch.zeros(50, 6)}, "teacher_head is given without teacher_hidden"),
        ({"teacher_row": torch.zeros(3, dtype=torch.long)}, "teacher_row is given without teacher_hidden"),
        ({"teacher_softcap": 3.0}, "teacher_softcap is given without teacher_hidden"),
        ({"weight": torch.ones(3, requires_grad=True)}, "weight requires a gradient"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {
        "hidden": torch.zeros(3, 16),
        "head": torch.zeros(50, 16),
        "target": torch.zeros(3, dtype=torch.long),
    } | change
    with pytest.raises(ValueError, match=f"^linear_cross_entropy: .*{message}"):
        linear_cross_entropy(**arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"max_rows": 2.0}, r"max_rows is 2.0 \(float\); an integer or None is needed"),
        ({"chunk_rows": torch.tensor(3)}, r"chunk_rows is torch.int64 \[\]; an integer or None is needed"),
        ({"softcap": torch.tensor(3.0)}, r"linear_cross_entropy: softcap is torch.float32 \[\]; a number or None"),
    ],
)
def test_what_is_no_tensor_or_number(change, message):
    arguments = {"hidden": torch.zeros(1, 4), "head": torch.zeros(5, 4), "target": torch.zeros(1).long()} | change
    with pytest.raises(TypeError, match=message):
        linear_cross_entropy(**arguments)


@pytest.mark.parametrize("max_rows", [None, 7])
def test_a_target_outside_the_vocabulary_is_named_by_its_row(max_rows):
    hidden, head, target = torch.randn(8, 6), torch.randn(5, 6), torch.zeros(8, dtype=torch.long)
    target[2], target[6] = 9, -1
    message = r"^linear_cross_entropy: target -1 of row 6 is outside the vocabulary \[0, 5\); rows that do not"
    with pytest.raises(RuntimeError, match=message):
        weight = torch.tensor([1.0, 1, 0, 1, 1, 1, 1, 1])
        linear_cross_entropy(hidden, head, target, weight, max_rows=max_rows, chunk_rows=2)
    with pytest.raises(RuntimeError, match="target 9 of row 2"):
        linear_cross_entropy(hidden, head, target, max_rows=max_rows, chunk_rows=2)


@pytest.mark.gpu
@pytest.mark.parametrize("max_rows", [None, 4])
def test_a_target_outside_the_vocabulary_makes_its_row_nan_on_the_gpu(max_rows):
    hidden, head = torch.randn(4, 6, device="cuda", requires_grad=True), torch.randn(5, 6, device="cuda")
    target = torch.tensor([0, 5, -1, -100], device="cuda")
    out = linear_cross_entropy(hidden, head, target, reduction="none", max_rows=max_rows)
    (grad,) = torch.autograd.grad(out.loss[[0, 3]].sum(), hidden)
    assert out.loss.isnan().tolist() == out.nll.isnan().tolist() == [False, True, True, False]
    assert grad[[0, 3]].isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_row_that_does_not_count_may_hold_anything(reduction):
    hidden, head = torch.randn(4, 6), torch.randn(5, 6, requires_grad=True)
    target, weight = torch.zeros(4, dtype=torch.long), torch.tensor([1.0, 1, 1, 0])
    grads = []
    for value in (0.0, torch.nan):
        hidden[3] = value
        loss = linear_cross_entropy(hidden, head, target, weight, max_rows=4, reduction=reduction).loss
        grads += torch.autograd.grad(loss.sum(), head)
    assert torch.equal(*grads)


def test_forward_mode_is_refused():
    hidden, head, target = torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.long)
    with pytest.raises(RuntimeError, match="linear_cross_entropy: forward-mode derivatives are not supported"):
        torch.func.jvp(lambda x: linear_cross_entropy(x, head, target).loss, (hidden,), (hidden,))


@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("max_rows", [None, 9, 12])
def test_an_ignored_label_is_a_weight_of_0(max_rows, reduction, train_head, device):
    torch.manual_seed(7)
    hidden, head, target, weight = inputs(device=device)
    hidden[weight == 0] = torch.nan
    labels, ones = target.masked_fill(weight == 0, -100), (weight != 0).float()
    grad = torch.randn(30, device=device) if reduction == "none" else None
    options = {"reduction": reduction, "max_rows": max_rows, "chunk_rows": 4}
    want = run(linear_cross_entropy, hidden, head, target, ones, torch.float32, train_head, grad, **options)
    got = run(linear_cross_entropy, hidden, head, labels, None, torch.float32, train_head, grad, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    exact = run(
        reference.linear_cross_entropy,
        hidden.nan_to_num(),
        head,
        labels,
        None,
        torch.float64,
        train_head,
        grad,
        reduction=reduction,
    )
    for ours, theirs in zip(got, exact, strict=True):
        torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=1e-4, atol=2e-5)


def test_ignored_labels_count_against_max_rows_no_more_than_weights_of_0():
    hidden, head, target, _ = inputs()
    for function in (linear_cross_entropy, reference.linear_cross_entropy):
        assert function(hidden, head, target, ignore_index=-7, max_rows=9).loss.isfinite()
        with pytest.raises(ValueError, match="9 rows .*max_rows = 8"):
            function(hidden, head, target, ignore_index=-7, max_rows=8)


@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("normaliser", [30, torch.tensor(30), torch.tensor([30.0])], ids=str)
def test_a_normaliser_replaces_the_sum_of_weights(normaliser, train_head):
    data = inputs()
    want = run(linear_cross_entropy, *data, torch.float32, train_head, reduction="sum")
    for function, dtype in ((linear_cross_entropy, torch.float32), (reference.linear_cross_entropy, torch.float64)):
        got = run(function, *data, dtype, train_head, normaliser=normaliser)
        for index in (0, *range(4, len(got))):
            torch.testing.assert_close(got[index], (want[index] / 30).to(dtype), rtol=1e-4, atol=1e-6)


def test_a_normaliser_that_cannot_be_used_is_refused():
    data = inputs()
    with pytest.raises(ValueError, match="linear_cross_entropy: normaliser is given with reduction 'sum'"):
        linear_cross_entropy(*data, normaliser=3, reduction="sum")


@pytest.mark.parametrize("kept", [9, 64])
def test_ignored_labels_stay_out_of_the_products(kept, device):
    hidden, head, target, _ = inputs(64, 8, 500, kept=kept, device=device)
    with torch.profiler.profile(record_shapes=True) as profile:
        linear_cross_entropy(hidden, head, target, ignore_index=-7)
    logits = [shape for event in profile.events() for shape in event.input_shapes if shape and shape[-1] == 500]
    assert max(math.prod(shape) for shape in logits) == kept * 500
