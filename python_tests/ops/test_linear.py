"""linear against its definition, and the promise that a row's bits depend on that row alone."""

import pytest
import torch
import torch.nn.functional as F

from dflash_ext import linear, reference
from python_tests.exactness import allowed_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = [(1, 7, 5), (5, 33, 100), (3, 576, 192), (8, 1536, 50), (17, 700, 97), (40, 1300, 49)]
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "norm, residual": {"norm": True, "residual": True},
    "norm 1 + w, gate, bias": {"norm": True, "norm_plus_one": True, "gate": "gelu_tanh", "bias": True},
    "everything": {"norm": True, "norm_eps": 0.1, "gate": "silu", "bias": True, "residual": True},
}


def random_case(rows, inner, columns, dtype, device="cpu", **options):
    """x, weight and the options, in which True stands for a random tensor."""
    generator = torch.Generator().manual_seed(inner + rows)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    in_weight = 2 * columns if options.get("gate") else columns
    sizes = {"bias": (in_weight,), "norm": (inner,), "residual": (rows, columns)}
    options = {name: randn(*sizes[name]) if name in sizes else value for name, value in options.items()}
    return randn(rows, inner), randn(in_weight, inner) / inner**0.5, options


def widened(options):
    return {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_definition(dtype, shape, options, device, poisoned_memory):
    if device == "cuda" and dtype == torch.float64:
        options = {name: value for name, value in options.items() if name != "norm_plus_one"}
    x, weight, options = random_case(*shape, dtype, device, **options)
    want = reference.linear(x.double(), weight.double(), **widened(options))
    got = linear(x, weight, **options)
    assert got.dtype == dtype and got.shape == want.shape

    def error(values):
        return ((values.double() - want).abs().max() / want.abs().max()).item()

    torchs = reference.linear(x, weight, **options)
    steps = sum(name in options for name in ("norm", "gate", "residual")) + 1 if device == "cuda" else 1
    assert error(got) <= allowed_error(error(torchs), steps * torch.finfo(dtype).eps)


@pytest.mark.parametrize("options", [OPTIONS["norm, residual"], OPTIONS["everything"]], ids=["plain", "gate and bias"])
@pytest.mark.parametrize("rows", [3, 200])
def test_a_residual_that_may_be_overwritten(rows, options, device):
    x, weight, options = random_case(rows, 576, 192, torch.float32, device, **options)
    want = linear(x, weight, **options)
    residual = options.pop("residual")
    got = linear(x, weight, **options, residual=residual.clone(), overwrites_residual=True)
    torch.testing.assert_close(got, want)
    with_gaps = torch.cat([residual, residual], dim=1)[:, :192]
    torch.testing.assert_close(linear(x, weight, **options, residual=with_gaps, overwrites_residual=True), want)
    if device == "cuda" and "gate" not in options:
        assert linear(x, weight, **options, residual=residual, overwrites_residual=True) is not None
        torch.testing.assert_close(residual, want)  # the product was added in place


def test_the_definition_is_what_modules_compute():
    x, weight, options = random_case(3, 16, 8, torch.float64, **OPTIONS["everything"])
    normed = F.rms_norm(x, (16,), options["norm"], 0.1)
    gate, up = (normed @ weight.T + options["bias"]).chunk(2, dim=-1)
    want = F.silu(gate) * up + options["residual"]
    torch.testing.assert_close(reference.linear(x, weight, **options), want)
    plus_one = {"norm": options["norm"] - 1, "norm_plus_one": True}
    torch.testing.assert_close(reference.linear(x, weight, **options | plus_one), want)


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("inner", "columns"), [(576, 192), (1536, 50), (700, 97), (2049, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_of_a_row_depend_on_that_row_alone(dtype, inner, columns, options):
    x, weight, options = random_case(41, inner, columns, dtype, **options)
    residual = options.pop("residual", None)

    def run(*rows):
        rows = torch.tensor(rows)
        return bits(linear(x[rows], weight, **options, residual=None if residual is None else residual[rows]))

    alone = torch.cat([run(row) for row in range(41)])
    for count in (2, 3, 4, 5, 7, 8, 9, 13, 16, 31, 32, 33, 41):
        assert torch.equal(run(*range(count)), alone[:count]), count
    order = torch.randperm(41, generator=torch.Generator().manual_seed(0)).tolist()
    assert torch.equal(run(*order), alone[order])
    assert torch.equal(run(6, 6, 6, 6, 6, 6), alone[[6] * 6])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_weight_in_bfloat16_counts_as_the_same_in_float32(shape, options):
    x, weight, options = random_case(*shape, torch.float32, **options)
    narrow = weight.bfloat16()
    assert torch.equal(linear(x, narrow, **options), linear(x, narrow.float(), **options))


def test_a_bias_and_a_norm_may_have_strides(device):
    x, weight, options = random_case(3, 40, 30, torch.float32, device, bias=True, norm=True)
    strided = {name: torch.stack((each, each), -1)[:, 0] for name, each in options.items()}
    assert torch.equal(linear(x, weight, **strided), linear(x, weight, **options))


def test_the_bits_do_not_depend_on_the_number_of_threads():
    x, weight, options = random_case(9, 576, 1000, torch.float32, norm=True, gate="silu")
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(bits(linear(x, weight, **options)))
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_row_that_is_not_finite_stays_alone():
    x, weight, _ = random_case(7, 40, 30, torch.float32)
    want = linear(x, weight)
    x[3], x[5, 0] = torch.nan, torch.inf
    got = linear(x, weight)
    others = [0, 1, 2, 4, 6]
    assert torch.equal(got[others], want[others])
    assert got[3].isnan().all() and not got[5].isfinite().any()


def test_gates_of_large_numbers_are_those_of_torch():
    x = torch.tensor([[-1e4], [-100.0], [-20.0], [0.0], [20.0], [1e4]])
    weight = torch.ones(2, 1)
    for gate, activation in (("silu", F.silu), ("gelu_tanh", lambda y: F.gelu(y, approximate="tanh"))):
        torch.testing.assert_close(linear(x, weight, gate=gate), activation(x) * x, rtol=1e-6, atol=1e-6)


def test_leading_dimensions_and_strides(device):
    x, weight, options = random_case(6, 20, 10, torch.float32, device, residual=True)
    want = linear(x, weight, **options)
    residual = options["residual"].view(2, 3, 10)
    wide = torch.zeros(2, 3, 25, device=device)
    wide[..., :20] = x.view(2, 3, 20)
    torch.testing.assert_close(linear(wide[..., :20], weight, residual=residual), want.view(2, 3, 10))
    strided = residual.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(linear(x.view(2, 3, 20), weight, residual=strided), want.view(2, 3, 10))
    assert linear(x[0], weight).shape == (10,)
    assert linear(x[:0], weight).shape == (0, 10) and linear(x, weight[:0]).shape == (6, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(())}, r"x is torch.float32 \[\]"),
        ({"x": torch.zeros(2, 0)}, "K > 0"),
        ({"x": torch.zeros(2, 4).long()}, r"x is torch.int64 \[2, 4\]"),
        ({"weight": torch.zeros(6, 5)}, r"weight is torch.float32 \[6, 5\]; torch.float32 \[N, 4\]"),
        ({"weight": torch.zeros(6, 4).half()}, r"weight is torch.float16 \[6, 4\]; torch.float32"),
        ({"weight": torch.zeros(4, 6).T}, r"weight has strides \(1, 6\)"),
        ({"weight": torch.zeros(5, 4), "gate": "silu"}, "with a gate an even number of rows"),
        ({"bias": torch.zeros(3), "gate": "silu"}, r"bias is torch.float32 \[3\]; torch.float32 \[6\]"),
        ({"norm": torch.zeros(6)}, r"norm is torch.float32 \[6\]; torch.float32 \[4\]"),
        ({"norm": torch.zeros(4).bfloat16()}, r"norm is torch.bfloat16 \[4\]"),
        ({"residual": torch.zeros(6)}, r"residual is torch.float32 \[6\]; torch.float32 \[2, 6\]"),
        ({"gate": "relu"}, "gate is 'relu'; 'silu', 'gelu_tanh' and None are supported"),
        ({"weight": torch.zeros(6, 4, device="meta")}, "x is on cpu, weight on meta; one device is needed"),
    ],
)
def test_refusals_name_the_value(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        linear(**{"x": torch.zeros(2, 4), "weight": torch.zeros(6, 4)} | changes)
    assert "\n" not in str(caught.value)


def test_autocast_casts_and_nothing_has_a_gradient():
    x, weight, options = random_case(3, 24, 10, torch.float32, norm=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear(x, weight.requires_grad_(), **options)
    want = linear(x.bfloat16(), weight.bfloat16(), norm=options["norm"].bfloat16())
    assert torch.equal(got, want) and not got.requires_grad


def test_registration():
    for options in OPTIONS.values():
        x, weight, options = random_case(3, 24, 10, torch.float32, **options)
        gate = {None: 0, "silu": 1, "gelu_tanh": 2}[options.get("gate")]
        vectors = options.get("bias"), options.get("norm")
        rest = options.get("norm_eps", 1e-6), options.get("norm_plus_one", False), gate, options.get("residual")
        torch.library.opcheck(torch.ops.dflash_ext.linear, (x, weight, *vectors, *rest, False))

        @torch.compile(fullgraph=True, backend="aot_eager")
        def compiled(x, weight, options):
            return linear(2 * x, weight, **options)

        assert torch.equal(compiled(x, weight, options), linear(2 * x, weight, **options))
