"""Lossless: greedy output is the target's own token by token, and sampling keeps the target's distribution."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dflash_ext.decode import decode
from dflash_ext.models import Denoiser, DFlashDrafter, Target
from dflash_ext.models.uniform import SelfConditioning
from dflash_ext.ops.random import derived, uniform_tokens
from python_tests.decode.oracle import Oracle, own_output, own_outputs
from python_tests.tiny import FAMILIES, MASK_TOKEN, random_prompts, tiny_model, tiny_pair

PROMPTS = random_prompts(1, 5, 9, 17)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_greedy_equals_the_target_with_a_random_drafter(family, batch_size):
    target, drafter = tiny_pair(family)
    expected = own_outputs(target.model, PROMPTS, 30)
    for draft in (drafter, None):
        decoded = decode(target, draft, PROMPTS, max_new_tokens=30, batch_size=batch_size)
        assert [c.tokens for c in decoded.completions] == expected
    assert decoded.tau == 1.0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("period", [2, 4, 10**9])
def test_greedy_equals_the_target_when_rows_accept_different_lengths(family, period):
    target, drafter = tiny_pair(family)
    known = own_outputs(target.model, PROMPTS, 40)  # the last block reaches beyond the answer
    oracle = Oracle(drafter.config).eval()
    oracle.script(PROMPTS, known, period)
    decoded = decode(target, oracle, PROMPTS, max_new_tokens=30, on_tokens=oracle.on_tokens)
    assert [c.tokens for c in decoded.completions] == [tokens[:30] for tokens in known]
    if period > 40:
        assert decoded.acceptance == [1.0] * 5
        assert all(c.committed[:-1] == [6] * 4 for c in decoded.completions)
    else:
        lengths = {a for c in decoded.completions for a in c.accepted}
        assert {0, 1, 2} <= lengths


def test_statistics_add_up():
    target, drafter = tiny_pair("llama")
    expected = own_outputs(target.model, PROMPTS, 40)
    oracle = Oracle(drafter.config).eval()
    oracle.script(PROMPTS, expected, 3)
    decoded = decode(target, oracle, PROMPTS, max_new_tokens=30, on_tokens=oracle.on_tokens)
    for completion in decoded.completions:
        assert 1 + sum(completion.committed) == len(completion.tokens) == 30
        assert all(c <= a + 1 for c, a in zip(completion.committed, completion.accepted, strict=True))
        assert completion.tau == sum(completion.committed) / len(completion.committed)
        # The last token of a row is always a bonus token, so that no draft reaches it.
        reached = itertools.accumulate(completion.committed[:-1], initial=1)
        assert completion.verified == [min(5, 29 - n) for n in reached]
    assert decoded.tau == sum(c.tau for c in decoded.completions) / 4
    accepted = list(itertools.chain(*(c.accepted for c in decoded.completions)))
    verified = list(itertools.chain(*(c.verified for c in decoded.completions)))
    for i in range(5):
        assert decoded.acceptance[i] == sum(a > i for a in accepted) / sum(v > i for v in verified)
    assert sorted(decoded.acceptance, reverse=True) == decoded.acceptance
    assert decoded.draft_seconds > 0 and decoded.verify_seconds > 0 and decoded.prefill_seconds > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_that_ends_first_writes_nothing_more(family):
    """The longest prompt ends first and rides along while the others go on, token by token."""
    target, drafter = tiny_pair(family)
    prompts = random_prompts(1, 2, 3, 4, 5, 20)
    known = own_outputs(target.model, prompts, 40)
    oracle = Oracle(drafter.config).eval()
    oracle.script(prompts, known, *[1] * 5, 10**9)
    decoded = decode(target, oracle, prompts, max_new_tokens=20, on_tokens=oracle.on_tokens)
    assert [c.tokens for c in decoded.completions] == [tokens[:20] for tokens in known]
    assert [c.tau for c in decoded.completions] == [1.0] * 5 + [19 / 4]


def test_smaller_blocks_and_their_bounds():
    target, drafter = tiny_pair("qwen3")
    expected = own_outputs(target.model, PROMPTS, 20)
    for block_size in (2, 4):
        decoded = decode(target, drafter, PROMPTS, max_new_tokens=20, block_size=block_size)
        assert [c.tokens for c in decoded.completions] == expected
        assert len(decoded.acceptance) == block_size - 1
    for block_size in (1, 7):
        with pytest.raises(ValueError, match=f"block size {block_size}.*2 to 6"):
            decode(target, drafter, PROMPTS, max_new_tokens=4, block_size=block_size)


@pytest.mark.parametrize("family", ["llama", "sample_from_anchor", "uniform"])
@pytest.mark.parametrize("steps, greedy", [(1, True), (2, False), (3, True)])
def test_steps_of_denoising_change_no_greedy_token(family, steps, greedy):
    target, drafter = tiny_pair("llama")
    drafter.config.sample_from_anchor = family == "sample_from_anchor"
    drafter.config.noise = "uniform" if family == "uniform" else "mask"
    expected = own_outputs(target.model, PROMPTS, 20)
    options = dict(max_new_tokens=20, denoising_steps=steps, greedy_draft=greedy)
    for block_size in (2, 3, 6, "auto"):
        decoded = decode(target, drafter, PROMPTS, block_size=block_size, **options)
        assert [c.tokens for c in decoded.completions] == expected


def test_refuses_a_number_of_steps():
    target, drafter = tiny_pair("llama")
    for steps in (0, 4):
        with pytest.raises(ValueError, match=f"denoising_steps is {steps}; 1 to 3 are supported"):
            decode(target, drafter, PROMPTS, max_new_tokens=4, denoising_steps=steps)


def test_stop_tokens_and_callbacks():
    target, drafter = tiny_pair("llama")
    expected = own_outputs(target.model, PROMPTS, 30)
    stop = expected[0][12]
    streamed = {i: [] for i in range(4)}
    finished = {}
    decoded = decode(
        target,
        drafter,
        PROMPTS,
        max_new_tokens=30,
        stop_token_ids=[stop],
        on_tokens=lambda i, tokens: streamed[i].extend(tokens),
        on_finish=finished.__setitem__,
    )
    for i, (tokens, completion) in enumerate(zip(expected, decoded.completions, strict=True)):
        cut = tokens.index(stop) + 1 if stop in tokens else 30
        assert completion.tokens == tokens[:cut] == streamed[i]
        assert completion.finish_reason == ("stop" if stop in tokens else "length")
        assert finished[i] is completion


def test_stop_tokens_of_every_kind():
    target, _ = tiny_pair("llama")
    expected = own_output(target.model, PROMPTS[0], 12)
    stop = expected[5]
    for none in (None, (), [], torch.tensor([], dtype=torch.int64)):
        assert (
            decode(target, None, PROMPTS[:1], max_new_tokens=12, stop_token_ids=none).completions[0].tokens == expected
        )
    for one in (stop, [stop], {stop}, np.int64(stop), np.array([stop, 1]), torch.tensor(stop), torch.tensor([stop])):
        completion = decode(target, None, PROMPTS[:1], max_new_tokens=12, stop_token_ids=one).completions[0]
        assert completion.tokens == expected[: expected.index(stop) + 1]


@pytest.mark.parametrize("max_new_tokens", [1, 2])
def test_very_short_answers(max_new_tokens):
    target, drafter = tiny_pair("llama")
    decoded = decode(target, drafter, PROMPTS, max_new_tokens=max_new_tokens)
    assert [c.tokens for c in decoded.completions] == own_outputs(target.model, PROMPTS, max_new_tokens)


def test_a_long_prompt_is_prefilled_in_pieces():
    model = tiny_model("gemma3", max_position_embeddings=4096)
    target = Target(model)
    drafter = DFlashDrafter.for_target(target, mask_token_id=MASK_TOKEN, num_layers=1, taps=1, block_size=4).eval()
    prompts = random_prompts(1500, 40)
    decoded = decode(Target(model, drafter.config.target_layer_ids), drafter, prompts, max_new_tokens=8)
    assert [c.tokens for c in decoded.completions] == own_outputs(model, prompts, 8)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(prompts=[]), "no prompt"),
        (dict(prompts=[[5], []]), "prompt 1 has no tokens"),
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(max_new_tokens=496), "17 tokens and 496 new ones do not fit: the target has 512"),
        (dict(temperature=-1.0), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(prompts=[[5], [97]]), "prompt 1 has token 97"),
        (dict(temperature=[0.0]), "^decode: temperature has 1 entries; one number, or one for each prompt, is needed"),
        (dict(temperature=1e-39), "^decode: temperature is 1e-39; 0 or a number from 1e-30"),
        (dict(temperature=[1.0, 0.0, 1e39, 1.0]), r"^decode: temperature is 1e\+39; 0 or a number from 1e-30"),
        (dict(temperature="warm"), "^decode: temperature is 'warm'"),
        (dict(temperature=[1.0, 1.0, 1.0, None, 1.0]), "^decode: temperature has 5 entries"),
        (dict(temperature=torch.ones(4, 1)), "^decode: temperature is "),
        (dict(temperature=True), r"^decode: temperature is True \(bool\); a number is needed"),
        (dict(top_k=[1, 2, 3]), "^decode: top_k has 3 entries"),
        (dict(top_k=1.5), r"^decode: top_k is 1.5 \(float\); an int is needed"),
        (dict(top_p=[0.5, 0.5, -0.5, 0.5]), "^decode: top_p is -0.5"),
        (dict(min_p=1.5), "^decode: min_p is 1.5; 0 or a number from 0 to 1 is needed"),
        (dict(max_new_tokens=4.0), r"^decode: max_new_tokens is 4.0 \(float\); an int is needed"),
        (dict(batch_size=None), "^decode: batch_size is None; an int is needed"),
        (dict(block_size=2.0), r"^decode: block_size is 2.0 \(float\); an int is needed"),
        (dict(stop_token_ids="</s>"), "^decode: stop_token_ids is '</s>'"),
        (dict(stop_token_ids=[2.0]), "^decode: stop_token_ids is "),
        (dict(stop_token_ids=2.0), r"^decode: stop_token_ids is 2.0 \(float\); a token id, a sequence of them or None"),
        (dict(stop_token_ids=[2, -1]), "^decode: stop_token_ids has -1; token ids begin at 0"),
        (dict(seed=2**62), "^decode: seed is 4611686018427387904; 0 to 2"),
        (dict(seed=[0, 1, -1, 2]), "^decode: seed is -1; 0 to 2"),
        (dict(on_text=print), "^decode: on_text needs a tokenizer"),
        (dict(tokenizer="smollm2"), r"^decode: tokenizer is 'smollm2' \(str\); a tokenizer of transformers is needed"),
        (dict(logit_bias={3: 1, "13": 1}), "^decode: logit_bias has the key '13'; token ids are needed"),
        (dict(costs={1: {0: 1.0, 5: 1.0}}), '^costs are for block_size="auto"'),
        (dict(block_size="auto", costs={"a": 1}), "^costs is {'a': 1}; seconds by number of rows"),
    ],
)
def test_refuses_before_the_prefill(options, message, monkeypatch):
    target, drafter = tiny_pair("llama")
    monkeypatch.setattr("dflash_ext.decode.engine.prefill", None)
    options = dict(prompts=PROMPTS, max_new_tokens=4) | options
    with pytest.raises((ValueError, TypeError), match=message) as refusal:
        decode(target, drafter, options.pop("prompts"), **options)
    assert "\n" not in str(refusal.value)


def test_prompts_may_come_one_by_one():
    target, _ = tiny_pair("llama")
    listed, streamed = (decode(target, None, p, max_new_tokens=4) for p in (PROMPTS, (iter(x) for x in PROMPTS)))
    assert [c.tokens for c in streamed.completions] == [c.tokens for c in listed.completions]


@pytest.mark.parametrize(
    "prompts, what", [(["hello"], "'hello' (str)"), ([5, 6], "5 (int)"), ([[5.0]], "[5.0] (list)")]
)
def test_refuses_prompts_that_are_no_token_ids(prompts, what):
    target, _ = tiny_pair("llama")
    with pytest.raises(TypeError, match=rf"^decode: prompt 0 is {re.escape(what)}; a sequence of token ids is needed"):
        decode(target, None, prompts, max_new_tokens=4)
    with pytest.raises(TypeError, match="^decode: target is of type LlamaForCausalLM; a Target is needed"):
        decode(target.model, None, [[5]], max_new_tokens=4)


def test_refuses_a_model_in_the_place_of_a_drafter():
    target, _ = tiny_pair("llama")
    with pytest.raises(TypeError, match="^decode: drafter is of type LlamaForCausalLM; what load_pair gives"):
        decode(target, target.model, [[5]], max_new_tokens=4)


def test_refuses_a_target_tapped_elsewhere():
    target, drafter = tiny_pair("llama")
    with pytest.raises(ValueError, match="tapped at"):
        decode(Target(target.model, [0, 1, 2]), drafter, PROMPTS, max_new_tokens=4)


# ---- sampling ------------------------------------------------------------------------------------------------

VOCAB, NEW, ROWS = 5, 3, 4000


def small_pair(sharpness: float) -> tuple[Target, DFlashDrafter]:
    """A target of five tokens with pronounced preferences, and a drafter that disagrees with it."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    model.lm_head.weight.normal_(std=sharpness)
    model.model.embed_tokens.weight.normal_(std=1.0)
    target = Target(model)
    drafter = DFlashDrafter.for_target(target, mask_token_id=4, num_layers=1, taps=1, block_size=4).eval()
    return Target(model, drafter.config.target_layer_ids), drafter


def opinionated(drafter: DFlashDrafter) -> DFlashDrafter:
    """The drafter with large weights, so that what it drafts depends on its context and on the tokens of the block."""
    torch.manual_seed(0)
    for parameter in drafter.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_()
    return drafter


def exact_distribution(model, prompt, count, temperature, top_k, top_p, min_p) -> dict[tuple[int, ...], float]:
    """The target's exact probability of every continuation of `count` tokens, with the filters written out anew."""

    def filtered(p: list[float]) -> list[float]:
        kept = sorted(range(VOCAB), key=lambda i: -p[i])[: top_k or VOCAB]
        if top_p is not None:
            mass = sum(p[i] for i in kept)
            running = itertools.accumulate(p[i] / mass for i in kept)
            kept = [i for i, before in zip(kept, [0.0, *running], strict=False) if before < top_p]
        kept = [i for i in kept if p[i] >= (min_p or 0.0) * max(p)]
        total = sum(p[i] for i in kept)
        return [p[i] / total if i in kept else 0.0 for i in range(VOCAB)]

    answers = list(itertools.product(range(VOCAB), repeat=count))
    logits = model(torch.tensor([[*prompt, *answer] for answer in answers])).logits[:, len(prompt) - 1 : -1]
    known = {}  # the distribution behind each beginning of an answer
    for answer, rows in zip(answers, (logits.double() / temperature).softmax(-1).tolist(), strict=True):
        for at, row in enumerate(rows):
            if answer[:at] not in known:
                known[answer[:at]] = filtered(row)
    return {answer: math.prod(known[answer[:at]][token] for at, token in enumerate(answer)) for answer in answers}


FILTERS = ["temperature", "top_k", "top_p", "min_p"]


def expect_distribution(completions, exact: dict[tuple[int, ...], float]) -> None:
    """A chi-square test of the completions' tokens, which one fair run in about 10^5 fails."""
    rows = len(completions)
    seen = {tokens: 0 for tokens in exact}
    for completion in completions:
        seen[tuple(completion.tokens)] += 1
    assert all(seen[tokens] == 0 for tokens, p in exact.items() if p == 0)
    # Cells of few expected draws are pooled, as the chi-square approximation needs.
    cells = [(seen[t], rows * p) for t, p in exact.items() if rows * p >= 5]
    rare = [(seen[t], rows * p) for t, p in exact.items() if rows * p < 5]
    cells = [(s, e) for s, e in [*cells, tuple(map(sum, zip((0, 0), *rare, strict=True)))] if e > 0]
    chi_square = sum((s - e) ** 2 / e for s, e in cells)
    freedom = len(cells) - 1
    # Wilson-Hilferty: about one in 10^5 fair runs is beyond 4.26 standard deviations.
    z = ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert z < 4.26, (chi_square, freedom)


@pytest.mark.parametrize(
    ["drafted", *FILTERS],
    [
        (True, 1.0, None, None, None),
        (True, 0.7, None, None, None),
        (True, 1.0, 3, None, None),
        (True, 1.3, None, 0.8, None),
        (True, 1.0, None, None, 0.4),
        (False, 0.7, None, None, None),
        (False, 1.3, 3, 0.8, 0.4),
    ],
)
def test_sampling_keeps_the_targets_distribution(drafted, temperature, top_k, top_p, min_p):
    target, drafter = small_pair(0.7)
    prompt = [1, 3, 0]
    filters = dict(zip(FILTERS, (temperature, top_k, top_p, min_p), strict=True))
    exact = exact_distribution(target.model, prompt, NEW, **filters)
    drafter = drafter if drafted else None
    decoded = decode(target, drafter, [prompt] * ROWS, max_new_tokens=NEW, batch_size=1000, seed=11, **filters)
    expect_distribution(decoded.completions, exact)
    if drafted:
        accepted = [a for c in decoded.completions for a in c.accepted]
        assert 0 < sum(accepted) < len(accepted) * 3  # both acceptance and rejection took part


@pytest.mark.parametrize(
    "noise, drafting, top_k",
    [
        ("mask", dict(denoising_steps=2), None),
        ("mask", dict(denoising_steps=3), 3),
        ("mask", dict(greedy_draft=True), None),
        ("mask", dict(block_size=2), None),
        ("uniform", dict(greedy_draft=True, denoising_steps=2), 3),
        ("uniform", dict(block_size=3, denoising_steps=3), None),
        ("canvas", dict(denoising_steps=2), None),
        ("canvas", dict(block_size=3, denoising_steps=3), 3),
        ("canvas", dict(greedy_draft=True), None),
    ],
)
def test_ways_of_drafting_keep_the_targets_distribution(drafting, top_k, noise):
    target, drafter = small_pair(0.7)
    if noise == "canvas":
        denoiser, target = small_pair(0.9)[0].model, Target(target.model)
        drafter = Denoiser(Target(denoiser), self_conditioning=SelfConditioning(16, 16))
    else:
        opinionated(drafter).config.noise = noise
    prompt = [1, 3, 0]
    filters = dict(zip(FILTERS, (1.0, top_k, None, None), strict=True))
    options = dict(max_new_tokens=NEW, batch_size=1000, seed=12)
    decoded = decode(target, drafter, [prompt] * ROWS, **options, **filters, **drafting)
    expect_distribution(decoded.completions, exact_distribution(target.model, prompt, NEW, **filters))
    accepted = [a for c in decoded.completions for a in c.accepted]
    assert 0 < sum(accepted) < sum(v for c in decoded.completions for v in c.verified)


def test_every_step_of_denoising_sees_what_was_drafted_before():
    """With as many steps as tokens, each drafted token is the drafter's choice for a block that has those before it."""
    target, drafter = small_pair(0.7)
    opinionated(drafter)
    prompts = [list(pair) for pair in itertools.product(range(4), repeat=2)]
    drafts = {}
    for steps in (1, 3):
        decoded = decode(target, drafter, prompts, max_new_tokens=5, denoising_steps=steps)
        drafts[steps] = [completion.drafted[0] for completion in decoded.completions]
        for prompt, completion, drafted in zip(prompts, decoded.completions, drafts[steps], strict=True):
            for known in range(3):
                shown = drafted[:known] if steps == 3 else []
                block = torch.tensor([[completion.tokens[0], *shown, *[4] * (3 - len(shown))]])
                hidden = drafter(
                    noise_embeds=drafter.embed(target, block),
                    context_hidden_states=target.features(torch.tensor([prompt])),
                    position_ids=torch.arange(len(prompt) + 4)[None],
                ).last_hidden_state
                assert drafter.logits(target, hidden)[0, 1 + known].argmax() == drafted[known]
    assert drafts[1] != drafts[3]


def test_every_step_on_random_tokens_draws_the_whole_block_anew():
    """A second step reads the surest token of the first one, and new random tokens in the other slots."""
    target, drafter = small_pair(0.7)
    opinionated(drafter)
    drafter.config.noise = "uniform"
    prompts = [list(pair) for pair in itertools.product(range(4), repeat=2)]
    completions = decode(target, drafter, prompts, max_new_tokens=5, denoising_steps=2, seed=[7] * 16).completions

    def logits(prompt: list[int], block: torch.Tensor) -> torch.Tensor:
        hidden = drafter(
            noise_embeds=drafter.embed(target, block[None]),
            context_hidden_states=target.features(torch.tensor([prompt])),
            position_ids=torch.arange(len(prompt) + 4)[None],
        ).last_hidden_state
        return drafter.logits(target, hidden, target.head.bfloat16())[0, 1:]  # as the engine on a CPU does

    for prompt, completion in zip(prompts, completions, strict=True):
        places = len(prompt) + 1 + torch.arange(3)
        noise = [uniform_tokens(derived(torch.tensor(7), step) + places, VOCAB) for step in (0, 1)]
        anchor = torch.tensor([completion.tokens[0]])
        first = logits(prompt, torch.cat([anchor, noise[0]]))
        entropy = torch.distributions.Categorical(logits=first).entropy()
        order = entropy.sort()[0]
        kept = entropy <= order[order.cumsum(0) - order <= 0.1].max()
        second = logits(prompt, torch.cat([anchor, first.argmax(-1).where(kept, noise[1])]))
        assert second.argmax(-1).tolist() == completion.drafted[0]


def test_a_row_draws_the_same_alone_and_in_a_batch():
    target, drafter = small_pair(0.7)
    prompts = [[1, 3, 0], [2], [0, 1]]
    options = dict(max_new_tokens=12, temperature=1.0, seed=5)
    together = decode(target, drafter, prompts, **options)
    alone = decode(target, drafter, prompts, batch_size=1, **options)
    other = decode(target, drafter, prompts, **options | {"seed": 20260101})
    assert [c.tokens for c in together.completions] == [c.tokens for c in alone.completions]
    assert [c.tokens for c in together.completions] != [c.tokens for c in other.completions]


def test_filters_of_one_each_draw_as_they_do_alone():
    target, drafter = small_pair(0.7)
    prompts = [[1, 3, 0], [2], [0, 1], [3, 3]]
    each = dict(
        temperature=[1.0, 2.0, 1.5, 1.0], top_k=[None, 2, 0, 3], top_p=[0.5, None, 1.0, 0.9], min_p=[0, 0, 0.3, 0]
    )
    options = dict(max_new_tokens=12, seed=5)
    together = decode(target, drafter, prompts, **each, **options)
    for i in range(4):
        # The seed of a row is that of its place among the prompts.
        alone = decode(target, drafter, prompts, **{name: values[i] for name, values in each.items()}, **options)
        assert alone.completions[i].tokens == together.completions[i].tokens
    unfiltered = decode(target, drafter, prompts, temperature=each["temperature"], **options)
    assert [c.tokens for c in together.completions] != [c.tokens for c in unfiltered.completions]


@pytest.mark.parametrize(
    "temperature",
    [1, np.float32(1.0), np.float64(1.0), np.int64(1), np.array(1.0), torch.tensor(1.0), torch.tensor([1, 1, 1])]
    + [np.ones(3), torch.ones(3, dtype=torch.bfloat16), [1, torch.tensor(1.0), np.float16(1)], (1.0, 1.0, 1.0)],
    ids=str,
)
def test_numbers_of_every_kind(temperature):
    target, drafter = small_pair(0.7)
    prompts = [[1, 3, 0], [2], [0, 1]]
    expected = decode(target, drafter, prompts, max_new_tokens=6, temperature=1.0, top_k=3)
    numbers = dict(max_new_tokens=np.int64(6), batch_size=torch.tensor(32), seed=np.int32(0), top_k=np.int64(3))
    got = decode(target, drafter, prompts, temperature=temperature, **numbers)
    assert [c.tokens for c in got.completions] == [c.tokens for c in expected.completions]


def test_greedy_and_sampled_rows_mix():
    target, drafter = tiny_pair("llama")
    decoded = decode(target, drafter, PROMPTS, max_new_tokens=20, temperature=[0.0, 1.0, 0.0, 1.0])
    for row in (0, 2):
        assert decoded.completions[row].tokens == own_output(target.model, PROMPTS[row], 20)
    for row in (1, 3):
        assert decoded.completions[row].tokens != own_output(target.model, PROMPTS[row], 20)


def test_what_on_finish_gets_is_complete():
    target, drafter = tiny_pair("llama")
    seen = {}

    def on_finish(index, completion):
        seen[index] = completion.tau, sum(completion.committed) + 1 - len(completion.tokens)

    decoded = decode(target, drafter, random_prompts(3), max_new_tokens=9, on_finish=on_finish)
    assert seen == {i: (completion.tau, 0) for i, completion in enumerate(decoded.completions)}
