"""sample and verify on the CPU against plain PyTorch: ``python -m bench.sampling_cpu``."""

import torch
from torch import Tensor

from bench import runner
from bench.timing import cpu_turns
from dflash_ext import reference, sample, verify

SEED = torch.tensor([1])


def torch_sample(logits: Tensor) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(logits, dim=-1)
    probs = logp.exp()
    return torch.multinomial(probs, 1)[:, 0], -(probs * logp).sum(-1)


def torch_top_p(logits: Tensor, top_p: float) -> Tensor:
    probs, order = torch.softmax(logits, dim=-1).sort(dim=-1, descending=True)
    probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0.0)
    return order.gather(-1, torch.multinomial(probs, 1))[:, 0]


def measured(case: str, functions: dict, error: float) -> list[dict]:
    """Times the functions, the first of which is this package's, and returns rows. `error` is that of the first."""
    timings = cpu_turns(functions)
    ours, *others = timings
    ms = timings[ours].ms
    for other in others:
        print(f"{case:44} {ms:9.3f} ms   {other}: {timings[other].ms:9.3f} ms   {timings[other].ms / ms:6.1f}x")
    return [
        {"case": case, "impl": impl, "pass": "forward", **timing.row()} | ({"max_err": error} if impl == ours else {})
        for impl, timing in timings.items()
    ]


def entropy_case(rows: int, vocab: int, dtype: torch.dtype) -> list[dict]:
    logits = (3 * torch.randn(rows, vocab)).to(dtype)
    exact = torch.special.entr(logits.double().softmax(-1)).sum(-1)
    error = (sample(logits, SEED).entropy - exact).abs().max().item()
    functions = {"dflash_ext": lambda: sample(logits, SEED), "torch": lambda: torch_sample(logits)}
    return measured(f"draw and entropy, N{rows} V{vocab} {str(dtype).split('.')[1]}", functions, error)


def filter_case(rows: int, vocab: int, spread: float, **filters: float) -> list[dict]:
    """The peer of top-p is PyTorch code that sorts. spread is the logits' standard deviation."""
    logits = spread * torch.randn(rows, vocab)
    kept = reference.filter_logits(logits.double(), **filters)
    entropy = sample(logits, SEED, **filters, return_filtered_entropy=True)[1]
    error = (entropy - torch.special.entr(kept.softmax(-1)).sum(-1)).abs().max().item()
    functions = {"dflash_ext": lambda: sample(logits, SEED, **filters)}
    if "top_p" in filters:
        functions["torch sort"] = lambda: torch_top_p(logits, filters["top_p"])
    else:
        functions["reference"] = lambda: reference.sample(logits, torch.rand(rows), **filters)
    names = ", ".join(f"{name} {value}" for name, value in filters.items())
    return measured(f"{names}, N{rows} V{vocab} spread {spread}", functions, error)


def verify_case(drafted: int, vocab: int, temperature: float) -> list[dict]:
    """One row whose draft is close to the target; the error is whether the outcomes differ."""
    target = 3 * torch.randn(1, drafted + 1, vocab)
    drafter = target[:, :-1] + 0.3 * torch.randn(1, drafted, vocab)
    drawn = sample(drafter[0], SEED, temperature=temperature)
    given = {"temperature": temperature, "uniforms": torch.rand(1, drafted + 1, dtype=torch.float64)}
    if temperature:
        described = {"draft_pivot": drawn.pivot[None], "draft_normaliser": drawn.normaliser[None]}
        given |= {"draft_logits": drafter} | described
    draft = drawn.token[None]
    got, want = verify(draft, target, **given), reference.verify(draft, target, **given)
    functions = {
        "dflash_ext": lambda: verify(draft, target, **given),
        "reference": lambda: reference.verify(draft, target, **given),
    }
    case = f"verify, B1 K{drafted} V{vocab} T{temperature:g}, {got.accepted.item()} accepted"
    return measured(case, functions, float(got != want))


def main() -> None:
    torch.manual_seed(0)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        rows += entropy_case(64, 49152, dtype)
    rows += entropy_case(15, 151936, torch.float32)
    for spread in (1.0, 3.0):
        rows += filter_case(16, 49152, spread, top_p=0.9)
    rows += filter_case(16, 49152, 3.0, top_k=50)
    for temperature in (0.0, 1.0):
        rows += verify_case(15, 49152, temperature)
    print(runner.write("sampling_cpu", rows))


if __name__ == "__main__":
    main()
