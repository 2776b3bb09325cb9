"""Other implementations of decoding, run as their own users run them.

Each function decodes one prompt a row and returns the time of a step or cycle and the tokens of the first row. Prefill
is left out: a run of one token is subtracted, or the peer reports the time of its loop.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dflash_ext.models import DFlashDrafter, Target

NEW = 33  # tokens of a timed run


def milliseconds(call: Callable[[], object]) -> tuple[float, object]:
    """The time of a call on the GPU, and its result."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    result = call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end), result


def _row(samples: list[float]) -> dict:
    return {"ms": statistics.median(samples), "quartiles_ms": [min(samples), max(samples)]}


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Within it no module has the hooks of our taps, at which torch.compile would cut the step into parts."""
    hooks = {module: dict(module._forward_hooks) for module in model.modules()}
    for module in hooks:
        module._forward_hooks.clear()
    try:
        yield
    finally:
        for module, own in hooks.items():
            module._forward_hooks.update(own)


def static_cache(target: Target, prompts: Tensor, *, compiled: bool) -> tuple[dict, list[int]]:
    """transformers' `generate` with a static cache; compiled, its step is a CUDA graph of torch.compile."""
    options = {"do_sample": False, "cache_implementation": "static", "disable_compile": not compiled, "pad_token_id": 0}
    mask = torch.ones_like(prompts)

    def generate(count: int) -> Tensor:
        lengths = {"min_new_tokens": count, "max_new_tokens": count}
        return target.model.generate(prompts, attention_mask=mask, **options, **lengths)

    samples = []
    # A step is compiled once for each layer, whose number is a constant of the code.
    with _without_hooks(target.model), torch._dynamo.config.patch(recompile_limit=2 * target.num_layers):
        for _ in range(2):
            generate(NEW)
        for _ in range(3):
            whole, tokens = milliseconds(lambda: generate(NEW))
            samples.append((whole - milliseconds(lambda: generate(1))[0]) / (NEW - 1))
    return _row(samples), tokens[0, prompts.shape[1] :].tolist()


def transformers_loop(target: Target, drafter: DFlashDrafter, prompts: Tensor) -> tuple[dict, list[int]]:
    """transformers' own DFlash loop, which takes one row and a dynamic cache."""
    passes = 0

    def count(*_) -> None:
        nonlocal passes
        passes += 1

    def generate(new: int) -> tuple[float, int, Tensor]:
        nonlocal passes
        passes = 0
        options = {"do_sample": False, "pad_token_id": 0, "min_new_tokens": new, "max_new_tokens": new}
        options |= {
            "assistant_model": drafter,
            "speculation_type": "dflash",
            "attention_mask": torch.ones_like(prompts),
        }
        ms, tokens = milliseconds(lambda: target.model.generate(prompts, **options))
        return ms, passes, tokens

    hook = target.model.register_forward_pre_hook(count)
    try:
        generate(NEW)
        samples = []
        for _ in range(3):
            (whole, most, tokens), (first, fewest, _) = generate(NEW), generate(2)
            samples.append((whole - first) / (most - fewest))
    finally:
        hook.remove()
    return _row(samples), tokens[0, prompts.shape[1] :].tolist()


def has_zlab() -> bool:
    """Whether z-lab's package `dflash` is installed."""
    return importlib.util.find_spec("dflash") is not None


def zlab_loop(target: Target, drafter: DFlashDrafter, prompts: Tensor, *, block: int) -> tuple[dict, list[int]]:
    """The loop of z-lab's package `dflash`, with its own drafter class over our drafter's weights.

    block: the slots of a block; 1 decodes plainly.
    """
    from dflash.model import DFlashDraftModel, dflash_generate

    with torch.device(target.device):
        theirs = DFlashDraftModel(drafter.config).to(drafter.dtype).eval()
    theirs.load_state_dict(drafter.state_dict())

    def generate():
        return dflash_generate(theirs, target.model, prompts, NEW, None, block_size=block, return_stats=True)

    generate()
    samples = []
    for _ in range(3):
        run = generate()
        seconds = run.time_per_output_token * run.num_output_tokens
        samples.append(1e3 * seconds / len(run.acceptance_lengths))
    return _row(samples), run.output_ids[0, prompts.shape[1] :].tolist()
