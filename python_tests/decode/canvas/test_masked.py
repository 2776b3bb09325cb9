"""Masked diffusion gives the tokens of a plain loop, which runs the whole row under a dense mask in each step."""

import copy
from dataclasses import replace

import pytest
import torch

from dflash_ext import IntervalMask
from dflash_ext.decode.canvas import MaskedDiffusion, UniformDiffusion, decode_canvas, process_of
from dflash_ext.decode.canvas.cycle import CanvasCycle
from dflash_ext.decode.canvas.forward import canvas_forward
from dflash_ext.decode.canvas.randomness import Seeded
from dflash_ext.models import Denoiser, Target
from dflash_ext.reference import reveal, reveal_count
from python_tests.decode.canvas.models import tiny_denoiser
from python_tests.integrations.test_attention import model_of
from python_tests.tiny import MASK_TOKEN, VOCAB, random_prompts

LENGTH = 7
GREEDY = MaskedDiffusion(steps=3, temperature=0.0)
LIMITS = {name: None for name in ("count", "threshold", "at_least", "factor", "entropy_bound")}


def visible(denoiser, kind, prompt, total):
    """Who sees whom in a row of whole canvases behind a prompt, bool [total, total]: the last canvas is a block."""
    window = denoiser.target.config.sliding_window if kind == "sliding_attention" else total
    row, key = torch.arange(total)[:, None], torch.arange(total)[None]
    seen = (key <= row) & (row - key < window)
    for start in range(prompt, total, LENGTH):
        is_last = start + LENGTH == total
        if denoiser.attention == "bidirectional" if is_last else denoiser.prefix == "block_causal":
            inside = (row >= start) & (row < start + LENGTH)
            block = (key > start - window) & (key < start + LENGTH)
            seen = torch.where(inside, block, seen)
    return seen


def logits_of(denoiser, tokens, prompt):
    """The logits of the last canvas, [L, V]."""
    target, total = denoiser.target, len(tokens)
    masks = {
        kind: IntervalMask.from_dense(visible(denoiser, kind, prompt, total)[None]).to_dense(torch.float32)
        for kind in target.attention_kinds
    }
    model = target.model
    with torch.no_grad():
        out = model(
            torch.tensor([tokens]),
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            use_cache=False,
        )
    logits = out.logits[0, -LENGTH:].clone()
    logits[:, MASK_TOKEN] = -torch.inf
    return logits


def plain_loop(denoiser, prompt, process, new_tokens, canvas=None):
    tokens = list(prompt)
    while len(tokens) - len(prompt) < new_tokens:
        canvas = torch.tensor(canvas or [MASK_TOKEN] * LENGTH)
        masked = canvas == MASK_TOKEN
        total, step = masked.sum()[None], 0
        while masked.any():
            logits = logits_of(denoiser, tokens + canvas.tolist(), len(prompt))
            probs = logits.softmax(-1)
            entropy = torch.special.entr(probs).sum(-1)
            top = probs.topk(2).values
            scores = {"left_to_right": None, "confidence": top[:, 0], "margin": top[:, 0] - top[:, 1]}
            score = (scores | {"entropy": -entropy})[process.order]
            limits = {name: getattr(process, name, None) for name in LIMITS}
            if process.schedule:
                limits["count"] = reveal_count(total, step, process.steps, schedule=process.schedule)
            chosen = reveal(None if score is None else score[None], masked[None], entropy=entropy[None], **limits)[0]
            canvas = torch.where(chosen, logits.argmax(-1), canvas)
            masked, step = masked & ~chosen, step + 1
        tokens, canvas = tokens + canvas.tolist(), None
    return tokens[len(prompt) :][:new_tokens]


def assert_as_plain(denoiser, process=GREEDY, prompts=None, new_tokens=2 * LENGTH, **options):
    prompts = prompts or random_prompts(11, 2, 5)
    decoded = decode_canvas(
        denoiser, prompts, process, canvas_length=LENGTH, max_new_tokens=new_tokens, batch_size=2, **options
    )
    for index, (prompt, completion) in enumerate(zip(prompts, decoded.completions, strict=True)):
        canvas = options["canvases"][index] if "canvases" in options else None
        assert completion.tokens == plain_loop(denoiser, prompt, process, new_tokens, canvas)
        assert completion.finish_reason == "length"


RULES = {
    "linear": GREEDY,
    "linear, left to right": replace(GREEDY, order="left_to_right"),
    "cosine": replace(GREEDY, schedule="cosine"),
    "cosine, left to right": replace(GREEDY, schedule="cosine", order="left_to_right"),
    "margin": replace(GREEDY, order="margin"),
    "entropy": replace(GREEDY, order="entropy"),
    "one step": replace(GREEDY, steps=1),
    "more steps than tokens": replace(GREEDY, steps=20),
    "threshold": replace(GREEDY, schedule=None, threshold=0.12),
    "at least": replace(GREEDY, schedule=None, at_least=0.12),
    "factor": replace(GREEDY, schedule=None, factor=2.5),
    "entropy bound": replace(GREEDY, schedule=None, entropy_bound=6.0, order="entropy"),
}


@pytest.mark.parametrize("process", RULES.values(), ids=RULES)
def test_rules(process):
    assert_as_plain(tiny_denoiser(), process)


@pytest.mark.parametrize("prefix", ["causal", "block_causal"])
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_forms(family, attention, prefix):
    """A block sees what it saw in training, and so do committed blocks; Gemma 3 has layers with a window of 8."""
    assert_as_plain(tiny_denoiser(family, attention=attention, prefix=prefix), new_tokens=3 * LENGTH)


@pytest.mark.parametrize("family", ["gemma2", "gemma4"])
def test_families_without_a_forward_of_our_own(family):
    """Gemma 4 has embeddings of its own in each layer, shared caches, and layers of different widths."""
    model = model_of(family).requires_grad_(False)
    model.set_attn_implementation("eager")  # under SDPA, transformers 5.11 drops Gemma 2's soft cap of scores
    assert_as_plain(Denoiser(Target(model), mask_id=MASK_TOKEN))


def test_a_mask_embedding_stands_for_masked_positions():
    """Whether the mask is a token of the vocabulary or a new one."""
    denoiser = tiny_denoiser("gemma3")
    model = denoiser.target.model
    changed = copy.deepcopy(model)
    row = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        changed.model.embed_tokens.weight[MASK_TOKEN] = row
    embedding = row * model.config.hidden_size**0.5  # behind Gemma's scale
    prompts = random_prompts(5)
    options = dict(canvas_length=LENGTH, max_new_tokens=LENGTH)
    expected = plain_loop(Denoiser(Target(changed), mask_id=MASK_TOKEN), prompts[0], GREEDY, LENGTH)
    for given in (denoiser, Denoiser(Target(model), len(model.model.embed_tokens.weight), embedding)):
        decoded = decode_canvas(replace(given, mask_embedding=embedding), prompts, GREEDY, **options)
        assert decoded.completions[0].tokens == expected
    assert decode_canvas(denoiser, prompts, GREEDY, **options).completions[0].tokens != expected


def test_a_given_canvas_is_filled_in():
    """Tokens stay where they are; a canvas may be shorter than others, or full."""
    canvases = [[40, MASK_TOKEN, MASK_TOKEN, 41, MASK_TOKEN, 42, 43], None, [50, 51, 52, 53, 54, 55, 56]]
    assert_as_plain(tiny_denoiser(), canvases=canvases)
    shorter = [40, MASK_TOKEN, 41]
    denoiser, prompts = tiny_denoiser(), random_prompts(9)
    options = dict(canvas_length=LENGTH, max_new_tokens=3)
    [completion] = decode_canvas(denoiser, prompts, GREEDY, canvases=[shorter], **options).completions
    assert completion.tokens[::2] == [40, 41]
    assert completion.tokens[1] not in (MASK_TOKEN, 40)
    assert completion.steps == [1]


def test_draws_depend_on_the_row_alone():
    """Neither on the batch nor on what the slot held before; and they follow the probabilities' seeds."""
    process, prompts = MaskedDiffusion(steps=4, top_p=0.9), random_prompts(12, 3, 7, 7)
    options = dict(canvas_length=LENGTH, max_new_tokens=3 * LENGTH - 2, seed=3)
    denoiser = tiny_denoiser()
    together = decode_canvas(denoiser, prompts, process, batch_size=4, **options)
    for size in (1, 3):
        again = decode_canvas(denoiser, prompts, process, batch_size=size, **options)
        assert [c.tokens for c in again.completions] == [c.tokens for c in together.completions]
    assert together.completions[2].tokens != together.completions[3].tokens
    other = decode_canvas(denoiser, prompts, process, **options | {"seed": [3, 4, 5, 9]})
    changed = [a.tokens != b.tokens for a, b in zip(other.completions, together.completions, strict=True)]
    assert changed == [False, False, False, True]


def test_a_mask_token_is_never_drawn():
    denoiser = tiny_denoiser()
    with torch.no_grad():
        denoiser.target.head[MASK_TOKEN] *= 100  # its logit is far above or below all others
    decoded = decode_canvas(denoiser, random_prompts(4, 5), MaskedDiffusion(steps=2), max_new_tokens=64)
    assert all(MASK_TOKEN not in completion.tokens for completion in decoded.completions)


def test_a_stop_token_ends_a_row_within_its_canvas():
    denoiser, prompts = tiny_denoiser(), random_prompts(11, 2, 5)
    options = dict(canvas_length=LENGTH, max_new_tokens=3 * LENGTH)
    whole = decode_canvas(denoiser, prompts, GREEDY, **options).completions
    stop = whole[0].tokens[LENGTH + 2]
    seen = []
    decoded = decode_canvas(
        denoiser, prompts, GREEDY, stop_token_ids=stop, on_tokens=lambda *new: seen.append(new), **options
    )
    for index, (completion, full) in enumerate(zip(decoded.completions, whole, strict=True)):
        end = full.tokens.index(stop) + 1 if stop in full.tokens else None
        assert completion.tokens == full.tokens[:end]
        assert completion.finish_reason == ("length" if end is None else "stop")
        assert sum((tokens for row, tokens in seen if row == index), []) == completion.tokens


def test_each_step_is_traced():
    denoiser, prompts = tiny_denoiser(), random_prompts(11, 2)
    decoded = decode_canvas(denoiser, prompts, GREEDY, canvas_length=LENGTH, max_new_tokens=LENGTH, tracing=True)
    for completion in decoded.completions:
        [steps] = completion.canvases
        assert [sum(step.accepted) for step in steps] == [3, 2, 2]
        assert [step.canvas.count(MASK_TOKEN) for step in steps] == [4, 2, 0]
        assert steps[-1].best == completion.tokens


def test_a_slot_of_padding_reads_no_mask_token():
    """A new mask token has no row in the model's table. Graphs are captured with such slots alone."""
    denoiser = tiny_denoiser(mask_id=VOCAB, mask_embedding=torch.ones(64))
    forward = canvas_forward(denoiser, slots=2, tokens=64, rows=LENGTH)
    cycle = CanvasCycle(forward, GREEDY, Seeded(), slots=1, length=LENGTH)
    for _ in range(2):
        cycle.extend(torch.tensor([cycle.spare]))
        cycle.step(torch.tensor([cycle.spare]))


def test_a_row_whose_logits_are_not_finite_fails_alone():
    denoiser, prompts = tiny_denoiser(), [[5, 6], [7, 8, 9]]
    with torch.no_grad():
        denoiser.target.model.model.embed_tokens.weight[9] = torch.nan
    decoded = decode_canvas(denoiser, prompts, GREEDY, canvas_length=LENGTH, max_new_tokens=LENGTH)
    assert [completion.finish_reason for completion in decoded.completions] == ["length", "error"]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(schedule="linear", threshold=0.5), "schedule, threshold given; exactly one"),
        (dict(schedule=None), "no limit given"),
        (dict(schedule="square"), "schedule is 'square'"),
        (dict(order="right_to_left"), "order is 'right_to_left'"),
        (dict(schedule=None, threshold=0.5, order="margin"), "threshold is a limit of the confidence"),
        (dict(steps=0), "steps is 0"),
        (dict(top_p=-0.5), "top_p is -0.5"),
        (dict(schedule=None, threshold=1.5), "threshold is 1.5; a probability, from 0 to 1, is needed"),
        (dict(schedule=None, at_least=1.5), "at_least is 1.5"),
        (dict(schedule=None, factor=-1.0), "factor is -1.0"),
    ],
)
def test_settings_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MaskedDiffusion(**options)


@pytest.mark.parametrize("options", [{"steps": 2.5}, {"steps": "8"}, {"steps": True}, {"top_k": 1.5}, {"top_p": "0.9"}])
def test_settings_of_another_kind(options):
    """As JSON may give them."""
    with pytest.raises(TypeError, match=f"{next(iter(options))} is .* is needed"):
        process_of(MaskedDiffusion, options)
    with pytest.raises(TypeError, match="stability is 1.5"):
        process_of(UniformDiffusion, {"stability": 1.5})
    with pytest.raises(TypeError, match="t_min is None"):
        process_of(UniformDiffusion, {"t_min": None})


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([[]], {}, "prompt 0 is empty"),
        ([[3], [99]], {}, "prompt 1 has tokens 99 to 99; the vocabulary has 97"),
        ([[3] * 500], {}, "the target has 512 positions"),
        ([[3]], dict(max_new_tokens=0), "max_new_tokens is 0"),
        ([[3]], dict(canvases=[[4] * 40]), "canvas 0 has 40 tokens; 1 to 32"),
        ([[3]], dict(canvases=[]), "0 canvases were given for 1 prompts"),
        ([[3]], dict(seed=[1, 2]), "seed has 2 entries"),
    ],
)
def test_arguments_that_are_refused(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        decode_canvas(tiny_denoiser(), prompts, GREEDY, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(attention="full"), "attention is 'full'; bidirectional and causal are supported"),
        (dict(prefix="none"), "prefix is 'none'; causal and block_causal are supported"),
        (dict(mask_id=97), "the mask token is 97; 97 tokens have an embedding"),
    ],
)
def test_denoisers_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_denoiser(**options)
