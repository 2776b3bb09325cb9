"""How many tokens a second the engine answers a queue of prompts with, by the number of slots:
``python -m bench.answers [FILE]``.

The target has the shapes of SmolLM2-135M and random weights. Prompts have 30 to 400 tokens and answers 32 to 256, both
drawn, so that slots become free one by one, as with real answers. Each number of slots is measured also with an engine
that admits a request as soon as a slot is free.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict

import torch

from bench.engine_models import SHAPES, pair
from dflash_ext.decode import Engine
from dflash_ext.models import Target

CASES = ((32, 256), (256, 1024), (1024, 2560))  # slots and requests
PROMPT, ANSWER = (30, 400), (32, 256)  # the range of tokens


def requests(count: int, vocabulary: int) -> list[tuple[list[int], int]]:
    """Prompts, and the tokens of their answers; the shortest prompts first, as `decode` submits them."""
    draw = torch.Generator().manual_seed(0)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=draw))

    prompts = [torch.randint(3, vocabulary, (number(*PROMPT),), generator=draw).tolist() for _ in range(count)]
    return sorted(((prompt, number(*ANSWER)) for prompt in prompts), key=lambda request: len(request[0]))


def measure(target: Target, slots: int, count: int, *, at_once: bool) -> dict:
    """The speed of one queue, and the seconds that the host spends in each part of a step."""
    engine = Engine(target, slots=slots, max_length=PROMPT[1] + ANSWER[1])
    if at_once:
        engine.least = 1
    asked = requests(count + 1, target.vocab_size)
    engine.submit(asked.pop(0)[0], max_new_tokens=3)
    engine.run()  # captures a graph
    seconds: dict[str, float] = defaultdict(float)

    def clocked(name: str) -> None:
        whole = getattr(engine, name)

        def call(*args):
            start = time.perf_counter()
            result = whole(*args)
            seconds[name.strip("_")] += time.perf_counter() - start
            return result

        setattr(engine, name, call)

    for name in ("_prefill", "_cycle", "_read"):
        clocked(name)
    for prompt, tokens in asked:
        engine.submit(prompt, max_new_tokens=tokens)
    start = time.perf_counter()
    engine.run()  # ends when the last token has been read
    total = time.perf_counter() - start
    made = sum(tokens for _, tokens in asked)
    return {"slots": slots, "requests": count, "at_once": at_once, "tokens_per_second": made / total, "host": seconds}


def main(output: str | None = None) -> None:
    target, _ = pair(SHAPES["smollm2-135m"])
    target = Target(target.model)
    rows = []
    for slots, count in CASES:
        for at_once in (False, True):
            rows.append(row := measure(target, slots, count, at_once=at_once))
            parts = ", ".join(f"{name} {spent:.2f} s" for name, spent in row["host"].items())
            how = "admitted at once" if at_once else "admitted together"
            print(f"{slots} slots, {how}: {row['tokens_per_second']:.0f} tokens/s; host: {parts}", flush=True)
            if output:
                facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
                with open(output, "w", encoding="utf-8") as file:
                    file.write(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
