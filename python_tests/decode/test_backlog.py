"""What plain cycles leave for the next draft: the drafter then reads the same context as without it."""

from dflash_ext.decode import Engine
from dflash_ext.decode.drafts.backlog import MOST
from dflash_ext.decode.pace import Pace
from python_tests.decode.oracle import own_output
from python_tests.tiny import random_prompts, tiny_pair

WIDTHS = [*[0] * (MOST + 5), 5, *[0] * MOST, 3, 0, 5, 5, 0, 0, 1]  # of cycles, again and again


def drafts(engine: Engine, prompts: list[list[int]], new: int) -> list:
    requests = [engine.submit(prompt, max_new_tokens=new - 7 * i) for i, prompt in enumerate(prompts)]
    engine.run()
    for request in requests:
        assert request.completion.tokens == own_output(engine.target.model, request.prompt, request.max_new_tokens)
    return [request.completion.drafted for request in requests]


def test_a_draft_reads_what_plain_cycles_left(monkeypatch):
    target, drafter = tiny_pair("qwen3")
    found = {}
    for how in ("late", "at once", "never"):
        widths = iter(WIDTHS * 9)
        monkeypatch.setattr(Pace, "choose", lambda self, *given, widths=widths: next(widths))
        costs = {1: {0: 1.0, 5: 1.0}}
        engine = Engine(target, drafter, slots=2, max_length=140, block_size="auto", costs=costs)
        draft = engine.cycle.draft
        if how == "at once":
            draft.backlog = None
        if how == "never":
            monkeypatch.setattr(draft, "catch_up", lambda *given: None)
        found[how] = drafts(engine, random_prompts(3, 9, 5, 17, 2), 120)
    assert found["late"] == found["at once"] != found["never"]


def test_plain_cycles_only_copy_features(monkeypatch):
    engine = Engine(*tiny_pair("qwen3"), slots=1, max_length=140, block_size="auto", costs={1: {0: 1.0, 5: 99.0}})
    reads = []
    own = engine.cycle.draft.inject
    monkeypatch.setattr(engine.cycle.draft, "inject", lambda *given: reads.append(given[1].shape[1]) or own(*given))
    drafts(engine, random_prompts(9), 2 + 2 * MOST)
    assert reads == [9, MOST, MOST]
