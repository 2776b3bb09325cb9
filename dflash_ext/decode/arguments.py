"""Checks the arguments of `decode` and brings them into one form, before the target computes anything."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real

import numpy as np
from torch import Tensor

from ..checks import is_int, shown
from ..models import Denoiser, DFlashDrafter, Target
from ..models.lora import LoraDrafter
from ..ops.logits import by_row
from .kv_cache import SCRATCH
from .state import OFF

MOST_STEPS = 3  # of denoising in a block
CANVAS_BLOCK = 8  # slots of a block that a denoiser drafts, if nothing says otherwise
AUTO = "auto"  # a block size that is chosen before each cycle


def token_ids(index: int, prompt: Sequence[int]) -> list[int]:
    """The tokens of prompt number `index`. Raises TypeError unless it is a sequence of token ids."""
    tokens = list(prompt) if isinstance(prompt, Iterable) else None
    if tokens is None or not all(is_int(token) for token in tokens):
        raise TypeError(f"decode: prompt {index} is {shown(prompt)}; a sequence of token ids is needed")
    return [int(token) for token in tokens]


def integer(name: str, number: object) -> int:
    """Converts an int of any kind to Python's int. Raises TypeError for anything else."""
    if not is_int(number):
        raise TypeError(f"decode: {name} is {shown(number)}; an int is needed")
    return int(number)


def positive(name: str, number: object, what: str) -> int:
    """`integer` of a number of which at least 1 is needed; `what` says of what. Raises ValueError for a smaller one."""
    number = integer(name, number)
    if number < 1:
        raise ValueError(f"{name} is {number}: at least one {what}")
    return number


def seed_of(number: object) -> int:
    """A seed to which positions can be added. Raises ValueError unless it is in [0, 2**62)."""
    number = integer("seed", number)
    if not 0 <= number < 2**62:
        raise ValueError(f"decode: seed is {number}; 0 to 2**62 - 1 are supported")
    return number


def stop_ids(tokens: int | Iterable[int] | None) -> frozenset[int]:
    """The tokens that end a row, given as one id, several ids or None.

    Raises TypeError for anything else, and ValueError for a negative id.
    """
    each = [] if tokens is None else [tokens] if is_int(tokens) else tokens
    each = list(each) if isinstance(each, Iterable) else [each]
    if not all(is_int(token) for token in each):
        raise TypeError(f"decode: stop_token_ids is {shown(tokens)}; a token id, a sequence of them or None is needed")
    if negative := [token for token in each if token < 0]:
        raise ValueError(f"decode: stop_token_ids has {negative[0]}; token ids begin at 0")
    return frozenset(int(token) for token in each)


def stop_texts(strings: str | Iterable[str] | None, tokenizer) -> tuple[str, ...]:
    """The strings that end a row, given as one, several or None.

    Raises TypeError for anything else, and ValueError for an empty string, for one with a special token, which is no
    text, or if there is no tokenizer.
    """
    each = [] if strings is None else [strings] if isinstance(strings, str) else strings
    each = tuple(each) if isinstance(each, Iterable) else (each,)
    if not all(isinstance(string, str) for string in each):
        raise TypeError(f"decode: stop_strings is {shown(strings)}; a string, a sequence of them or None is needed")
    if "" in each:
        raise ValueError("decode: stop_strings has an empty string, which would end every answer at once")
    if each and tokenizer is None:
        raise ValueError("decode: stop_strings need a tokenizer, by which tokens become text")
    for string in each:
        for special in getattr(tokenizer, "all_special_tokens", ()):
            if special in string:
                raise ValueError(
                    f"decode: the stop string {string!r} has the special token {special!r}, which is no part of the "
                    "text: stop_token_ids takes special tokens"
                )
    return each


def token_bias(target: Target, given: Mapping[int, float] | None) -> dict[int, float]:
    """What is added to the logits of some tokens; None is nothing.

    Raises TypeError unless it maps token ids to numbers, and ValueError for a token outside of the vocabulary, for a
    number that is neither finite nor -inf, which bans a token, and if all tokens are banned.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(f"decode: logit_bias is {shown(given)}; a dict of token ids and numbers, or None, is needed")
    if wrong := [token for token in given if not is_int(token)]:
        raise TypeError(f"decode: logit_bias has the key {wrong[0]!r}; token ids are needed")
    bias = {int(token): _number("logit_bias", number) for token, number in given.items()}
    for token, number in bias.items():
        if not 0 <= token < target.vocab_size:
            raise ValueError(f"logit_bias has token {token}; the target's vocabulary has {target.vocab_size}")
        if not number < math.inf:
            raise ValueError(f"logit_bias of token {token} is {number}; a finite number or -inf is needed")
    if len(bias) == target.vocab_size and max(bias.values()) == -math.inf:
        raise ValueError(f"logit_bias bans all {target.vocab_size} tokens of the vocabulary")
    return bias


def per_prompt(name: str, given: object, count: int) -> list[float]:
    """The temperature or a filter for each of `count` prompts, given as one number for all or one number for each.

    Numbers may be Python's, numpy's or tensors. None, for all prompts or for one of them, is off.

    Raises:
        ValueError: the sequence has another length than `count`, or a number is out of its range.
        TypeError: an entry is no number. For top_k, it must be an int.
    """
    if isinstance(given, Tensor | np.ndarray):
        given = given.tolist()
    one_each = isinstance(given, Iterable) and not isinstance(given, str)
    numbers = list(given) if one_each else [given] * count
    if len(numbers) != count:
        raise ValueError(f"decode: {name} has {len(numbers)} entries; one number, or one for each prompt, is needed")
    numbers = [OFF[name] if number is None else _number(name, number) for number in numbers]
    for number in set(numbers):
        by_row("decode", (count,), **{name: number})
    return numbers


def _number(name: str, number: object) -> float:
    if isinstance(number, Tensor | np.ndarray) and number.ndim == 0:
        number = number.item()
    if name == "top_k":
        return integer(name, number)
    if isinstance(number, bool | np.bool_) or not isinstance(number, Real):
        raise TypeError(f"decode: {name} is {shown(number)}; a number is needed")
    return float(number)


def check_prompt(target: Target, prompt: Sequence[int], index: int = 0) -> list[int]:
    """The tokens of prompt number `index`. Raises ValueError for one that is empty or outside of the vocabulary."""
    tokens = token_ids(index, prompt)
    if not tokens:
        raise ValueError(f"prompt {index} has no tokens: a prompt needs at least one")
    if outside := [token for token in tokens if not 0 <= token < target.vocab_size]:
        raise ValueError(f"prompt {index} has token {outside[0]}; the target's vocabulary has {target.vocab_size}")
    return tokens


def draft_width(target: Target, drafter: DFlashDrafter | LoraDrafter | Denoiser | None, block_size: int | None) -> int:
    """The number of drafted tokens in a block, 0 without a drafter.

    Raises ValueError if the drafter cannot fill the block, or was made for another target or other taps.
    """
    if drafter is None:
        if block_size is not None:
            raise ValueError(f"block size {block_size} needs a drafter: plain decoding drafts nothing")
        return 0
    if isinstance(drafter, Denoiser):
        first, largest, own = 1, SCRATCH, CANVAS_BLOCK
    elif isinstance(drafter, LoraDrafter):
        drafter.check_verifier(target)
        # Its rows know how far they are from the anchor by their positions alone, so that there may be more of them.
        first, largest, own = 1, SCRATCH, drafter.config.block_size
    elif not isinstance(drafter, DFlashDrafter):
        raise TypeError(f"decode: drafter is {shown(drafter)}; what load_pair gives, a folder, or None is needed")
    else:
        drafter.check_target(target)
        if tuple(drafter.config.target_layer_ids) != target.tap_ids:
            raise ValueError(
                f"the drafter reads the target's layers {drafter.config.target_layer_ids}, "
                f"the target is tapped at {list(target.tap_ids)}"
            )
        first, largest, own = drafter.config.first_draft_slot, drafter.config.block_size, drafter.config.block_size
    block_size = own if block_size is None else block_size
    if not first + 1 <= block_size <= largest:
        raise ValueError(
            f"block size {block_size} is not supported: this drafter fills blocks of {first + 1} to {largest} slots"
        )
    return block_size - first


def denoising(steps: object) -> int:
    """The number of denoising steps of a block. Raises ValueError unless it is 1 to 3."""
    steps = integer("denoising_steps", steps)
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"decode: denoising_steps is {steps}; 1 to {MOST_STEPS} are supported")
    return steps
