"""What cycles leave for the next draft: the drafter then knows the same context as one that reads at once."""

import pytest
import torch

from dflash_ext.decode import Engine
from dflash_ext.decode.cycle import Cycle
from dflash_ext.decode.drafts.backlog import Backlog, UnreadTokens
from dflash_ext.decode.pace import Pace
from dflash_ext.models import Target
from python_tests.decode.calls import with_calls
from python_tests.decode.canvas.models import tiny_denoiser
from python_tests.decode.oracle import own_output
from python_tests.decode.test_lora_drafters import pair_of
from python_tests.tiny import random_prompts, tiny_model, tiny_pair

MOST = 16
# Of cycles, again and again: what each drafts, by its place among the widths that the engine may choose.
CHOICES = [*[0] * (MOST + 5), -1, *[0] * MOST, 2, 0, -1, -1, 0, 0, 1, *[0] * 7, 1, 0, 0, 2]


def canvas_pair():
    torch.manual_seed(0)
    return Target(tiny_model("llama")), tiny_denoiser("qwen3", mask_id=None)


PAIRS = {
    "features": lambda: tiny_pair("qwen3"),
    "whole": lambda: pair_of(tiny_model("gemma3"), "whole")[:2],
    "canvas": canvas_pair,
}


def shorten(monkeypatch, most: int) -> None:
    """So many features of a row may wait, and so many tokens of a row are read at a time."""
    for name in ("block.MOST", "backlog.CHUNK", "base.CHUNK"):
        monkeypatch.setattr(f"dflash_ext.decode.drafts.{name}", most)


@pytest.fixture(params=PAIRS)
def make(request, monkeypatch):
    """Makes engines that draft as CHOICES say, with a short backlog."""
    shorten(monkeypatch, MOST)

    def made(slots: int = 2) -> Engine:
        choices = iter(CHOICES * 99)
        monkeypatch.setattr(Pace, "choose", lambda self, *given: self.widths[next(choices)])
        target, drafter = PAIRS[request.param]()
        costs = {1: {0: 1.0, 5: 1.0, 7: 1.0}}
        return Engine(target, drafter, slots=slots, max_length=140, block_size="auto", costs=costs)

    return made


def drafts(engine: Engine, prompts: list[list[int]], new: int) -> list:
    requests = [engine.submit(prompt, max_new_tokens=new - 7 * i) for i, prompt in enumerate(prompts)]
    engine.run()
    for request in requests:
        assert request.completion.tokens == own_output(engine.target.model, request.prompt, request.max_new_tokens)
    return [request.completion.drafted for request in requests]


def at_once(self, slots, width):
    """Everything is read before each cycle."""
    return [[slot] for slot in slots if self.counts[slot]]


def test_a_draft_reads_what_cycles_left(make, monkeypatch):
    found = {}
    for how, late in ("late", Backlog.late), ("at once", at_once), ("never", lambda *given: []):
        monkeypatch.setattr(Backlog, "late", late)
        # A draft of tokens has room for a few by itself. What exceeds it must have been read.
        if how != "never" or not isinstance(make().cycle.draft.backlog, UnreadTokens):
            found[how] = drafts(make(), random_prompts(3, 9, 5, 17, 2), 120)
    assert found["late"] == found["at once"] != found.get("never")


def expect_caches(engine: Engine, answers: dict, make, tolerance: float = 1e-3) -> int:
    """What the drafter has read of rows is what it reads of the same texts as prompts. Returns the number of rows.

    answers: what the requests will get.
    """
    backlog, checked = engine.cycle.draft.backlog, 0
    for slot, request in engine.rows.items():
        start, _, _, active, _ = engine.state.numbers[slot].tolist()
        if not active:
            continue
        is_read = int(backlog.read[slot]) if isinstance(backlog, UnreadTokens) else start - backlog.counts[slot]
        assert start - backlog.ring.shape[1] <= is_read <= start
        fresh = make()
        fresh.submit([*request.prompt, *answers[request]][:is_read], max_new_tokens=1)
        fresh.run()
        for mine, others in zip(engine.cycle.draft.cache.layers, fresh.cycle.draft.cache.layers, strict=True):
            for ours, expected in zip(mine, others, strict=True):
                ours, expected = ours[slot, :, :is_read].float(), expected[0, :, :is_read].float()
                wrong = (ours - expected).norm(dim=(0, 2)) > tolerance * expected.norm(dim=(0, 2))
                assert not wrong.any(), wrong.nonzero()
        checked += 1
    return checked


@pytest.mark.parametrize("how", ["plain calls", "behind", "faults", "filled up"])
@torch.no_grad()
def test_the_context_of_rows_that_come_and_go(make, how, monkeypatch):
    """Also if the host is behind the device, if cycles fail at their very end and are run again, and in few shapes."""
    engine = make(slots=3)
    if how == "behind":
        with_calls(engine)
    engine.cycle.draft.backlog.has_few_shapes = how == "filled up"
    calls, own = [], Cycle._count

    def fails(self, slots, *given):
        calls.append(len(slots))
        if how == "faults" and len(slots) > 1 and len(calls) % 3 == 0:
            raise RuntimeError("a fault")
        own(self, slots, *given)

    monkeypatch.setattr(Cycle, "_count", fails)
    requests = [
        engine.submit(prompt, max_new_tokens=90 - 13 * i) for i, prompt in enumerate(random_prompts(3, 9, 5, 17, 2, 30))
    ]
    answers = {r: own_output(engine.target.model, r.prompt, r.max_new_tokens) for r in requests}
    choose, checked, steps = Pace.choose, 0, 0
    while engine.step():
        steps += 1
        if steps % 23 == 0:
            checked += expect_caches(engine, answers, make)
            monkeypatch.setattr(Pace, "choose", choose)
        if steps == 30:
            engine.cancel(requests[1])
    for request, expected in answers.items():
        tokens = request.completion.tokens
        assert tokens == (expected[: len(tokens)] if request is requests[1] else expected)
    assert checked > 5


def test_plain_cycles_only_copy(make, monkeypatch):
    engine, reads = make(slots=1), []
    monkeypatch.setattr(Pace, "choose", lambda *given: 0)
    own = engine.cycle.draft.inject
    monkeypatch.setattr(engine.cycle.draft, "inject", lambda *given: reads.append(given[2].shape[1]) or own(*given))
    drafts(engine, random_prompts(9), 2 + 2 * MOST)
    assert reads == ([9] if isinstance(engine.cycle.draft.backlog, UnreadTokens) else [9, MOST, MOST])


@pytest.mark.parametrize("few_shapes", [False, True])
def test_many_late_rows_are_read_in_parts(make, few_shapes, monkeypatch):
    monkeypatch.setattr("dflash_ext.decode.drafts.backlog.AT_ONCE", 2 * MOST)
    engine, reads = make(slots=8), []
    draft = engine.cycle.draft
    draft.backlog.has_few_shapes = few_shapes
    own_inject, own_catch_up = draft.inject, draft.catch_up

    def catch_up(*given):
        draft.inject = lambda *what: reads.append(tuple(what[2].shape)) or own_inject(*what)
        own_catch_up(*given)
        draft.inject = own_inject

    monkeypatch.setattr(draft, "catch_up", catch_up)
    drafts(engine, random_prompts(*range(3, 11)), 60)
    assert (2, MOST) in reads
    assert all(rows * tokens <= 2 * MOST for rows, tokens in reads)
    assert not few_shapes or all(count.bit_count() == 1 for shape in reads for count in shape)


def test_a_cleared_slot_keeps_nothing(make):
    engine = make()
    draft = engine.cycle.draft
    draft.backlog.ring.fill_(5)
    draft.cache.keys.fill_(5)
    draft.clear(1)
    assert not draft.backlog.ring[1].any() and not draft.cache.keys[:, 1].any()
    assert draft.backlog.ring[0].all() and draft.cache.keys[:, 0].all()
