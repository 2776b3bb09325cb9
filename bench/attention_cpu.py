"""block_attn on the CPU against PyTorch's attention with the dense mask: ``python -m bench.attention_cpu``."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import runner
from bench.timing import cpu_turns
from dflash_ext import IntervalMask, block_attn, block_attn_decode, reference


def anchors(context_len: int, count: int, block_size: int) -> IntervalMask:
    return IntervalMask.anchor_blocks(context_len, torch.randint(1, context_len, (1, count)), block_size)


def sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=q.shape[1] != k.shape[1])


def gradients(function, tensors: list[Tensor], upstream: Tensor):
    """A call that runs the backward alone."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)


def one_head(tensors: list[Tensor]) -> list[Tensor]:
    return [x[:1, :1] for x in tensors]


def largest_error(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest error of all results, each relative to the largest number of the exact result."""
    pairs = zip(got, want, strict=True)
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def measured(case: str, which: str, flops: float, functions: dict, errors: dict) -> list[dict]:
    timings = cpu_turns(functions, seconds=5.0)
    print(f"{case:44} {which:8}", *(f"{impl} {each.ms:8.2f} ms" for impl, each in timings.items()), end="  ")
    print(f"{timings['sdpa'].ms / timings['dflash_ext'].ms:.2f}x")
    return [
        {"case": case, "impl": impl, "pass": which, **each.row()}
        | {"tflops": flops / each.ms / 1e9, "max_err": errors[impl]}
        for impl, each in timings.items()
    ]


def training_case(name: str, mask: IntervalMask, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> list:
    """Times forward and backward. The errors are those of the first head, compared with float64."""
    shapes = [(1, heads, mask.q_len, dim)] + [(1, kv_heads, mask.kv_len, dim)] * 2
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    upstream = torch.randn(shapes[0]).to(dtype)
    visible = mask.to_bool()
    functions = {"dflash_ext": partial(block_attn, mask=mask), "sdpa": partial(sdpa, visible=visible)}
    head = one_head(tensors)
    exact = partial(reference.block_attn, mask=mask)
    wide = [x.double() for x in head]
    want = [exact(*wide)], gradients(exact, wide, upstream[:, :1].double())()
    case = f"{name}, h{heads}/{kv_heads} d{dim} {str(dtype).split('.')[1]}"
    flops = 4 * heads * dim * visible.sum().item()

    forwards = {impl: partial(f, *tensors) for impl, f in functions.items()}
    errors = {impl: largest_error([f(*head)], want[0]) for impl, f in functions.items()}
    rows = measured(case, "forward", flops, forwards, errors)
    backwards = {impl: gradients(f, tensors, upstream) for impl, f in functions.items()}
    errors = {impl: largest_error(gradients(f, head, upstream[:, :1])(), want[1]) for impl, f in functions.items()}
    return rows + measured(case, "backward", 2.5 * flops, backwards, errors)


def decode_case(rows: int, cached: int, heads: int, kv_heads: int, dim: int) -> list[dict]:
    mask = IntervalMask.decode(cached, rows)
    shapes = [(1, heads, rows, dim)] + [(1, kv_heads, mask.kv_len, dim)] * 2
    tensors = [torch.randn(shape) for shape in shapes]
    visible = mask.to_bool()
    functions = {"dflash_ext": partial(block_attn_decode, mask=mask), "sdpa": partial(sdpa, visible=visible)}
    want = [reference.block_attn(*(x.double() for x in tensors), mask)]
    calls = {impl: partial(f, *tensors) for impl, f in functions.items()}
    errors = {impl: largest_error([f()], want) for impl, f in calls.items()}
    flops = 4 * heads * dim * visible.sum().item()
    return measured(f"decode q{rows} ctx {cached}, h{heads}/{kv_heads} d{dim}", "forward", flops, calls, errors)


def main() -> None:
    torch.manual_seed(0)
    square = torch.randn(2048, 2048)
    gemm = cpu_turns({"gemm": lambda: square @ square})["gemm"].ms
    prefix_block, blocks = IntervalMask.prefix_block(2048, 1024), anchors(1024, 128, 16)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        rows += training_case("prefix 1024 + block 1024", prefix_block, 8, 8, 64, dtype)
        rows += training_case("S1024, 128 anchors x 16", blocks, 8, 8, 64, dtype)
    rows += training_case("S1024, 128 anchors x 16", blocks, 8, 2, 128, torch.float32)
    rows += decode_case(16, 2048, 32, 8, 128)
    rows += decode_case(1, 2048, 9, 3, 64)
    print(runner.write("attention_cpu", rows, {"matmul_2048_tflops": 2 * 2048**3 / gemm / 1e9}))


if __name__ == "__main__":
    main()
