"""Which graphs are made, and how far behind the host is meanwhile; with plain calls in the place of graphs."""

import random

import pytest

from dflash_ext.decode import Engine
from dflash_ext.decode import graphs as module
from dflash_ext.decode.drawing import Drawing
from python_tests.decode.calls import Calls, with_calls
from python_tests.decode.oracle import own_output
from python_tests.tiny import random_prompts, tiny_pair


def engine_of(drafted: bool, block_size=None, **options) -> Engine:
    target, drafter = tiny_pair("qwen3")
    options = {"slots": 4, "max_length": 200, "block_size": block_size} | options
    return with_calls(Engine(target, drafter if drafted else None, **options))


@pytest.mark.parametrize("drafted, block_size", [(False, None), (True, None), (True, "auto")])
def test_requests_join_leave_and_are_cancelled_at_random(drafted, block_size, monkeypatch):
    """Graphs are made often, so that the host is often far behind."""
    monkeypatch.setattr(module, "MISSED", 3)
    engine, chance = engine_of(drafted, block_size), random.Random(0)
    prompts = random_prompts(*(chance.randint(1, 60) for _ in range(30)))
    expected = [own_output(engine.target.model, prompt, 60) for prompt in prompts]
    requests, cancelled = [], []
    while len(requests) < len(prompts) or engine.step():
        while len(requests) < len(prompts) and chance.random() < 0.4:
            index, stops = len(requests), None
            if chance.random() < 0.4:
                stops = expected[index][chance.randint(0, 50)]
            requests.append(engine.submit(prompts[index], max_new_tokens=chance.randint(30, 60), stop_token_ids=stops))
        running = [request for request in requests if not request.done]
        if running and chance.random() < 0.03:
            cancelled.append(chance.choice(running))
            engine.cancel(cancelled[-1])
    for request, tokens in zip(requests, expected, strict=True):
        wanted = tokens[: request.max_new_tokens]
        stops = [i for i, token in enumerate(wanted) if token in request.stops]
        wanted = wanted[: stops[0] + 1] if stops else wanted
        got = request.completion.tokens
        assert got == (wanted[: len(got)] if request in cancelled else wanted)
    assert max(engine.runner.lags) > 10
    assert not engine.rows and sorted(engine.free) == [0, 1, 2, 3]


def test_the_first_cycle_of_a_kind_makes_its_graph():
    runner, drawing = engine_of(False).runner, Drawing()
    assert runner.ready(3, drawing, 0) is None and runner.plan(3, drawing, 0, 0, 100) == (4, 0)
    runner.run([0, 1, 2], drawing, 0, 4)
    assert runner.ready(1, drawing, 0) == 4 and runner.fitting(1) == 1 and runner.lag == 1


def made(runner: Calls, *keys: tuple[int, int]) -> Calls:
    runner.graphs = {(size, Drawing(), width): None for size, width in keys}
    return runner


def test_what_has_a_graph_stands_in_until_the_device_has_enough_to_do():
    runner, plan = made(engine_of(True).runner, (4, 0)), []
    while not plan or plan[-1] == (4, 0):
        plan.append(runner.plan(3, Drawing(), 5, 0, 100))
    assert len(plan) == module.AHEAD + 1 and plan[-1] == (4, 5) and runner.lag == 1
    # QUEUED seconds of cycles are enough.
    seconds = module.QUEUED / 4.5
    assert [runner.plan(3, Drawing(), 5, 0, 100, seconds) for _ in range(6)] == [(4, 0)] * 5 + [(4, 5)]


def test_nothing_is_queued_shortly_before_the_end():
    runner = made(engine_of(True).runner, (4, 0))
    assert [runner.plan(3, Drawing(), 5, 0, module.AHEAD) for _ in range(60)] == [(4, 0)] * 60 and runner.lag == 1


def test_a_larger_graph_stands_in_for_a_smaller_one():
    runner = made(engine_of(True).runner, (4, 0), (4, 5))
    plan = [runner.plan(1, Drawing(), 5, 0, 100) for _ in range(module.MISSED + module.AHEAD)]
    assert plan == [(4, 5)] * (len(plan) - 1) + [(1, 5)]
