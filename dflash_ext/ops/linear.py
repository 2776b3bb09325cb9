"""Products of a few rows with large weights, together with the norm before them and the gate or residual after them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_numbers, check_operands, check_tensors, shown
from ..native import load
from .autograd import has_no_gradient
from .backends import hopper_kernels_serve
from .devices import autocast
from .layer import WIDEST, add_rms_norm, gated

load()
_linear = torch.ops.dflash_ext.linear.default

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LARGE_WEIGHT = 1 << 23  # elements
GATES = {None: 0, "silu": 1, "gelu_tanh": 2}
# How a GPU computes a product: by the Hopper kernel; by it behind a norm of its own; by PyTorch's operators.
KERNEL, NORM_APART, STEPS = range(3)
MOST_ROWS = 128  # that the Hopper kernel serves, unless it is to be exact


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_plus_one: bool = False,
    gate: str | None = None,
    residual: Tensor | None = None,
    overwrites_residual: bool = False,
    exact: bool = False,
    constant_weight: bool = False,
) -> Tensor:
    """``x @ weight.T`` for a few rows and a large weight, with the operations around it in a transformer.

    It has no gradient.

    In the order of the computation::

        x = rms_norm(x, eps=norm_eps) * norm       # norm given; * (1 + norm) with norm_plus_one
        y = x @ weight.T + bias
        y = activation(y[..., :N]) * y[..., N:]    # gate given, N being half of the weight's rows
        y = y + residual                           # residual given

    Args:
        x: ``[..., K]``, the rows.
        weight: ``[N, K]`` as in nn.Linear; ``[2 * N, K]`` with a gate: gate_proj above up_proj.
        bias: ``[N]``, with a gate ``[2 * N]``; None for none.
        norm: ``[K]``, the weights of an RMS norm of x; None for none. norm_eps is added to the mean square.
        norm_plus_one: multiplies by 1 + norm (Gemma).
        gate: "silu" (Llama, Qwen) or "gelu_tanh" (Gemma); None for none.
        residual: ``[..., N]``, added at the end.
        overwrites_residual: residual may be overwritten, and the result may take its place. PyTorch's product then adds
            to it without a kernel of its own.
        exact: on a GPU, a row gets the same bits at any number of rows and at any place among them. On the CPU a row
            always does.
        constant_weight: the caller promises that no earlier kernel in the stream writes the weight. This holds for a
            model's parameters in inference. The Hopper kernel then reads the weight before the kernel in front of it
            has ended.

    All tensors are of one dtype, float32, bfloat16, float16 or float64; the weight is contiguous. On the CPU the weight
    of a float32 x may also be bfloat16. The result is that of the same weight in float32, to the bit, and reading it
    takes half of the time. Under autocast tensors are cast to its dtype.

    Returns ``[..., N]`` in x's dtype.

    On the CPU all intermediate results are in float32 (float64 for float64). The bits of a row of the result depend
    only on its own row of x and residual. They do not depend on the number of rows, on its place among them, or on the
    number of threads. A few rows take about the time of reading the weight once. More than 32 rows are computed in
    groups of 32; torch's own product of large matrices may be faster then.

    On a Hopper GPU a kernel of this package serves bfloat16 and float16 where it is the faster one: up to 32 rows, up
    to 64 with a gate or, with a small weight, a residual, and up to 128 with a norm and a small weight, if K is a
    multiple of 8 and the weight begins at a multiple of 16 bytes. With exact it serves any number of rows. It sums in
    float32 and rounds x * norm and the result. The norm before a large weight is a separate kernel. Other calls are
    served by PyTorch's operators, which round after every step. Their bits depend on the number of rows.

    Raises ValueError for arguments that do not fit together, or an exact product that no kernel serves; TypeError for
    one of another type.
    """
    try:
        x, weight, bias, norm, residual = autocast(x, weight, bias, norm, residual)
        bias, norm = (each if each is None else each.contiguous() for each in (bias, norm))
        if x.is_cuda:
            around = {"norm": norm is not None, "gate": gate is not None, "residual": residual is not None}
            form = product_form(math.prod(x.shape[:-1]), weight, **around, exact=exact)
            if form != STEPS:
                x, norm = aligned(x), norm if norm is None else aligned(norm)
            if norm is not None and form != KERNEL:
                x, norm = _normalised(x, norm, norm_eps, norm_plus_one), None
            if form == STEPS:
                _check(x, weight, bias, norm, norm_eps, gate, residual)
                return _by_steps(x, weight, bias, gate, residual, overwrites_residual)
        if residual is not None:
            residual = residual.contiguous()
        arguments = x.contiguous(), weight, bias, norm, norm_eps, norm_plus_one, GATES[gate], residual, constant_weight
        return _linear(*arguments)
    except Exception:
        # Checking costs as much as a small product, so it waits until something has gone wrong.
        _check(x, weight, bias, norm, norm_eps, gate, residual)
        raise


def product_form(rows: int, weight: Tensor, *, norm: bool, gate: bool, residual: bool, exact: bool) -> int:
    """KERNEL, NORM_APART or STEPS: what serves a product of so many rows on a GPU, with a norm, a gate or a residual.

    Raises ValueError if it has to be exact, and nothing that is serves it.
    """
    served = weight.dtype in (torch.bfloat16, torch.float16) and weight.shape[1] % 8 == 0
    served = served and hopper_kernels_serve(weight.device)
    if exact and not served:
        raise ValueError(
            "linear: exact=True on a GPU needs Hopper, bfloat16 or float16, and K a multiple of 8; "
            f"weight is {shown(weight)}"
        )
    if exact and not _is_aligned(weight):
        raise ValueError("linear: exact=True on a GPU needs a weight that begins at a multiple of 16 bytes")
    is_large = weight.numel() >= _LARGE_WEIGHT
    fuses = gate or (not is_large and (norm or residual))
    most_rows = MOST_ROWS if norm and not is_large else 64 if fuses else 32
    if not (served and _is_aligned(weight) and (exact or rows <= most_rows)):
        return STEPS
    # A block that has much of x to normalise would keep a large weight waiting.
    return NORM_APART if norm and is_large else KERNEL


def _is_aligned(tensor: Tensor) -> bool:
    """Whether a tensor begins at a multiple of 16 bytes of its memory. Compiled code copies inputs that do not."""
    return torch.compiler.is_compiling() or tensor.storage_offset() * tensor.element_size() % 16 == 0


def aligned(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    return tensor if _is_aligned(tensor) else tensor.clone()


@torch.no_grad()
def _normalised(x: Tensor, norm: Tensor, eps: float, plus_one: bool) -> Tensor:
    width = x.shape[-1]
    if x.dtype == torch.float64 or width % 8 or width > WIDEST:
        return F.rms_norm(x, (width,), norm + 1 if plus_one else norm, eps)
    return add_rms_norm(x.reshape(-1, width).contiguous(), norm, eps=eps, plus_one=plus_one).view(x.shape)


@torch.no_grad()
def _by_steps(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: str | None, residual: Tensor | None, overwrites_residual: bool
) -> Tensor:
    """The same without a norm by PyTorch's own operators, for a GPU."""
    with torch.autocast(x.device.type, enabled=False):
        if overwrites_residual and residual is not None and gate is None and bias is None:
            if residual.is_contiguous():
                rows = residual.view(-1, weight.shape[0])
                return rows.addmm_(x.reshape(-1, x.shape[-1]), weight.t()).view(residual.shape)
        # As two dimensions: torch would make a product of rows with gaps between them batch by batch.
        y = F.linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])
    if gate is not None and y.numel() > 0 and y.dtype != torch.float64 and y.shape[-1] % 16 == 0:
        y = gated(y.reshape(-1, y.shape[-1]), gate).view(*y.shape[:-1], y.shape[-1] // 2)
    elif gate is not None:
        first, second = y.chunk(2, dim=-1)
        y = (F.silu(first) if gate == "silu" else F.gelu(first, approximate="tanh")) * second
    return y if residual is None else y + residual


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    norm_eps: float,
    gate: str | None,
    residual: Tensor | None,
) -> None:
    optional = {"bias": bias, "norm": norm, "residual": residual}
    check_tensors("linear", x=x, weight=weight, optional=optional)
    check_numbers("linear", needed={"norm_eps": norm_eps})
    if gate not in tuple(GATES):
        raise ValueError(f"linear: gate is {gate!r}; 'silu', 'gelu_tanh' and None are supported")
    if x.dim() == 0 or x.dtype not in DTYPES or x.shape[-1] == 0:
        raise ValueError(f"linear: x is {shown(x)}; float32, bfloat16, float16 or float64 [..., K], K > 0, is needed")
    is_narrow = x.device.type == "cpu" and (x.dtype, weight.dtype) == (torch.float32, torch.bfloat16)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or (weight.dtype != x.dtype and not is_narrow):
        raise ValueError(f"linear: weight is {shown(weight)}; {x.dtype} [N, {x.shape[-1]}] is needed")
    if not weight.is_contiguous():
        raise ValueError(f"linear: weight has strides {weight.stride()}; it must be contiguous")
    rows, width = weight.shape
    if gate is not None and rows % 2:
        raise ValueError(f"linear: weight is {shown(weight)}; with a gate an even number of rows is needed")
    columns = rows if gate is None else rows // 2
    shapes = {"bias": (rows,), "norm": (width,), "residual": (*x.shape[:-1], columns)}
    for name, tensor in optional.items():
        if tensor is not None and (tuple(tensor.shape) != shapes[name] or tensor.dtype != x.dtype):
            raise ValueError(f"linear: {name} is {shown(tensor)}; {x.dtype} {list(shapes[name])} is needed")


@torch.library.register_fake("dflash_ext::linear")
def _(x, weight, bias, norm, norm_eps, norm_plus_one, gate, residual, constant_weight):
    check_operands("linear", x=x, weight=weight, bias=bias, norm=norm, residual=residual)
    return x.new_empty(*x.shape[:-1], weight.shape[0] // (2 if gate else 1))


has_no_gradient("linear")
