"""The target's own answers: a drafter has to learn what this target says, not what a corpus says."""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ..decode import Completion, decode
from ..models import Target
from .errors import DataError
from .prompts import Conversation, PromptTooLong, encode
from .response_file import resume


def regenerate(
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    path: str | Path,
    *,
    max_new_tokens: int,
    max_prompt_tokens: int = 1024,
    temperatures: Sequence[float] = (0.0,),
    batch_size: int = 32,
    seed: int = 0,
    stop_token_ids: Sequence[int] = (),
    on_progress: Callable[[int], None] | None = None,
) -> int:
    """Lets `target` answer every conversation once per entry of `temperatures`, into the JSONL at `path`.

    Each answer is written as it ends. A file that is already there is continued: the answers in it are kept,
    a line that was cut off is replaced. `on_progress(n)` is called for every n answers that are done, with
    those found in the file and those of prompts left out `len(conversations) * len(temperatures)` in all.

    Returns:
        How many conversations were left out because they have more than `max_prompt_tokens` tokens.

    Raises:
        DataError: `path` holds something else, or answers of another target, to other prompts or under other
            limits; or every prompt is too long.
    """
    progress = on_progress or (lambda _: None)
    prompts = {}
    for index, conversation in enumerate(conversations):
        try:
            prompts[index] = encode(conversation, tokenizer, max_prompt_tokens=max_prompt_tokens)
        except PromptTooLong:
            progress(len(temperatures))
    if not prompts:
        raise DataError(f"no prompt has at most {max_prompt_tokens} tokens")

    path = Path(path)
    header = {
        "target": Path(target.model.config.name_or_path).name,
        "vocab_size": target.vocab_size,
        "weights": _weights_fingerprint(target.model),
        "max_new_tokens": max_new_tokens,
        "stop_token_ids": sorted(stop_token_ids),
        "prompts": _prompts_fingerprint(prompts),
    }
    answered = resume(path, header)
    # A run that goes on draws anew: the same seeds could give a prompt the sample that it already has.
    draws = random.Random(f"{seed}/{answered.total()}")

    def write(asked: list[int], temperature: float, position: int, completion: Completion) -> None:
        index = asked[position]
        row = {"index": index, "temperature": temperature, "prompt_ids": prompts[index]}
        row["response_ids"] = completion.tokens
        file.write(json.dumps(row, separators=(",", ":")) + "\n")
        file.flush()
        progress(1)

    with path.open("a", encoding="utf-8") as file:
        for temperature in temperatures:
            asked = []
            for index in prompts:
                if answered[index, temperature]:
                    answered[index, temperature] -= 1
                    progress(1)
                else:
                    asked.append(index)
            if asked:
                decode(
                    target,
                    None,
                    [prompts[index] for index in asked],
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    stop_token_ids=tuple(stop_token_ids),
                    batch_size=batch_size,
                    seed=draws.getrandbits(20),
                    on_finish=partial(write, asked, temperature),
                )
    return len(conversations) - len(prompts)


def _prompts_fingerprint(prompts: dict[int, list[int]]) -> str:
    digest = hashlib.sha256()
    for index, ids in prompts.items():
        digest.update(array("q", [index, len(ids), *ids]).tobytes())
    return digest.hexdigest()[:16]


def _weights_fingerprint(model: torch.nn.Module) -> str:
    """Of every tensor's first numbers, in bf16, so that a checkpoint read in fp32 or bf16 is the same."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        start = parameter.detach().flatten()[:16].to(torch.bfloat16)
        digest.update(start.view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
