"""The block size "auto" beside plain decoding and the drafter's own block: ``python -m bench.auto PROMPTS...``.

SmolLM2-135M-Instruct answers the first prompts of each file greedily, with the shipped drafter and with a useless one,
whose weights are random, for each number of rows and of new tokens. Nothing ends an answer early. A row of the results
is the time of all answers, prompts included: the median over several engines of each way, which take turns. "cold" is
the first time of a new engine, which captures graphs on a GPU and measures what cycles cost; "warm" is the second time
of the same engine, with the same prompts. What a process does once for all engines, such as loading kernels, is done
before.

On a CPU the time is the processor's, which other work on the machine changes little, and answers have to be equal.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch

from bench import runner
from dflash_ext.data import encode, read_conversations
from dflash_ext.decode import Engine
from dflash_ext.decode.costs import draft_widths
from dflash_ext.demo.real import DRAFTER
from dflash_ext.models import DFlashDrafter, Target, load_pair, load_target

DRAFTERS = "shipped", "useless"
WAYS = "block", "auto"  # beside plain decoding
Seconds = tuple[list[float], list[float]]  # of the first and of the second call of engines


def useless(target: Target, like: DFlashDrafter) -> DFlashDrafter:
    """A drafter of random weights."""
    torch.manual_seed(0)
    return DFlashDrafter(like.config).to(target.device, target.dtype).eval().requires_grad_(False)


def clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def run(engine: Engine, prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
    """The seconds of the answers of `new` tokens, and the answers."""
    begin = clock(engine.state.device)
    requests = [engine.submit(prompt, max_new_tokens=new) for prompt in prompts]
    engine.run()
    return clock(engine.state.device) - begin, [request.completion.tokens for request in requests]


def load_kernels(target: Target, drafter: DFlashDrafter, rows: list[int]) -> None:
    """Decodes some tokens in each shape, and with "auto"."""
    first = drafter.config.first_draft_slot
    for count in rows:
        sizes, prompts = {"slots": count, "max_length": 128}, [[3]] * count
        run(Engine(target, None, **sizes), prompts, 4)
        for width in draft_widths(drafter.config.block_size - first)[1:]:
            run(Engine(target, drafter, **sizes, block_size=width + first), prompts, 4)
        run(Engine(target, drafter, **sizes, block_size="auto"), prompts, 64)


def turns(make: dict[str, Callable[[], Engine]], prompts: list[list[int]], new: int, count: int) -> dict[str, Seconds]:
    """The cold and the warm seconds of `count` new engines of each kind."""
    for each in make.values():
        run(each(), prompts, 2)  # a process's first products of some shapes take long
    seconds: dict[str, Seconds] = {name: ([], []) for name in make}
    for turn in range(count):
        answers = {}
        for name in list(make)[:: -1 if turn % 2 else 1]:
            engine = make[name]()
            for taken in seconds[name]:
                passed, answers[name, len(taken)] = run(engine, prompts, new)
                taken.append(passed)
            is_gpu = engine.state.device.type == "cuda"
            del engine
            gc.collect()
        assert is_gpu or len(set(map(str, answers.values()))) == 1, "the answers differ"
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("prompts", nargs="+", type=Path)
    parser.add_argument("--field")
    parser.add_argument("--drafters", nargs="*", default=list(DRAFTERS), choices=DRAFTERS)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS)
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 8, 32])
    parser.add_argument("--new-tokens", nargs="*", type=int, default=[96, 384])
    parser.add_argument("--engines", type=int, default=3, help="new engines of each way")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, tokenizer = load_target("smollm2")
    target, shipped = load_pair(model, DRAFTER)
    drafters = {"shipped": shipped, "useless": useless(target, shipped)}
    sets = {
        path.stem: [
            encode(each, tokenizer, max_prompt_tokens=1024)
            for each in read_conversations(path, field=given.field, limit=max(given.rows))
        ]
        for path in given.prompts
    }
    if target.device.type == "cuda":
        load_kernels(target, shipped, given.rows)
    name, rows = f"auto_{runner.gpu_name() if target.device.type == 'cuda' else 'cpu'}", []
    for new, count, (stem, asked) in product(given.new_tokens, given.rows, sets.items()):
        sizes = {"slots": count, "max_length": max(map(len, asked[:count])) + new}
        make = {"plain": partial(Engine, target, None, **sizes)}
        for way, which in product(given.ways, given.drafters):
            block_size = "auto" if way == "auto" else None
            drafted = partial(Engine, target, drafters[which], **sizes, block_size=block_size)
            make[f"{way}, {which} drafter"] = drafted
        seconds = turns(make, asked[:count], new, given.engines)
        for impl, each in seconds.items():
            for at, state in enumerate(("cold", "warm")):
                taken, plain = median(each[at]), median(seconds["plain"][at])
                shape = f"{count} row{'s' * (count > 1)}, {new} tokens"
                row = {"case": f"SmolLM2-135M, {stem}, {shape}", "impl": impl, "pass": state}
                row |= {"ms": 1e3 * taken, "tokens_per_second": count * new / taken, "over_plain": taken / plain}
                rows.append(row)
                print("{case:48} {impl:22} {pass}  {ms:8.1f} ms, {over_plain:.3f} of plain".format(**row), flush=True)
        runner.write(name, rows)
    print(runner.RESULTS / f"{name}.json")


if __name__ == "__main__":
    main()
