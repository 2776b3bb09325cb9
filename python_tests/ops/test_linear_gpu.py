"""linear's Hopper kernel: all shapes against the definition, the bits of a row, graphs."""

import pytest
import torch

from dflash_ext import linear, reference
from python_tests.exactness import allowed_error
from python_tests.ops.test_linear import OPTIONS, bits, random_case, widened

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="a kernel for Hopper"
    ),
]
SHAPES = [(576, 960), (576, 1536), (1536, 576), (4096, 4096), (1000, 5000), (64, 3), (8, 4100), (4104, 130)]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_matches_the_definition(dtype, shape, options):
    for rows in (1, 9, 33, 64, 128, 300):
        x, weight, given = random_case(rows, *shape, dtype, "cuda", **options)
        want = reference.linear(x.double(), weight.double(), **widened(given))
        got = linear(x, weight, **given)
        torchs = linear(x, weight, **given) if "norm" in given else reference.linear(x, weight, **given)

        def error(values, want=want):
            return ((values.double() - want).abs().max() / want.abs().max()).item()

        # A norm rounds once more.
        assert error(got) <= allowed_error(error(torchs), (2 if "norm" in given else 1) * torch.finfo(dtype).eps)


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["everything"]], ids=["plain", "everything"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bits_of_a_row_depend_on_that_row_alone(shape, options):
    x, weight, options = random_case(200, *shape, torch.bfloat16, "cuda", **options)
    residual = options.pop("residual", None)

    def run(rows):
        rows = torch.as_tensor(rows, device="cuda")
        given = None if residual is None else residual[rows]
        return bits(linear(x[rows], weight, **options, residual=given, exact=True))

    alone = torch.cat([run([row]) for row in range(200)])
    for count in (2, 5, 8, 16, 17, 32, 33, 63, 64, 65, 100, 128, 129, 200):
        assert torch.equal(run(range(count)), alone[:count]), count
    order = torch.randperm(200, device="cuda")
    assert torch.equal(run(order), alone[order])


def test_views_may_begin_anywhere():
    """The kernel reads by 16 bytes: x and norm are copied if they begin elsewhere, another weight is PyTorch's."""
    x, weight, given = random_case(3, 64, 40, torch.bfloat16, "cuda", norm=True)
    want = linear(x, weight, **given)

    def moved(tensor):
        return torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape)

    for exact in (False, True):
        got = linear(moved(x), weight, **given | {"norm": moved(given["norm"])}, exact=exact)
        assert torch.equal(got, linear(x, weight, **given, exact=exact))
    torch.testing.assert_close(linear(x, moved(weight), **given), want, rtol=0.02, atol=0.02)
    strided = torch.stack((given["norm"], given["norm"]), -1)[:, 0]
    assert torch.equal(linear(x, weight, **given | {"norm": strided}), want)
    with pytest.raises(ValueError, match="a weight that begins at a multiple of 16 bytes"):
        linear(x, moved(weight), **given, exact=True)


def test_a_chain_of_products_in_a_graph():
    """Kernels that overlap their predecessors read what those have written."""
    torch.manual_seed(0)
    weights = [torch.randn(576, 576, device="cuda", dtype=torch.bfloat16) / 24 for _ in range(20)]
    x = torch.randn(8, 576, device="cuda", dtype=torch.bfloat16)

    def chain(x, product):
        for weight in weights:
            x = product(x, weight)
        return x

    chain(x, lambda x, w: linear(x, w, residual=x, constant_weight=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(x, lambda x, w: linear(x, w, residual=x, constant_weight=True))
    for _ in range(3):
        x.normal_()
        graph.replay()
        want = chain(x, lambda x, w: reference.linear(x, w, residual=x))
        assert (got - want).abs().max() <= 0.05 * want.abs().max()
        torch.cuda.synchronize()


def test_a_weight_that_the_kernel_before_writes():
    x = torch.eye(16, 512, device="cuda", dtype=torch.bfloat16)
    weight = torch.zeros(4096, 512, device="cuda", dtype=torch.bfloat16)
    for value in range(1, 50):
        weight.fill_(value)
        assert (linear(x, weight) == value).all()


def test_exact_refuses_what_no_kernel_serves():
    for x in (torch.ones(2, 12), torch.ones(2, 12).bfloat16()):
        x = x.cuda()
        with pytest.raises(ValueError, match="exact=True on a GPU needs Hopper"):
            linear(x, torch.ones(3, 12, device="cuda", dtype=x.dtype), exact=True)
