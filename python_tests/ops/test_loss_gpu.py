"""The in-place pass of the loss kernels on a GPU: rows of every length against the definition in float64."""

import pytest
import torch

from dflash_ext import reference
from python_tests.exactness import allowed_error
from python_tests.ops.test_loss import OPTIONS, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

# Vocabularies of one block, of clusters of 2, 4 and 8 blocks, of slices with a short last piece, of rows that are no
# multiples of 16 bytes, and of rows that are too long for a cluster.
VOCABULARIES = [1, 8, 1000, 2049, 32000, 49152, 100352, 151936, 262144, 500000]


def in_place(logits, target, weight, softcap=0.0, label_smoothing=0.0, z_loss=0.0):
    operator = torch.ops.dflash_ext.masked_cross_entropy_
    return operator(logits[None], target[None], weight[None], None, 0, 0.0, softcap, label_smoothing, z_loss)


def exact(logits, target, weight, **options):
    """Losses, nll, correct, entropy and the gradient of the sum of the losses."""
    leaf = logits.double().requires_grad_()
    out = reference.masked_cross_entropy(leaf, target, weight.double(), reduction="none", **options)
    (grad,) = torch.autograd.grad(out.loss.sum(), leaf)
    return *out, grad


def inputs(rows, vocab, dtype):
    logits = (3 * torch.randn(rows, vocab, device="cuda")).to(dtype)
    target = torch.randint(0, vocab, (rows,), device="cuda")
    target[::3] = logits.argmax(1)[::3]
    return logits, target, torch.rand(rows, device="cuda") + 0.1


@pytest.mark.parametrize("options", [OPTIONS[name] for name in ("plain", "softcap", "smoothing", "z_loss")], ids=str)
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matches_the_definition(dtype, vocab, options):
    logits, target, weight = inputs(5, vocab, dtype)
    weight[3] = 0
    want = exact(logits, target, weight, **options)
    losses, nll, correct, entropy = in_place(logits, target, weight, **options)
    for got, expected in zip((losses, nll, entropy), (want[0], want[1], want[3]), strict=True):
        torch.testing.assert_close(got[0].double(), expected, rtol=1e-4, atol=2e-5)
    assert torch.equal(correct[0], want[2])
    # A gradient that is 0 in exact arithmetic is held against 1e-2.
    rounding = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    assert relative_error(logits, want[4]) <= allowed_error(0.0, rounding)


@pytest.mark.parametrize("vocab", [1000, 49152, 151936])
def test_many_rows_in_turn(vocab):
    """Every cluster of blocks has several rows, some of which do not count, between rows of other memory."""
    rows = 700
    held = torch.zeros(rows, vocab + 16, device="cuda", dtype=torch.bfloat16)
    logits, target, weight = inputs(rows, vocab, torch.bfloat16)
    weight[torch.rand(rows, device="cuda") < 0.3] = 0
    logits[weight == 0] = torch.nan
    target[7], weight[7] = vocab, 1.0  # outside the vocabulary
    held[:, :vocab] = logits
    losses = in_place(held[:, :vocab], target, weight)[0][0]
    assert not held[:, vocab:].any() and not held[weight == 0].any()
    assert losses[7].isnan() and held[7, :vocab].isnan().all()
    for chunk in torch.arange(rows, device="cuda").split(100):
        part = chunk[(weight[chunk] != 0) & (chunk != 7)]
        want = exact(logits[part], target[part], weight[part])
        torch.testing.assert_close(losses[part].double(), want[0], rtol=1e-4, atol=2e-5)
        got = held[part, :vocab]
        assert relative_error(got, want[4]) <= allowed_error(0.0, torch.finfo(torch.bfloat16).eps / 2)


@pytest.mark.parametrize("vocab", [5000, 151936])
@pytest.mark.parametrize("rising", [False, True])
def test_logits_of_any_size(vocab, rising):
    """The origin of the exponents follows logits that rise by thousands, and -inf counts as nothing."""
    logits = 1e4 * torch.randn(4, vocab, device="cuda")
    if rising:
        logits = logits.sort(1).values
    logits[1, : vocab // 2] = -torch.inf
    logits[2] = -torch.inf
    logits[2, 77] = -1e4
    target = torch.tensor([vocab - 1, vocab - 2, 77, 3], device="cuda")
    weight = torch.ones(4, device="cuda")
    want = exact(logits, target, weight)
    losses, nll, correct, entropy = in_place(logits, target, weight)
    for got, expected in zip((losses, nll, entropy, logits), (want[0], want[1], want[3], want[4]), strict=True):
        torch.testing.assert_close(got.double().view_as(expected), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(correct[0], want[2])
