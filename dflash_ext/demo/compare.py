"""Decodes each prompt plainly and speculatively, checks that both outputs are equal, and prints both speeds."""

from __future__ import annotations

from rich.console import Console

from ..decode import decode
from ..eval import table
from ..models import DFlashDrafter, Target


def compare(
    console: Console,
    target: Target,
    drafter: DFlashDrafter,
    tokenizer,
    prompts: dict[str, list[int]],
    *,
    max_new_tokens: int,
    stop_token_ids: tuple[int, ...],
    block_size: int | None = None,
) -> float:
    """Prints one line per prompt and a table of both runs. Returns the speculative run's tau.

    Args:
        prompts: token ids by the name that is printed.
        block_size: slots of a drafted block. None uses the drafter's own number.

    Raises:
        RuntimeError: the two greedy outputs of a prompt differ.
    """
    encoded = list(prompts.values())
    options = dict(max_new_tokens=max_new_tokens, stop_token_ids=stop_token_ids, batch_size=1)
    plain = decode(target, None, encoded, **options)
    speculative = decode(target, drafter, encoded, block_size=block_size, **options)
    different = []
    for name, one, other in zip(prompts, plain.completions, speculative.completions, strict=True):
        equal = one.tokens == other.tokens
        if not equal:
            different.append(name)
        excerpt = " ".join(tokenizer.decode(other.tokens, skip_special_tokens=True).split())[:60]
        verdict = "[green]equal[/]" if equal else "[red]DIFFERENT[/]"
        console.print(f"  {verdict}  tau {other.tau:5.2f}  {len(other.tokens):4d} tokens  ", end="")
        console.print(f"{name[:40]!r} -> {excerpt!r}", markup=False, highlight=False, soft_wrap=True)
    console.print(table({"plain": plain, "speculative": speculative}))
    ratio = speculative.tokens_per_second / plain.tokens_per_second
    console.print(f"tau {speculative.tau:.2f}; speculative decoding is {ratio:.2f}x as fast as plain decoding here")
    if different:
        raise RuntimeError(f"speculative output differs from the target's own for: {', '.join(different)}")
    return speculative.tau
