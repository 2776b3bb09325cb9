"""LoRA drafters on the engine: what they draft, in one forward and in two, and that no output changes by it."""

import itertools
import operator

import pytest
import torch

from dflash_ext import IntervalMask
from dflash_ext.decode import Engine, decode
from dflash_ext.models import LoraDrafter, Target
from python_tests.decode.oracle import own_output, own_outputs
from python_tests.decode.test_families import tiny
from python_tests.decode.test_speculative import (
    FILTERS,
    ROWS,
    exact_distribution,
    expect_distribution,
    small_pair,
)
from python_tests.pairwise import pairwise
from python_tests.tiny import FAMILIES, MASK_TOKEN, random_prompts, tiny_model, tiny_pair

PROMPTS = random_prompts(1, 5, 9, 17)
KINDS = {
    "one forward": ({"kind": "gated"}, {"forwards": 1}),
    "one forward, two groups": ({"kind": "gated"}, {"groups": 2}),
    "two forwards": ({"kind": "gated"}, {"forwards": 2}),
    "whole": ({"kind": "whole"}, {}),
}
COUNTS = operator.attrgetter("accepted"), operator.attrgetter("verified")
CYCLES = pytest.mark.parametrize("cycle", KINDS)
WAYS = pytest.mark.parametrize("merged", [True, False], indirect=True, ids=["merged", "beside"])


def pair(family: str, cycle: str, **options) -> tuple[Target, LoraDrafter, dict]:
    return pair_of(tiny_model(family), cycle, **options)


def pair_of(model, cycle: str, rank: int = 4, **options) -> tuple[Target, LoraDrafter, dict]:
    """A target, a drafter for this kind of cycle, some of whose drafts are accepted, and the option of `decode`."""
    settings, forwards = KINDS[cycle]
    target = Target(model)
    torch.manual_seed(1)
    drafter = LoraDrafter.for_target(target, mask_token_id=MASK_TOKEN, rank=rank, block_size=6, **settings, **options)
    drafter.requires_grad_(False)
    for weight in [*drafter.adapter.lora_b, *([drafter.sampler.outer.weight] if drafter.sampler else [])]:
        weight.normal_(std=0.05)
    return target, drafter, forwards


@pytest.mark.parametrize("cycle, family, merged", pairwise([*KINDS], FAMILIES, [False, True]), indirect=["merged"])
def test_greedy_equals_the_target(merged, cycle, family):
    causal, sampler, batch_size = (True, 8, 1) if merged else (False, None, 4)
    target, drafter, forwards = pair(family, cycle, causal=causal, sampler_width=sampler)
    decoded = decode(target, drafter, PROMPTS, max_new_tokens=30, batch_size=batch_size, **forwards)
    assert [c.tokens for c in decoded.completions] == own_outputs(target.model, PROMPTS, 30)
    assert any(a for c in decoded.completions for a in c.accepted) or family != "llama"


@torch.no_grad()
def reference_draft(target: Target, drafter: LoraDrafter, text: list[int], count: int) -> list[int]:
    """The tokens of `count` mask rows behind a text, by the model's own modules under the mask of training."""
    config, context, embed = drafter.config, torch.tensor([text]), target.model.get_input_embeddings()
    is_whole, end = int(config.kind == "whole"), len(text)
    masked = torch.full((1, count), config.mask_token_id)
    block = torch.cat([context[:, -1:], masked], dim=1) if is_whole else masked
    anchors = torch.tensor([[end - 1]])
    options = dict(include_context=True, convention="zlab", causal=config.causal)
    masks = {}
    for kind, window in target.windows.items():
        # A gated group sees the context up to and with its anchor: one more token of context, which nothing else sees.
        padded = IntervalMask.anchor_blocks(
            end + (1 - is_whole), anchors + (1 - is_whole), block.shape[1], window=window, **options
        )
        keep = [key for key in range(padded.kv_len) if is_whole or key != end]
        masks[kind] = padded.to_dense(torch.float32)[:, :, keep][..., keep]
    ids = torch.cat([context, block], dim=1)
    inputs = torch.cat([embed(ids[:, : ids.shape[1] - count]), drafter.embed(target, masked)], dim=1)
    positions = torch.cat([torch.arange(end), torch.arange(block.shape[1]) + end - is_whole])[None]
    rows = None if is_whole else torch.arange(ids.shape[1])[None] >= end
    with drafter.adapter.applied(target.model, rows):
        logits = target.model(
            inputs_embeds=inputs,
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            position_ids=positions,
        ).logits[0, -count:]
    logits[:, config.mask_token_id] = -torch.inf
    return logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "cycle, model, merged",
    pairwise([*KINDS], [("llama", False), ("qwen3", True), ("gemma3", False), ("gemma3", True)], [False, True]),
    indirect=["merged"],
)
def test_drafts_are_those_of_the_models_own_modules(cycle, model, merged, monkeypatch):
    """Rows of unequal lengths, beside each other: what a row drafts in each of its cycles."""
    family, causal = model
    monkeypatch.setattr("dflash_ext.decode.drafts.lora.narrow", lambda head, dtype: head)
    target, drafter, forwards = pair(family, cycle, causal=causal)
    decoded = decode(target, drafter, PROMPTS, max_new_tokens=12, **forwards)
    count = drafter.config.drafted
    for prompt, completion in zip(PROMPTS, decoded.completions, strict=True):
        known = len(prompt) + 1
        for at, drafted in enumerate(completion.drafted):
            text = [*prompt, *completion.tokens][:known]
            if "one forward" in cycle and at > 0:  # the group did not know the anchor, for which its first row stood
                expected = reference_draft(target, drafter, text[:-1], count)[1:]
            else:
                expected = reference_draft(target, drafter, text, count)
            assert drafted == expected[: len(drafted)], (at, text)
            known += completion.committed[at]


@pytest.mark.parametrize("family, verifier", [("llama", "llama"), ("gemma3", "qwen3")])
def test_another_model_verifies(family, verifier, monkeypatch):
    """The base drafts what it would draft for itself behind the same text, and the output is the verifier's own."""
    monkeypatch.setattr("dflash_ext.decode.drafts.lora.narrow", lambda head, dtype: head)
    base, drafter, _ = pair(family, "whole")
    target = Target(tiny_model(verifier, num_hidden_layers=3))
    drafter.base = base
    decoded = decode(target, drafter, PROMPTS, max_new_tokens=20)
    assert [c.tokens for c in decoded.completions] == own_outputs(target.model, PROMPTS, 20)
    for prompt, completion in zip(PROMPTS, decoded.completions, strict=True):
        known = len(prompt) + 1
        for drafted, committed in zip(completion.drafted, completion.committed, strict=True):
            text = [*prompt, *completion.tokens][:known]
            assert drafted == reference_draft(base, drafter, text, drafter.config.drafted)[: len(drafted)]
            known += committed


def test_verifiers_that_do_not_fit_are_refused():
    base, drafter, _ = pair("llama", "whole")
    with pytest.raises(ValueError, match="was made for another base"):
        decode(Target(tiny_model("llama", num_hidden_layers=3)), drafter, PROMPTS, max_new_tokens=4)
    drafter.base = base
    with pytest.raises(ValueError, match="vocab_size of the LoRA drafter's base is .*, that of the verifier"):
        decode(Target(tiny_model("llama", vocab_size=base.vocab_size + 8)), drafter, PROMPTS, max_new_tokens=4)
    drafter.base = Target(tiny_model("llama", num_hidden_layers=3))
    with pytest.raises(ValueError, match="was made for another base"):
        decode(base, drafter, PROMPTS, max_new_tokens=4)
    base, drafter, _ = pair("llama", "two forwards")
    drafter.base = base
    with pytest.raises(ValueError, match="a gated LoRA drafter reads its base's cache"):
        decode(Target(tiny_model("llama", num_hidden_layers=3)), drafter, PROMPTS, max_new_tokens=4)


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_a_row_that_ends_without_a_group_drafts_nothing_next(groups):
    target, drafter, _ = pair("llama", "one forward")
    decoded = decode(target, drafter, PROMPTS, max_new_tokens=40, groups=groups)
    pairs = [
        (accepted, verified)
        for completion in decoded.completions
        for accepted, verified in zip(completion.accepted, completion.verified[1:-1], strict=False)
    ]
    assert any(accepted >= groups for accepted, _ in pairs) or groups == 5  # all of them
    assert all((verified > 0) == (accepted < groups) for accepted, verified in pairs)


def test_few_groups_where_there_are_many_slots():
    target, drafter, forwards = pair("llama", "one forward")
    sizes = {"max_length": 60, **forwards}
    assert [Engine(target, drafter, slots=n, **sizes).cycle.groups for n in (1, 2, 4, 8, 32)] == [5, 5, 1, 1, 1]


def test_one_forward_drafts_one_token_less():
    target, drafter, forwards = pair("llama", "one forward")
    assert decode(target, drafter, PROMPTS, max_new_tokens=8, **forwards).draft_width == 4
    assert decode(target, drafter, PROMPTS, max_new_tokens=8).draft_width == 5  # a CPU has two forwards


@WAYS
@torch.no_grad()
def test_the_targets_keys_and_values_keep_their_bits(merged):
    target, drafter, forwards = pair("qwen3", "one forward")
    caches = []
    for draft in (None, drafter):
        engine = Engine(target, draft, slots=2, max_length=60, **(forwards if draft else {}))
        requests = [engine.submit(prompt, max_new_tokens=40) for prompt in PROMPTS[1:3]]
        engine.run()
        cache = engine.cycle.target.cache
        caches.append(
            [cache.layers[i][j][r.slot, :, : len(r.prompt) + 38] for i in range(6) for j in (0, 1) for r in requests]
        )
    assert all(torch.equal(*pair) for pair in zip(*caches, strict=True))


@CYCLES
def test_rows_join_and_leave(cycle):
    target, drafter, forwards = pair("llama", cycle, sampler_width=8)
    prompts = random_prompts(1, 5, 9, 17, 3, 12, 2)
    expected = own_outputs(target.model, prompts, 30)
    stop = expected[0][12]
    engine = Engine(target, drafter, slots=3, max_length=60, **forwards)
    requests = [
        engine.submit(prompt, max_new_tokens=10 + 3 * i, stop_token_ids=stop) for i, prompt in enumerate(prompts)
    ]
    for _ in range(3):
        engine.step()
    engine.cancel(requests[1])
    engine.run()
    for i, (tokens, request) in enumerate(zip(expected, requests, strict=True)):
        tokens = tokens[: 10 + 3 * i]
        tokens = tokens[: tokens.index(stop) + 1] if stop in tokens else tokens
        got = request.completion.tokens
        assert got == (tokens[: len(got)] if i == 1 else tokens)


@CYCLES
@pytest.mark.parametrize("block_size", [3, 6, 17, "auto"])
def test_blocks_of_other_sizes(cycle, block_size):
    """One forward has 16 + 16 * 16 rows in a block of 17 slots, more than there are places behind a row's tokens."""
    target, drafter, forwards = pair("gemma3", cycle, causal=True)
    options = dict(block_size=block_size, costs={1: {0: 1.0, 5: 1.1, 4: 1.1}}) if block_size == "auto" else {}
    options = options or dict(block_size=block_size)
    decoded = decode(target, drafter, PROMPTS, max_new_tokens=20, **options, **forwards)
    assert [c.tokens for c in decoded.completions] == own_outputs(target.model, PROMPTS, 20)


@CYCLES
def test_a_row_that_fills_all_positions(cycle):
    """Mask rows stand beyond the last position of the target."""
    target, drafter, forwards = pair("llama", cycle)
    prompt = random_prompts(500)
    decoded = decode(target, drafter, prompt, max_new_tokens=12, **forwards)
    assert decoded.completions[0].tokens == decode(target, None, prompt, max_new_tokens=12).completions[0].tokens


@pytest.mark.parametrize("cycle", ["two forwards", "whole"])
def test_steps_of_denoising(cycle):
    target, drafter, forwards = pair("qwen3", cycle, sampler_width=8)
    options = dict(max_new_tokens=20, denoising_steps=3, **forwards)
    decoded = decode(target, drafter, PROMPTS, **options)
    assert [c.tokens for c in decoded.completions] == own_outputs(target.model, PROMPTS, 20)
    once = decode(target, drafter, PROMPTS, max_new_tokens=20, **forwards)
    assert [c.drafted for c in decoded.completions] != [c.drafted for c in once.completions]


@pytest.mark.parametrize("cycle", ["one forward", "two forwards"])
def test_penalties_and_a_bias(cycle):
    target, drafter, forwards = pair("llama", cycle, sampler_width=8)
    changes = dict(repetition_penalty=1.3, frequency_penalty=0.4, logit_bias={5: 0.5, 9: -float("inf")})
    plain = decode(target, None, PROMPTS, max_new_tokens=20, **changes)
    decoded = decode(target, drafter, PROMPTS, max_new_tokens=20, **changes, **forwards)
    assert [c.tokens for c in decoded.completions] == [c.tokens for c in plain.completions]


def test_costs_decide_between_no_draft_and_one():
    """Where drafting does not pay, a probe of two cycles sees whether it does again: the first makes a draft."""
    target, drafter, forwards = pair("llama", "one forward")
    options = dict(max_new_tokens=160, block_size="auto", costs={1: {0: 1.0, 4: 4.2}}, **forwards)
    decoded = decode(target, drafter, PROMPTS[:1], **options)
    verified = decoded.completions[0].verified
    assert decoded.completions[0].tokens == own_output(target.model, PROMPTS[0], 160)
    assert sum(v > 0 for v in verified) in (1, 2) and verified[0] == 0


@CYCLES
def test_a_cycle_that_lacks_memory_is_repeated_for_fewer_rows(cycle, monkeypatch):
    target, drafter, forwards = pair("llama", cycle)
    engine = Engine(target, drafter, slots=4, max_length=60, **forwards)
    draw, faults = engine.cycle.draft.draw, itertools.cycle([True, False, False])

    def fail_at_times(logits, *others):
        if len(logits) > 1 and next(faults):
            raise torch.OutOfMemoryError("out of memory")
        return draw(logits, *others)

    monkeypatch.setattr(engine.cycle.draft, "draw", fail_at_times)
    requests = [engine.submit(prompt, max_new_tokens=20) for prompt in PROMPTS]
    engine.run()
    expected = own_outputs(target.model, PROMPTS, 20)
    assert [request.completion.tokens for request in requests] == expected


# ---- sampling ------------------------------------------------------------------------------------------------


def small_lora(cycle: str, **options) -> tuple[Target, LoraDrafter, dict]:
    """A target of five tokens with pronounced preferences, and a drafter that disagrees with it."""
    target, _ = small_pair(0.7)
    settings, forwards = KINDS[cycle]
    torch.manual_seed(5)
    target = Target(target.model)
    drafter = LoraDrafter.for_target(target, mask_token_id=4, rank=4, block_size=4, **settings, **options)
    drafter.requires_grad_(False)
    for weight in [*drafter.adapter.lora_b, *([drafter.sampler.outer.weight] if drafter.sampler else [])]:
        weight.normal_(std=0.3)
    return target, drafter, forwards


@pytest.mark.parametrize(
    ["cycle", "sampler", *FILTERS],
    [
        ("one forward", None, 1.0, None, None, None),
        ("one forward", 8, 0.7, 3, None, None),
        ("one forward, two groups", 8, 1.3, None, 0.8, None),
        ("one forward, two groups", None, 1.0, None, None, 0.4),
        ("two forwards", 8, 1.3, None, 0.8, None),
        ("two forwards", None, 1.0, None, None, None),
        ("whole", 8, 0.7, 3, None, None),
        ("whole", None, 1.0, None, None, 0.4),
    ],
)
def test_sampling_keeps_the_targets_distribution(cycle, sampler, temperature, top_k, top_p, min_p):
    """Answers are long enough that drafts are verified which one forward has drawn without the bonus token."""
    target, drafter, forwards = small_lora(cycle, sampler_width=sampler)
    filters = dict(zip(FILTERS, (temperature, top_k, top_p, min_p), strict=True))
    exact = exact_distribution(target.model, [1, 3, 0], 4, **filters)
    options = dict(max_new_tokens=4, batch_size=1000, seed=11, **forwards, **filters)
    decoded = decode(target, drafter, [[1, 3, 0]] * ROWS, **options)
    expect_distribution(decoded.completions, exact)
    for first in (0, 1):  # both acceptance and rejection took part, in first cycles and in later ones
        accepted, verified = ([n for c in decoded.completions for n in each(c)[first:]] for each in COUNTS)
        assert 0 < sum(accepted) < sum(verified)


def test_a_greedy_draft_is_a_point_mass():
    target, drafter, forwards = small_lora("one forward", sampler_width=8)
    exact = exact_distribution(target.model, [1, 3, 0], 4, 1.0, None, None, None)
    options = dict(max_new_tokens=4, batch_size=1000, seed=11, temperature=1.0, greedy_draft=True, **forwards)
    expect_distribution(decode(target, drafter, [[1, 3, 0]] * ROWS, **options).completions, exact)


def test_greedy_and_sampled_rows_mix():
    """They join at different times, so that the rows of a cycle need different draws than those of the one before."""
    target, drafter, forwards = pair("llama", "one forward")
    engine = Engine(target, drafter, slots=2, max_length=60, **forwards)
    temperatures = [0.0, 1.0, 0.0, 0.0, 0.7, 0.0]
    prompts = random_prompts(1, 5, 9, 17, 3, 12)
    requests = [
        engine.submit(p, max_new_tokens=9 + 4 * i, temperature=t, top_p=0.9 if i == 4 else None, seed=i)
        for i, (p, t) in enumerate(zip(prompts, temperatures, strict=True))
    ]
    engine.run()
    for i, request in enumerate(requests):
        expected = own_output(target.model, prompts[i], 9 + 4 * i)
        assert (request.completion.tokens == expected) == (temperatures[i] == 0)


@CYCLES
def test_a_rows_draws_do_not_depend_on_the_others(cycle):
    target, drafter, forwards = pair("qwen3", cycle, sampler_width=8)
    if cycle == "one forward":
        forwards = {"groups": 5}  # by default their number depends on that of the slots
    options = dict(max_new_tokens=20, temperature=1.0, seed=[3, 4, 5, 6], **forwards)
    together, alone = (decode(target, drafter, PROMPTS, batch_size=n, **options) for n in (4, 1))
    assert [c.tokens for c in together.completions] == [c.tokens for c in alone.completions]


# ---- refusals ------------------------------------------------------------------------------------------------


def tiny_stablelm() -> tuple[Target, LoraDrafter]:
    target = Target(tiny("stablelm"))
    return target, LoraDrafter.for_target(target, mask_token_id=MASK_TOKEN, rank=2)


def test_refusals_are_one_line():
    target, drafter = pair("llama", "one forward")[:2]
    whole = pair("llama", "whole")[1]
    block_target, block_drafter = tiny_pair("llama")
    for (model, draft), options, message in [
        ((target, whole), dict(forwards=1), "a whole LoRA drafter acts on every row"),
        ((target, drafter), dict(forwards=3), "forwards is 3: 1 and 2 are supported"),
        ((block_target, block_drafter), dict(forwards=1), r"one forward \(forwards=1, or groups\) needs a gated"),
        ((block_target, block_drafter), dict(groups=1), r"one forward \(forwards=1, or groups\) needs a gated"),
        ((target, drafter), dict(groups=0), "groups is 0: 1 to 5 groups are supported with blocks of 6 slots"),
        ((target, drafter), dict(groups=6), "groups is 6: 1 to 5 groups are supported with blocks of 6 slots"),
        ((target, drafter), dict(groups=2, forwards=2), "groups is 2: a cycle of two forwards has none"),
        ((target, drafter), dict(forwards=1, denoising_steps=2), "3 slots or more, and one denoising step"),
        ((target, drafter), dict(forwards=1, block_size=2), "3 slots or more"),
        ((target, drafter), dict(block_size=1), "block size 1 .* 2 to 64 slots"),
        ((Target(tiny_model("qwen3")), drafter), {}, "made for another base"),
        (
            tiny_stablelm(),
            {},
            "not supported: the engine has no forward of its own for this StableLm",
        ),
    ]:
        with pytest.raises(ValueError, match=message) as refusal:
            decode(model, draft, PROMPTS, max_new_tokens=4, **options)
        assert "\n" not in str(refusal.value)
