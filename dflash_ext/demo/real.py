"""A real target, SmolLM2-135M-Instruct, and the two drafters that ship with the package."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from rich.console import Console

from ..data import Conversation, encode
from ..models import load_pair, load_target, stop_tokens
from .compare import compare

DRAFTER = Path(__file__).parents[1] / "drafters" / "smollm2-135m-instruct"
LORA_DRAFTER = DRAFTER.with_name("smollm2-135m-instruct-lora")

# A CPU pays for every slot that is verified, and few are accepted beyond the eighth.
BLOCK_ON_CPU = 8

# The shipped drafters were trained on none of these.
PROMPTS = [
    "A baker sells 12 loaves in the morning and twice as many in the afternoon. Each loaf costs $3. "
    "How much money does the baker make in a day?",
    "Tom has 45 marbles. He gives 9 to each of his three cousins. How many marbles does he have left?",
    "def count_vowels(text: str) -> int:\n"
    '    """Return how many vowels the text has.\n    >>> count_vowels("banana")\n    3\n    """\n',
    "Explain in a few sentences why the sky is blue.",
    "Write a short letter to a neighbour, inviting them to dinner on Saturday.",
    "What are three differences between a lake and a river?",
]


def real_model(console: Console, *, count: int, max_new_tokens: int) -> None:
    """Decodes unseen prompts and prints; raises RuntimeError if speculative output is not the target's own."""
    console.rule("SmolLM2-135M-Instruct and the drafters that ship with this package")
    began = time.perf_counter()
    with console.status("reading SmolLM2"):
        # float32 also on a GPU: in bfloat16, a tie between two tokens may be decided either way.
        model, tokenizer = load_target("smollm2", dtype=torch.float32)
    prompts = {
        " ".join(text.split()): encode(Conversation.user(text), tokenizer, max_prompt_tokens=1024)
        for text in PROMPTS[:count]
    }
    for what, folder in (("a DFlash drafter", DRAFTER), ("a LoRA adapter: the target drafts for itself", LORA_DRAFTER)):
        console.print(f"\n[bold]{what}[/]")
        compare(
            console,
            *load_pair(model, folder),
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            stop_token_ids=stop_tokens(tokenizer, model),
            block_size=BLOCK_ON_CPU if model.device.type == "cpu" else None,
        )
    console.print(f"this part took {time.perf_counter() - began:.0f} s")
