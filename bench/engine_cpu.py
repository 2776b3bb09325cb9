"""SmolLM2-135M on the CPU: the engine beside transformers' generate: ``python -m bench.engine_cpu``.

All three decode the prompts of the demo greedily in float32, to the same tokens. A time is that of a token, prefill
included.
"""

from __future__ import annotations

import argparse
import time

import torch

from bench import runner
from bench.timing import Timing
from dflash_ext.data import Conversation, encode
from dflash_ext.decode import decode
from dflash_ext.demo.real import BLOCK_ON_CPU, DRAFTER, PROMPTS
from dflash_ext.models import DFlashDrafter, Target, load_drafter, load_target

GENERATE, PLAIN, SPECULATIVE = "transformers generate", "dflash_ext plain", "dflash_ext speculative"


def decoders(target: Target, drafter: DFlashDrafter, new_tokens: int) -> dict:
    """By name, what takes a prompt to its next `new_tokens` tokens."""

    def generate(prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        return target.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()

    def engine(prompt: list[int], draft: DFlashDrafter | None, **options) -> list[int]:
        return decode(target, draft, [prompt], max_new_tokens=new_tokens, **options).completions[0].tokens

    return {
        GENERATE: generate,
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
    calls = decoders(target, drafter, given.new_tokens)
    for call in calls.values():
        call(prompts[0])
    samples = {name: [] for name in calls}
    for prompt in prompts:
        tokens = {}
        for name, call in calls.items():
            start = time.perf_counter()
            tokens[name] = call(prompt)
            samples[name].append(1e3 * (time.perf_counter() - start) / given.new_tokens)
        if len(set(map(tuple, tokens.values()))) > 1:
            print(f"the outputs differ for the prompt that begins {tokenizer.decode(prompt[:40])!r}")
    rows = []
    for name, each in samples.items():
        total = sum(each) * given.new_tokens / 1e3
        row = {"case": f"SmolLM2-135M, {len(prompts)} prompts", "impl": name, "pass": "token"} | Timing.of(each).row()
        row |= {"seconds": total, "tokens_per_second": len(prompts) * given.new_tokens / total}
        rows.append(row)
        speed = sum(samples[GENERATE]) / sum(each)
        print(f"{name:24} {row['tokens_per_second']:6.1f} tokens/s, {speed:.2f}x generate")
    print(runner.write("engine_cpu", rows))


if __name__ == "__main__":
    main()
