"""Lossless speculative decoding with a block-diffusion drafter. Without a drafter, decoding is plain.

In a cycle, the drafter fills a block after the anchor in one pass, and the target verifies the whole block in one pass.
The longest accepted prefix and one token of the target's own (the bonus token) are committed, and the bonus token is
the next anchor. Greedy output is the target's own greedy output. At temperatures above 0, rejection sampling keeps the
target's distribution (Leviathan et al., arXiv 2211.17192). The rows of a batch accept different lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from os import PathLike

import torch
from torch import Tensor

from ..checks import shown
from ..models import Target
from .arguments import AUTO, check_prompt, integer, per_prompt, positive, seed_of, stop_ids, stop_texts
from .completion import Completion, Decoded
from .engine import Engine
from .kinds import Drafter


@torch.no_grad()
def decode(
    target: Target,
    drafter: Drafter | str | PathLike | None,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float | Sequence[float] | Tensor = 0.0,
    top_k: int | Sequence[int | None] | Tensor | None = None,
    top_p: float | Sequence[float | None] | Tensor | None = None,
    min_p: float | Sequence[float | None] | Tensor | None = None,
    repetition_penalty: float | Sequence[float | None] | Tensor | None = None,
    presence_penalty: float | Sequence[float | None] | Tensor | None = None,
    frequency_penalty: float | Sequence[float | None] | Tensor | None = None,
    logit_bias: Mapping[int, float] | Sequence[Mapping[int, float] | None] | None = None,
    stop_token_ids: int | Iterable[int] | None = None,
    stop_strings: str | Iterable[str] | None = None,
    tokenizer=None,
    block_size: int | str | None = None,
    costs: Mapping[int, Mapping[int, float]] | None = None,
    denoising_steps: int = 1,
    greedy_draft: bool = False,
    forwards: int | None = None,
    groups: int | None = None,
    batch_size: int = 32,
    seed: int | Sequence[int] = 0,
    exact: bool = False,
    on_tokens: Callable[[int, list[int]], None] | None = None,
    on_text: Callable[[int, str], None] | None = None,
    on_finish: Callable[[int, Completion], None] | None = None,
) -> Decoded:
    """Completes prompts with the target's own output, drafted by `drafter`.

    Args:
        target: the verifier; with a DFlash drafter, tapped at the drafter's `target_layer_ids`.
        drafter: one of either kind, or its folder. None decodes plainly, one token per pass.
        prompts: token ids, at least one per prompt.
        max_new_tokens: the length at which an answer ends if nothing ended it before.
        temperature: 0 is greedy.
        top_k, top_p, min_p: filters of the target's and of the drafter's distribution, as in `dflash_ext.sample`. None
            is off.
        repetition_penalty, presence_penalty, frequency_penalty: change the logits of tokens that the row has, as in
            `dflash_ext.sample`. None is off. The temperature, each filter and each penalty are one number for all
            prompts, or a sequence with one per prompt.
        logit_bias: numbers that are added to the logits of some tokens, by token id; -inf bans a token. It is one dict
            for all prompts, or a sequence with one per prompt.
        stop_token_ids: one or several tokens that end a row. They are kept in its output.
        stop_strings: one or several strings that end a row, wherever they are in its text. The text ends before them,
            and the tokens before the one with which they begin (`Completion`).
        tokenizer: a tokenizer of transformers, from which completions get their text. Stop strings need it.
        block_size: slots of a drafted block, anchor included. The default is the drafter's own number, which is the
            largest of a DFlash drafter; a LoRA drafter and a denoiser take up to 64.
            "auto" chooses before each cycle, as in `Engine`.
        costs: as in `Engine`: with "auto", the `costs` of an earlier call, so that a seed repeats its answers.
        denoising_steps, greedy_draft, forwards, groups: as in `Engine`.
        batch_size: the number of rows that are decoded at a time. Prompts of similar length share a batch.
        seed: the seed of all draws, or one for each prompt, below 2**62. A prompt's draws do not depend on the other
            prompts of the batch.
        exact: as in `Engine`: output is then equal to plain greedy decoding to the bit.
        on_tokens, on_text: called with a prompt's index and its newly committed tokens, or the text that they add,
            cycle by cycle. What may yet belong to a stop string is held back.
        on_finish: called with a prompt's index and its completion as soon as it ends, unless it failed.

    A fault (what a callback raises, or memory that does not suffice for one prompt alone) ends its prompt. It is raised
    when all other prompts have ended.

    Raises:
        ValueError: a prompt is empty, too long for the target or outside its vocabulary; a number is out of range; a
            sequence has not one number per prompt; the drafter cannot fill the block, or was made for another target.
        TypeError: a prompt or stop token is no token id, a number has another type, or `target` is no Target.
    """
    if not isinstance(target, Target):
        raise TypeError(f"decode: target is {shown(target)}; a Target is needed, such as Target(model)")
    prompts = [check_prompt(target, prompt, index) for index, prompt in enumerate(prompts)]
    if not prompts:
        raise ValueError("there is no prompt to decode")
    max_new_tokens = positive("max_new_tokens", max_new_tokens, "token is decoded")
    batch_size, seeds = positive("batch_size", batch_size, "row is decoded at a time"), _seeds(seed, len(prompts))
    if block_size is not None and block_size != AUTO:
        block_size = integer("block_size", block_size)
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
    }
    options = {name: per_prompt(name, given, len(prompts)) for name, given in options.items()}
    biases = [logit_bias] * len(prompts) if isinstance(logit_bias, Mapping | None) else list(logit_bias)
    if len(biases) != len(prompts):
        raise ValueError(f"decode: logit_bias has {len(biases)} entries; one dict, or one for each prompt, is needed")
    options["logit_bias"] = biases
    stops = {"stop_token_ids": stop_ids(stop_token_ids), "stop_strings": stop_texts(stop_strings, tokenizer)}
    longest = max(map(len, prompts))
    target.check_length(longest + max_new_tokens, f"a prompt of {longest} tokens and {max_new_tokens} new ones")
    engine = Engine(
        target,
        drafter,
        slots=min(batch_size, len(prompts)),
        max_length=longest + max_new_tokens,
        block_size=block_size,
        costs=costs,
        denoising_steps=denoising_steps,
        greedy_draft=greedy_draft,
        forwards=forwards,
        groups=groups,
        exact=exact,
        tokenizer=tokenizer,
    )

    def submit(index: int) -> Completion:
        request = engine.submit(
            prompts[index],
            max_new_tokens=max_new_tokens,
            **{name: each[index] for name, each in options.items()},
            **stops,
            seed=seeds[index],
            on_tokens=on_tokens and partial(on_tokens, index),
            on_text=on_text and partial(on_text, index),
            on_finish=on_finish and (lambda completion: completion.error is None and on_finish(index, completion)),
        )
        return request.completion

    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    completions = {index: submit(index) for index in by_length}
    decoded = Decoded([completions[index] for index in range(len(prompts))], engine.cycle.width)
    engine.run()
    engine.add_times(decoded)
    return decoded


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """A seed of 62 bits for each prompt. Positions are added to it."""
    if not isinstance(seed, Sequence):
        seed = seed_of(seed)
        return [(seed * 0x9E3779B97F4A7C15 + (index << 24)) % 2**62 for index in range(count)]
    if len(seed) != count:
        raise ValueError(f"decode: seed has {len(seed)} entries; one number, or one for each prompt, is needed")
    return [seed_of(each) for each in seed]
