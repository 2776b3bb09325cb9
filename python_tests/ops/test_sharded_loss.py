"""sharded_linear_cross_entropy on two processes against the definition with the whole head."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from dflash_ext import linear_cross_entropy, reference, sharded_linear_cross_entropy
from python_tests.ops.test_linear_loss import inputs, run

ROWS, VOCAB = 30, 50
CASES = [
    {},
    {"reduction": "sum", "label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 4.0},
    {"reduction": "none", "label_smoothing": 0.2},
    {"reduction": "none", "softcap": 3.0, "max_rows": 12},
    {"z_loss": 1e-1, "max_rows": 9, "normaliser": 7.0},
    {"softcap": 0.5, "label_smoothing": 1.0},
]


def as_one_process(rank, world, path):
    """What each of the processes runs."""
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    part = slice(rank * VOCAB // world, (rank + 1) * VOCAB // world)
    torch.manual_seed(0)
    for kept in (9, 0):
        hidden, head, target, weight = inputs(kept=kept)
        hidden[weight == 0] = torch.nan
        for options in CASES:
            grad = torch.linspace(0.5, 2.0, ROWS) if options.get("reduction") == "none" else torch.tensor(0.5)
            whole, own = (hidden.nan_to_num(), head, target, weight), (hidden, head[part], target, weight)
            want = run(reference.linear_cross_entropy, *whole, torch.float64, True, grad, **options)
            want[-1] = want[-1][part]
            got = run(sharded_linear_cross_entropy, *own, torch.float32, True, grad, **options)
            for ours, theirs in zip(got, want, strict=True):
                torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=1e-4, atol=2e-5, msg=str(options))
    assert want[2].dtype == torch.bool

    # torch.compile leaves the exchange between processes alone.
    hidden, head, *rest = inputs(kept=9)
    own = hidden, head[part], *rest, torch.float32, True
    compiled = torch.compile(sharded_linear_cross_entropy, backend="eager")
    for ours, theirs in zip(run(compiled, *own), run(sharded_linear_cross_entropy, *own), strict=True):
        torch.testing.assert_close(ours, theirs)

    # In bfloat16 it is as wrong as the same loss with the whole head.
    hidden, head, *rest = inputs(kept=ROWS)
    exact = run(reference.linear_cross_entropy, hidden, head, *rest, torch.float64, True)[4:]
    whole = run(linear_cross_entropy, hidden, head, *rest, torch.bfloat16, True)[4:]
    got = run(sharded_linear_cross_entropy, hidden, head[part], *rest, torch.bfloat16, True)[4:]
    exact[1], whole[1] = exact[1][part], whole[1][part]
    for ours, other, want in zip(got, whole, exact, strict=True):
        assert (ours.double() - want).norm() <= 1.25 * (other.double() - want).norm()

    # Logits that are equal on both processes: the first is the argmax.
    hidden, head = torch.ones(2, 4), torch.ones(VOCAB, 4)
    out = sharded_linear_cross_entropy(hidden, head[part], torch.tensor([0, VOCAB // 2]))
    assert out.correct.tolist() == [True, False]
    with pytest.raises(RuntimeError, match=r"target 50 of row 1 is outside the vocabulary \[0, 50\)"):
        sharded_linear_cross_entropy(hidden, head[part], torch.tensor([0, VOCAB]))
    for bound in ({"ignore_index": None}, {"weight": torch.ones(2)}):
        with pytest.raises(ValueError, match="^sharded_linear_cross_entropy: 2 rows count, more than max_rows = 1"):
            sharded_linear_cross_entropy(hidden, head[part], torch.tensor([0, 3]), max_rows=1, **bound)
    leaf = hidden.requires_grad_()
    loss = sharded_linear_cross_entropy(leaf, head[part], torch.tensor([0, 3])).loss
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="its gradient has no derivative"):
        (loss + grad.square().sum()).backward()
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    multiprocessing.start_processes(as_one_process, (2, str(tmp_path / "store")), nprocs=2, start_method="fork")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"head": torch.zeros(50, 15)}, r"head is torch.float32 \[50, 15\]"),
        ({"head": torch.zeros(50, 16).half()}, "one floating dtype"),
        ({"weight": torch.ones(2)}, r"weight has shape \[2\]"),
        ({"max_rows": 0}, "max_rows is 0"),
        ({"reduction": "avg"}, "reduction is 'avg'"),
        ({"normaliser": 3, "reduction": "sum"}, "normaliser is given with reduction 'sum'"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {
        "hidden": torch.zeros(3, 16),
        "head": torch.zeros(50, 16),
        "target": torch.zeros(3, dtype=torch.long),
    } | change
    with pytest.raises(ValueError, match=f"^sharded_linear_cross_entropy: .*{message}"):
        sharded_linear_cross_entropy(**arguments)
