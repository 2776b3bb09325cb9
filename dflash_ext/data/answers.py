"""Lets the target answer prompts, because a drafter must learn what this target says and not what a corpus says."""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..decode import Completion, decode
from ..models import Target
from .answer_file import resume


def answer_prompts(
    target: Target,
    prompts: Mapping[int, Sequence[int]],
    path: str | Path,
    *,
    max_new_tokens: int,
    temperatures: Sequence[float] = (0.0,),
    batch_size: int = 32,
    seed: int = 0,
    stop_token_ids: Sequence[int] = (),
    chat_template_args: Mapping[str, Any] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Lets `target` answer every prompt once per entry of `temperatures`, and writes the answers to the JSONL `path`.

    Each answer is written as soon as it ends. An existing file is continued: its answers are kept, and a last line that
    was cut off is replaced.

    Args:
        prompts: token ids by the index that the answers carry, as `encode_all` returns them.
        max_new_tokens: the largest number of tokens in an answer.
        temperatures: 0 is greedy.
        batch_size: the number of prompts that are answered at a time.
        seed: the seed of sampled answers.
        stop_token_ids: tokens that end an answer.
        chat_template_args: the variables that the prompts were encoded with. They are kept in the file's header.
        on_progress: called with the number of answers that have been added. Answers that are already in the file count,
            so that the numbers add up to `len(prompts) * len(temperatures)`.

    Raises:
        DataError: `path` holds something else, or answers of another target, to other prompts or under other limits.
    """
    progress = on_progress or (lambda _: None)
    path = Path(path)
    header = {
        "target": Path(target.model.config.name_or_path).name,
        "vocab_size": target.vocab_size,
        "weights": _weights_fingerprint(target.model),
        "max_new_tokens": max_new_tokens,
        "stop_token_ids": sorted(stop_token_ids),
        "chat_template_args": dict(chat_template_args) if chat_template_args else None,
        "prompts": _prompts_fingerprint(prompts),
    }
    answered = resume(path, header)
    # A continued run uses other seeds: the same seeds could give a prompt the sample that it already has.
    draws = random.Random(f"{seed}/{answered.total()}")

    def write(asked: list[int], temperature: float, position: int, completion: Completion) -> None:
        index = asked[position]
        row = {"index": index, "temperature": temperature, "prompt_ids": list(prompts[index])}
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


def _prompts_fingerprint(prompts: Mapping[int, Sequence[int]]) -> str:
    digest = hashlib.sha256()
    for index, ids in prompts.items():
        digest.update(array("q", [index, len(ids), *ids]).tobytes())
    return digest.hexdigest()[:16]


def _weights_fingerprint(model: torch.nn.Module) -> str:
    """A hash of the first numbers of every tensor, in bf16, so that the dtype of loading does not matter."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        start = parameter.detach().flatten()[:16].to(torch.bfloat16)
        digest.update(start.view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
