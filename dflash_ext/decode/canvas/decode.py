"""Completes prompts by diffusion over canvases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from transformers import PreTrainedModel

from ...checks import is_int, shown
from ...models import Denoiser, DFlashDrafter
from ..arguments import integer, positive, stop_ids, stop_texts, token_ids
from ..prefill import CHUNK
from ..request import Request
from ..text import Text
from .completion import CanvasCompletion, CanvasDecoded
from .cycle import CanvasCycle
from .forward import canvas_forward
from .loop import CanvasLoop
from .processes import MaskedDiffusion, UniformDiffusion
from .randomness import LikeTransformers, Seeded


@torch.no_grad()
def decode_canvas(
    model: Denoiser | PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    process: MaskedDiffusion | UniformDiffusion,
    *,
    canvas_length: int | None = None,
    max_new_tokens: int = 256,
    canvases: Sequence[Sequence[int] | None] | None = None,
    stop_token_ids: int | Iterable[int] | None = None,
    stop_strings: str | Iterable[str] | None = None,
    tokenizer=None,
    seed: int | Sequence[int] = 0,
    batch_size: int = 8,
    tracing: bool = False,
    on_tokens: Callable[[int, list[int]], None] | None = None,
    on_text: Callable[[int, str], None] | None = None,
    drafter: DFlashDrafter | None = None,
    like_transformers: bool = False,
    pad_token_id: int | None = None,
) -> CanvasDecoded:
    """Completes prompts with canvases of tokens, each of which is denoised in some steps and then committed.

    A canvas sees the prompt and the canvases before it. On a GPU, a step is one CUDA graph. A row commits its canvas
    when that is done, and goes on to its next one, while other rows need more steps on theirs.

    Args:
        model: a `Denoiser`, or a DiffusionGemmaForBlockDiffusion of transformers.
        prompts: token ids, at least one per prompt.
        process: how a canvas becomes text. A Denoiser with a mask token needs MaskedDiffusion, and others need
            UniformDiffusion.
        canvas_length: the tokens of a canvas (the block size of semi-autoregressive decoding). DiffusionGemma's own
            length is its default; that of a Denoiser is 32.
        max_new_tokens: the length at which an answer ends if nothing ended it before. Whole canvases are decoded.
        canvases: for each prompt, the tokens that its first canvas begins with, at most canvas_length, or None. Masked
            diffusion fills in the mask tokens among them and keeps the others (infilling). In uniform-state diffusion
            they take the place of the first noise.
        stop_token_ids, stop_strings: end an answer. Strings need the tokenizer, from which completions get their text.
        seed: prompt i draws with seed + i, or with the seed of its own in a sequence. Its tokens depend neither on the
            batch size nor on the other prompts, but for rounding.
        batch_size: the number of prompts that are decoded at a time.
        tracing: keep each step of each canvas in the completions.
        on_tokens, on_text: called with the index of a prompt and the tokens or the text that a canvas has added.
        drafter: drafts each canvas from the denoiser's hidden states, and the canvas begins with its tokens instead of
            noise. It was trained for the denoiser's model as its target. Uniform-state diffusion of a Denoiser takes
            one, because it may replace all of them.
        like_transformers: take random numbers from torch's default generator in the order of transformers' `generate`,
            and keep the batch together as it does, so that DiffusionGemma gives the same tokens at the same
            `torch.manual_seed`. It is slower and needs a batch_size that holds all prompts.
        pad_token_id: with like_transformers, what finished rows have behind their end.

    Raises:
        ValueError: a number is out of range, a prompt is empty, too long or outside of the vocabulary, or the process
            does not fit the model.
        TypeError: an argument has another type.
    """
    prompts = [token_ids(index, prompt) for index, prompt in enumerate(prompts)]
    max_new_tokens = positive("max_new_tokens", max_new_tokens, "token is decoded")
    batch_size = positive("batch_size", batch_size, "row is decoded at a time")
    if canvas_length is None:
        canvas_length = getattr(getattr(model, "config", None), "canvas_length", 32)
    length = positive("canvas_length", canvas_length, "token is in a canvas")
    given = _first_canvases(canvases, len(prompts), length)
    seeds = _seeds(seed, len(prompts))
    stops, strings = stop_ids(stop_token_ids), stop_texts(stop_strings, tokenizer)
    if not prompts:
        return CanvasDecoded([])
    if like_transformers and batch_size < len(prompts):
        raise ValueError(f"like_transformers=True decodes all {len(prompts)} prompts at a time; batch_size is less")
    if like_transformers and isinstance(process, MaskedDiffusion):
        raise ValueError("like_transformers=True is for uniform-state diffusion: transformers has no masked one")
    slots = min(batch_size, len(prompts))
    longest = max(map(len, prompts))
    room = max(length if canvas is None else len(canvas) for canvas in given) + max_new_tokens - 1
    tokens = longest + -(-room // length) * length
    sizes = dict(slots=slots + 1, tokens=tokens, rows=max(length, CHUNK))
    forward = canvas_forward(model, **sizes, fused=not like_transformers)
    _check_process(process, forward.mask_id)
    if drafter is not None:
        if forward.mask_id is not None or not isinstance(model, Denoiser):
            raise ValueError("a drafter of canvases goes with a Denoiser of uniform-state diffusion")
        forward.guess(drafter, length=length, slots=slots + 1, tokens=tokens)
    vocab_size = forward.like.shape[0]
    for index, tokens in enumerate(prompts):
        if not tokens:
            raise ValueError(f"prompt {index} is empty; at least one token is needed")
        if not 0 <= min(tokens) <= max(tokens) < vocab_size:
            raise ValueError(
                f"prompt {index} has tokens {min(tokens)} to {max(tokens)}; the vocabulary has {vocab_size}"
            )
    requests = []
    for index, tokens in enumerate(prompts):
        text = None if tokenizer is None else Text(tokenizer, strings)
        callbacks = [on and partial(on, index) for on in (on_tokens, on_text)]
        requests.append(Request(tokens, max_new_tokens, {}, {}, stops, seeds[index], text, *callbacks))
        requests[-1].completion = CanvasCompletion()
    randomness = LikeTransformers() if like_transformers else Seeded()
    cycle = CanvasCycle(forward, process, randomness, slots=slots, length=length)
    loop = CanvasLoop(cycle, tracing=tracing, together=like_transformers, pad=pad_token_id)
    with torch.autocast(forward.like.device.type, enabled=False):
        return loop.decode(requests, given)


def _first_canvases(
    canvases: Sequence[Sequence[int] | None] | None, prompts: int, length: int
) -> list[list[int] | None]:
    if canvases is None:
        return [None] * prompts
    if len(canvases) != prompts:
        raise ValueError(f"{len(canvases)} canvases were given for {prompts} prompts")
    given = [canvas if canvas is None else token_ids(index, canvas) for index, canvas in enumerate(canvases)]
    for index, canvas in enumerate(given):
        if canvas is not None and not 0 < len(canvas) <= length:
            raise ValueError(
                f"canvas {index} has {len(canvas)} tokens; 1 to {length}, the canvas length, are supported"
            )
    return given


def _seeds(seed: int | Sequence[int], prompts: int) -> list[int]:
    if is_int(seed):
        return [int(seed) + index for index in range(prompts)]
    seeds = [integer("seed", each) for each in seed]
    if len(seeds) != prompts:
        raise ValueError(f"seed has {len(seeds)} entries; an int, or one for each of {prompts} prompts, is needed")
    return seeds


def _check_process(process: MaskedDiffusion | UniformDiffusion, mask_id: int | None) -> None:
    if not isinstance(process, MaskedDiffusion | UniformDiffusion):
        raise TypeError(f"process is {shown(process)}; MaskedDiffusion or UniformDiffusion is needed")
    if isinstance(process, MaskedDiffusion) != (mask_id is not None):
        has, needed = ("no", "Uniform") if mask_id is None else ("a", "Masked")
        raise ValueError(f"the model has {has} mask token: {needed}Diffusion is needed")
