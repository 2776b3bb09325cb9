"""How many tokens a cycle drafts: what is chosen, and that output stays the target's own."""

import random

import pytest

from dflash_ext.decode import Engine, decode
from dflash_ext.decode.graphs import PlainRunner
from dflash_ext.decode.pace import PROBE, Pace, draft_widths
from python_tests.decode.oracle import Oracle, own_output
from python_tests.tiny import random_prompts, tiny_pair

# Cycles of a GPU, where a draft costs a third of a step at any width, and of a CPU, which pays for every slot.
GPU = {0: 1.0, 1: 1.3, 3: 1.3, 7: 1.32, 15: 1.35}
CPU = {0: 1.0, 1: 1.3, 3: 1.5, 7: 2.0, 15: 3.2}


def settled(costs: dict[int, float], rate: float, seed: int = 0) -> list[int]:
    """The last choices of many, where every drafted token is accepted with the same probability."""
    chance, pace, chosen = random.Random(seed), Pace(draft_widths(15)), []
    for _ in range(600):
        chosen.append(pace.choose(costs))
        accepted = 0
        while accepted < chosen[-1] and chance.random() < rate:
            accepted += 1
        pace.observe(chosen[-1], accepted)
    return chosen[-200:]


def test_widths():
    assert draft_widths(15) == (0, 1, 3, 7, 15) and draft_widths(5) == (0, 1, 3, 5) and draft_widths(1) == (0, 1)


@pytest.mark.parametrize(
    "costs, rate, best",
    [(GPU, 0.9, {15}), (GPU, 0.6, {3, 7, 15}), (GPU, 0.05, {0}), (CPU, 0.9, {7, 15}), (CPU, 0.6, {3}), (CPU, 0.1, {0})],
)
def test_the_choice_settles_at_what_pays_most(costs, rate, best):
    """And so the loss beside plain decoding is small where no draft pays."""
    chosen = settled(costs, rate)
    assert sum(width in best for width in chosen) >= 0.95 * len(chosen)
    if best == {0}:
        assert chosen.count(1) >= len(chosen) // PROBE - 1 and {*chosen} <= {0, 1}
        assert sum(costs[width] for width in chosen) < 1.05 * len(chosen)


def test_drafting_is_taken_up_again_when_it_pays():
    pace = Pace(draft_widths(15))
    for _ in range(200):
        pace.observe(pace.choose(GPU), 0)
    assert pace.choose(GPU) == 0
    widths = []
    for _ in range(40 * PROBE):
        widths.append(pace.choose(GPU))
        pace.observe(widths[-1], widths[-1])
    assert widths[-1] == 15


def test_equal_observations_give_equal_choices():
    assert settled(CPU, 0.6, seed=1) == settled(CPU, 0.6, seed=1)


@pytest.mark.parametrize("costs", [GPU, CPU, {0: 1.0, 1: 9.0, 3: 9.0, 5: 9.0}], ids=["gpu", "cpu", "plain pays most"])
def test_output_is_the_targets_own_at_any_width(costs, monkeypatch):
    monkeypatch.setattr(PlainRunner, "cost", lambda self, size, drawing, width: costs.get(width, costs[3]))
    target, drafter = tiny_pair("qwen3")
    prompts = random_prompts(3, 9, 5, 17, 2)
    known = [own_output(target.model, prompt, 90) for prompt in prompts]
    oracle = Oracle(drafter.config).eval()
    by_length = sorted(range(5), key=lambda i: len(prompts[i]))
    oracle.script([prompts[i] for i in by_length], [known[i] for i in by_length], 3)
    place = {index: place for place, index in enumerate(by_length)}
    options = dict(max_new_tokens=80, block_size="auto")
    for draft in (drafter, oracle):
        callback = (lambda index, tokens: oracle.on_tokens(place[index], tokens)) if draft is oracle else None
        decoded = decode(target, draft, prompts, on_tokens=callback, **options)
        assert [completion.tokens for completion in decoded.completions] == [tokens[:80] for tokens in known]
    widths = {verified for completion in decoded.completions for verified in completion.verified}
    assert len(widths) > 1 and len(decoded.acceptance) == 5


def test_costs_are_measured_and_change_no_row():
    target, drafter = tiny_pair("llama")
    engine = Engine(target, drafter, slots=3, max_length=100, block_size="auto")
    prompts = random_prompts(3, 9, 5)
    requests = [engine.submit(prompt, max_new_tokens=n) for prompt, n in zip(prompts, (5, 15, 30), strict=True)]
    engine.run()
    for request, prompt in zip(requests, prompts, strict=True):
        assert request.completion.tokens == own_output(target.model, prompt, request.max_new_tokens)
    assert {size for size, _ in engine.costs} == {1, 2, 3}
    assert all(set(costs) == {0, 1, 3, 5} and min(costs.values()) > 0 for costs in engine.costs.values())
