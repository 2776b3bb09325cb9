"""sample, verify, reveal and soft_embedding on the GPU against PyTorch, torch.compile, a sorted top-p and FlashInfer,
where it is installed: ``python -m bench.sampling``.
"""

import itertools
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor

from bench import runner
from bench.sampling_cpu import torch_sample, torch_top_p
from bench.timing import gpu_turns, graph_turns
from dflash_ext import reference, reveal, sample, soft_embedding, verify

ROTATED_BYTES = 110 << 20  # more than the L2 cache holds


def rotating(make: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Returns a function that hands out one of several inputs after another, which together do not fit in a cache."""
    inputs = [make()]
    while sum(x.numel() * x.element_size() for x in inputs) < ROTATED_BYTES:
        inputs.append(make())
    cycle = itertools.cycle(inputs)
    return lambda: next(cycle)


def flashinfer() -> ModuleType | None:
    """FlashInfer's sampling. It compiles its kernels when it is first called, for which it needs nvcc and cuRAND."""
    try:
        from flashinfer import sampling
    except ImportError:
        return None
    return sampling


FIXED = {"seed": 1, "offset": 0}  # by default FlashInfer takes them from the generator, which a capture forbids


def flashinfer_functions(draw: Callable[[], Tensor], filters: dict[str, float]) -> dict[str, Callable]:
    """FlashInfer's own sampling from logits, which draws without measuring the distribution."""
    sampling = flashinfer()
    if sampling is None:
        return {}
    if not filters:
        return {"flashinfer": lambda: sampling.sampling_from_logits(draw(), **FIXED)}
    by_filter = {"top_p": sampling.top_p_sampling_from_probs, "top_k": sampling.top_k_sampling_from_probs}
    (name, value), *others = filters.items()
    if others or name not in by_filter:
        return {}
    return {"flashinfer": lambda: by_filter[name](torch.softmax(draw(), -1, dtype=torch.float32), value, **FIXED)}


def rows_of(case: str, timings: dict, bytes_read: int | None = None) -> list[dict]:
    ours, *others = timings
    ms = timings[ours].ms
    rate = f" {bytes_read / ms / 1e9:5.2f} TB/s" if bytes_read else ""
    print(f"{case:64} {1e3 * ms:9.1f} us{rate}", *(f"{o} {timings[o].ms / ms:.1f}x" for o in others), flush=True)
    return [
        {"case": case, "impl": impl, "pass": "forward", **timing.row()}
        | ({"gbs": bytes_read / timing.ms / 1e6} if bytes_read else {})
        for impl, timing in timings.items()
    ]


def sample_case(rows: int, vocab: int, spread: float, peers: bool = True, **filters: float) -> list[dict]:
    """spread: the logits' standard deviation."""
    seed = torch.tensor([1], device="cuda")
    draw = rotating(lambda: spread * torch.randn(rows, vocab, device="cuda", dtype=torch.bfloat16))
    functions = {"dflash_ext": lambda: sample(draw(), seed, **filters)}
    if peers and not filters:
        compiled = torch.compile(torch_sample)
        functions |= {"torch": lambda: torch_sample(draw()), "torch.compile": lambda: compiled(draw())}
    if peers and set(filters) == {"top_p"}:
        functions["torch sort"] = lambda: torch_top_p(draw(), filters["top_p"])
    if peers:
        functions |= flashinfer_functions(draw, filters)
    names = "".join(f", {name} {value}" for name, value in filters.items())
    return rows_of(f"draw, N{rows} V{vocab} spread {spread:g}{names}", gpu_turns(functions), 2 * rows * vocab)


def penalised_case(rows: int, vocab: int) -> list[dict]:
    """Penalties of rows that have 500 tokens each, beside the same penalties in PyTorch followed by a plain draw."""
    seed = torch.tensor([1], device="cuda")
    draw = rotating(lambda: 3 * torch.randn(rows, vocab, device="cuda", dtype=torch.bfloat16))
    counts = torch.zeros(rows, vocab, dtype=torch.int32, device="cuda")
    counts[:, :500] = 1
    given = {"repetition_penalty": 1.1, "presence_penalty": 0.5, "token_counts": counts}
    functions = {
        "dflash_ext": lambda: sample(draw(), seed, **given),
        "torch penalties": lambda: sample(reference.penalised_logits(draw(), **given), seed),
    }
    return rows_of(f"draw, N{rows} V{vocab}, penalties", gpu_turns(functions), 6 * rows * vocab)


def soft_embedding_case(rows: int, vocab: int, width: int) -> list[dict]:
    """A soft cap and a temperature included. The peer is the product alone, of probabilities that exist already."""
    logits = 3 * torch.randn(rows, vocab, device="cuda", dtype=torch.bfloat16)
    embedding = torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16)
    probs = torch.softmax(logits, dim=-1)
    temperature = torch.full((rows,), 0.8, device="cuda")
    functions = {
        "dflash_ext": lambda: soft_embedding(logits, embedding, temperature=temperature, softcap=30.0),
        "GEMM alone": lambda: probs @ embedding,
    }
    return rows_of(f"soft_embedding, L{rows} V{vocab} H{width}", gpu_turns(functions))


def verify_case(drafted: int, vocab: int, form: str, peers: bool = False, **options: float) -> list[dict]:
    """One row whose draft is close to the target. FlashInfer is given the draft's probabilities."""
    seed = torch.tensor([1], device="cuda")
    inputs = []
    for i in range(1 + ROTATED_BYTES // (4 * drafted * vocab)):
        target = 3 * torch.randn(1, drafted + 1, vocab, device="cuda", dtype=torch.bfloat16)
        drafter = target[:, :-1] + 0.3 * torch.randn_like(target[:, :-1])
        drawn = sample(drafter[0], i, **options)
        given = {} if form == "point mass" else {"draft_logits": drafter}
        if form == "described":
            given |= {"draft_pivot": drawn.pivot[None], "draft_normaliser": drawn.normaliser[None]}
        inputs.append((drawn.token[None], target, given))
    cycle = itertools.cycle(inputs)

    def ours() -> None:
        draft, target, given = next(cycle)
        verify(draft, target, seed=seed, **given, **options)

    def plain() -> None:
        draft, target, given = next(cycle)
        uniforms = torch.rand(1, drafted + 1, device="cuda")
        reference.verify(draft, target, uniforms=uniforms, **given, **options)

    functions = {"dflash_ext": ours} | ({"torch": plain} if peers else {})
    sampling = flashinfer()
    if peers and sampling and options == {"temperature": 1.0}:
        draft_probs = [torch.softmax(given["draft_logits"], -1, dtype=torch.float32) for _, _, given in inputs]
        with_probs = itertools.cycle(zip(inputs, draft_probs, strict=True))

        def chain() -> None:
            (draft, target, _), probs = next(with_probs)
            target_probs = torch.softmax(target, -1, dtype=torch.float32)
            sampling.chain_speculative_sampling(probs, draft.int(), target_probs, **FIXED)

        functions["flashinfer"] = chain
    names = "".join(f", {name} {value:g}" for name, value in options.items())
    return rows_of(f"verify, B1 K{drafted} V{vocab}{names}, {form}", graph_turns(functions))


def reveal_case(batch: int, length: int) -> list[dict]:
    entropy = torch.rand(batch, length, device="cuda")
    masked = torch.rand(batch, length, device="cuda") < 0.7
    functions = {
        "dflash_ext": lambda: reveal(-entropy, masked, entropy=entropy, entropy_bound=0.5),
        "torch": lambda: reference.reveal(-entropy, masked, entropy=entropy, entropy_bound=0.5),
    }
    return rows_of(f"reveal, B{batch} L{length}, entropy-bounded", graph_turns(functions))


def cases() -> Iterator[list[dict]]:
    for form in ("described", "logits", "point mass"):
        yield verify_case(15, 151_936, form, peers=form == "point mass", temperature=0.0)
        for filters in ({}, {"top_p": 0.9}, {"top_k": 50}):
            yield verify_case(15, 151_936, form, peers=form == "described" and not filters, temperature=1.0, **filters)
    for count, vocab in ((1, 151_936), (15, 151_936), (256, 262_144), (4096, 151_936)):
        yield sample_case(count, vocab, 3.0)
        for spread in (1.0, 3.0):
            yield sample_case(count, vocab, spread, top_p=0.9)
        yield sample_case(count, vocab, 3.0, top_k=50)
        yield sample_case(count, vocab, 3.0, peers=False, min_p=0.05)
    for count in (15, 1024):
        yield penalised_case(count, 151_936)
    yield soft_embedding_case(256, 262_144, 2816)
    for batch, length in ((1, 256), (32, 1024)):
        yield reveal_case(batch, length)


def main() -> None:
    torch.manual_seed(0)
    name, ceilings, rows = f"sampling_{runner.gpu_name()}", runner.gpu_ceilings(), []
    for case in cases():
        rows += case
        path = runner.write(name, rows, ceilings)
    print(path)


if __name__ == "__main__":
    main()
