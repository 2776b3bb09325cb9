"""Decodes prompts by transformers' generate, plainly and speculatively, checks that they agree, and prints speeds."""

from __future__ import annotations

from functools import partial

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..decode import Completion, Decoded, Engine
from ..eval import table
from ..eval.speed import GENERATE, PLAIN, SPECULATIVE, Timed, take_turns, transformers_generate
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
    """Prints one line per prompt, a table of the cycles and a table of the speeds. Returns the speculative run's tau.

    Args:
        prompts: token ids by the name that is printed.
        block_size: slots of a drafted block. None uses the drafter's own number.

    Raises:
        RuntimeError: the plain and the speculative output of a prompt differ.
    """
    encoded = list(prompts.values())
    options = dict(max_new_tokens=max_new_tokens, stop_token_ids=stop_token_ids)
    sizes = dict(slots=1, max_length=max(map(len, encoded)) + max_new_tokens)
    engines = {PLAIN: Engine(target, **sizes), SPECULATIVE: Engine(target, drafter, block_size=block_size, **sizes)}
    completions: dict[str, list[Completion]] = {name: [] for name in engines}

    def answer(name: str, prompt: list[int]) -> list[int]:
        request = engines[name].submit(prompt, **options)
        engines[name].run()
        completions[name].append(request.completion)
        return request.completion.tokens

    ways = {GENERATE: transformers_generate(target, **options)} | {name: partial(answer, name) for name in engines}
    take_turns(ways, encoded[:1], target.device)  # first calls take longer
    for name, engine in engines.items():
        engine.add_times(Decoded([], 0))
        completions[name].clear()
    timed = take_turns(ways, encoded, target.device)
    decoded = {name: Decoded(completions[name], engine.cycle.width) for name, engine in engines.items()}
    for name, engine in engines.items():
        engine.add_times(decoded[name])
    different = []
    for number, name in enumerate(prompts):
        completion = decoded[SPECULATIVE].completions[number]
        equal = completion.tokens == timed[PLAIN].answers[number]
        if not equal:
            different.append(name)
        excerpt = " ".join(tokenizer.decode(completion.tokens, skip_special_tokens=True).split())[:60]
        verdict = "[green]equal[/]" if equal else "[red]DIFFERENT[/]"
        console.print(f"  {verdict}  tau {completion.tau:5.2f}  {len(completion.tokens):4d} tokens  ", end="")
        console.print(f"{name[:40]!r} -> {excerpt!r}", markup=False, highlight=False, soft_wrap=True)
    console.print(table(decoded))
    console.print(speeds(timed))
    same = sum(a == b for a, b in zip(timed[GENERATE].answers, timed[PLAIN].answers, strict=True))
    console.print(f"{same} of {len(prompts)} answers of transformers' generate are these, token by token")
    ratios = [timed[SPECULATIVE].speedup(timed[name]) for name in (GENERATE, PLAIN)]
    tau = decoded[SPECULATIVE].tau
    console.print(
        f"tau {tau:.2f}; speculative decoding is {ratios[0]:.2f}x as fast as transformers' generate here, "
        f"and {ratios[1]:.2f}x as fast as plain decoding",
        soft_wrap=True,
    )
    if different:
        raise RuntimeError(f"speculative output differs from the target's own for: {', '.join(different)}")
    return tau


def speeds(timed: dict[str, Timed]) -> Table:
    """A table with the speed of each way of decoding, and its ratio to the speed of transformers' generate."""
    view = Table(
        caption="whole answers, prompts included, one prompt at a time, the three in turns\n"
        "times generate: the median over the prompts of the ratio in time a token",
        caption_justify="left",
        box=SIMPLE,
    )
    view.add_column("")
    for column in ("seconds", "tokens/s", "times generate"):
        view.add_column(column, justify="right")
    for name, each in timed.items():
        ratio = f"{each.speedup(timed[GENERATE]):.2f}"
        view.add_row(name, f"{sum(each.seconds):.1f}", f"{each.tokens_per_second:.1f}", ratio)
    return view
