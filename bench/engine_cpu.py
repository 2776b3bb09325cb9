"""SmolLM2-135M on the CPU: the engine beside transformers' generate: ``python -m bench.engine_cpu``.

All three decode the prompts of the demo greedily in float32, to the same tokens, one prompt after another in turns. A
time is that of a token, prompt and setting up included.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from bench import runner
from bench.timing import Timing
from dflash_ext.data import Conversation, encode
from dflash_ext.decode import decode
from dflash_ext.demo.real import BLOCK_ON_CPU, DRAFTER, PROMPTS
from dflash_ext.eval.speed import GENERATE, PLAIN, SPECULATIVE, take_turns, transformers_generate
from dflash_ext.models import DFlashDrafter, Target, load_drafter, load_target


def ways(target: Target, drafter: DFlashDrafter, new_tokens: int) -> dict[str, Callable[[list[int]], list[int]]]:
    """By name, what takes a prompt to its next `new_tokens` tokens."""

    def engine(prompt: list[int], draft: DFlashDrafter | None, **options) -> list[int]:
        return decode(target, draft, [prompt], max_new_tokens=new_tokens, **options).completions[0].tokens

    return {
        GENERATE: transformers_generate(target, max_new_tokens=new_tokens, stop_token_ids=()),
        PLAIN: lambda prompt: engine(prompt, None),
        SPECULATIVE: lambda prompt: engine(prompt, drafter, block_size=BLOCK_ON_CPU),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    cpu = torch.device("cpu")
    model, tokenizer = load_target("smollm2", dtype=torch.float32, device=cpu)
    drafter = load_drafter(DRAFTER, dtype=torch.float32, device=cpu)
    target = Target(model, drafter.config.target_layer_ids)
    prompts = [encode(Conversation.user(text), tokenizer, max_prompt_tokens=1024) for text in PROMPTS]
    for way in ways(target, drafter, 4).values():  # first calls take longer
        way(prompts[0])
    timed = take_turns(ways(target, drafter, given.new_tokens), prompts, cpu)
    for number, prompt in enumerate(prompts):
        if len({tuple(each.answers[number]) for each in timed.values()}) > 1:
            print(f"the outputs differ for the prompt that begins {tokenizer.decode(prompt[:40])!r}")
    rows = []
    for name, each in timed.items():
        per_token = [1e3 * s / len(answer) for s, answer in zip(each.seconds, each.answers, strict=True)]
        row = {"case": f"SmolLM2-135M, {len(prompts)} prompts", "impl": name, "pass": "token"}
        row |= Timing.of(per_token).row() | {"seconds": sum(each.seconds), "tokens_per_second": each.tokens_per_second}
        rows.append(row | {"times_generate": each.speedup(timed[GENERATE])})
        print(
            f"{name:24} {each.tokens_per_second:6.1f} tokens/s, {each.speedup(timed[GENERATE]):.2f}x generate (median)"
        )
    print(runner.write("engine_cpu", rows))


if __name__ == "__main__":
    main()
