"""How many tokens a cycle drafts: what is chosen, and that output stays the target's own."""

import random
import time

import pytest

from dflash_ext.decode import Engine, decode
from dflash_ext.decode.costs import CATCHING_UP, RUNS, Costs, draft_widths
from dflash_ext.decode.cycle import Cycle
from dflash_ext.decode.drawing import Drawing
from dflash_ext.decode.graphs import PlainRunner
from dflash_ext.decode.pace import FIRST_GUESS, MOST_LEFT, PROBE, RISK, SHARE, Pace, RowPace, Rows
from python_tests.decode.oracle import Oracle, own_output, own_outputs
from python_tests.tiny import random_prompts, tiny_pair

# Cycles of a GPU, where a draft costs a third of a step at any width, and of a CPU, which pays for every slot, with one
# row, with seven and with many. A LoRA drafter's forward takes as long as the target's.
GPU = {0: 1.0, 1: 1.3, 3: 1.3, 7: 1.32, 15: 1.35}
CPU = {0: 1.0, 1: 1.3, 3: 1.5, 7: 2.0, 15: 3.2}
SEVEN = {0: 1.0, 1: 1.53, 3: 2.7, 7: 4.3, 15: 7.4}
MANY = {0: 1.0, 1: 2.0, 3: 4.0, 7: 8.1, 15: 16.3}
LORA = {0: 1.0, 1: 2.1, 3: 2.15, 7: 2.2, 15: 2.4}


def rows(paces: list[RowPace], left: int = 1000) -> Rows:
    return Rows([row.luck for row in paces], [left] * len(paces))


def settled(costs: dict[int, float], rate: float, seed: int = 0) -> list[int]:
    """The last choices of many, where every drafted token is accepted with the same probability."""
    chance, pace, row, chosen = random.Random(seed), Pace(draft_widths(15)), RowPace(), []
    for _ in range(600):
        chosen.append(pace.choose(costs, rows([row]), list(costs)))
        pace.spend(chosen[-1], costs[chosen[-1]])
        count = accepted(chance, rate, chosen[-1])
        pace.observe([(row, chosen[-1], count)], count)
    return chosen[-200:]


def accepted(chance: random.Random, rate: float, drafted: int) -> int:
    """How many tokens of a draft are accepted."""
    return next((count for count in range(drafted) if chance.random() >= rate), drafted)


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
    pace, row = Pace(draft_widths(15)), RowPace()

    def cycle(accepts: bool) -> int:
        width = pace.choose(GPU, rows([row]), list(GPU))
        pace.spend(width, GPU[width])
        pace.observe([(row, width, width * accepts)], width * accepts)
        return width

    for _ in range(200):
        cycle(False)
    assert [cycle(True) for _ in range(40 * PROBE)][-1] == 15


@pytest.mark.parametrize("costs", [GPU, CPU, SEVEN, MANY, LORA], ids=["gpu", "cpu", "seven", "many", "lora"])
def test_a_promise_that_is_always_wrong_loses_little(costs, monkeypatch):
    """Every draft promises the most tokens, and none of its tokens is accepted."""
    monkeypatch.setattr(Pace, "rates", lambda self: [0.95] * 15)
    monkeypatch.setattr(RowPace, "observe", lambda self, *given: None)
    pace, paces, drafted = Pace(draft_widths(15)), [RowPace(), RowPace(), RowPace()], 0
    for count in range(1, 1001):
        width = pace.choose(costs, rows(paces, 1001 - count), list(costs))
        drafted += width > 0
        pace.spend(width, costs[width])
        pace.observe([(row, width, 0) for row in paces], 0)
        most = max(costs[width] - 1 for width in costs)  # what the last one may lose more than it promised
        assert pace.passed <= count + RISK * MOST_LEFT + SHARE * pace.passed + most
    assert drafted


def test_what_counts_is_when_the_last_row_ends():
    row, unlucky = RowPace(), 0.5
    row.observe(expected=6.0, accepted=1)
    assert row.luck == unlucky
    assert Rows([1.0], [100]).saved(2.0) == 2.0 and Rows([1.0], [2]).saved(2.0) == 1.0
    assert Rows([1.0, 1.0], [100, 50]).saved(2.0) == pytest.approx(2.0)
    assert Rows([1.0, unlucky], [100, 100]).saved(2.0) == pytest.approx(1.0)
    assert Rows([1.0, unlucky], [100, 30]).saved(2.0) == pytest.approx(2.0)
    assert Rows([1.0, unlucky], [100, 30], others_wait=True).saved(2.0) == pytest.approx(1.5)


def test_a_row_that_ends_leaves_those_with_their_own_luck():
    """The best row ends. What the others have accepted then counts."""
    pace, good, bad = Pace((0, 1, 3)), RowPace(), RowPace()
    costs = {0: 1.0, 1: 1.4, 3: 1.6}
    for _ in range(30):
        pace.observe([(good, 3, 3), (bad, 3, 0)], 0)
    assert pace.choose(costs, rows([good]), list(costs)) == 3
    assert pace.choose(costs, rows([bad]), list(costs)) == 0


def test_all_rows_at_rest_close_the_account():
    pace = Pace(draft_widths(3))
    pace.spend(3, 1.5)
    pace.observe([(RowPace(), 3, 3)], 3)
    assert pace.lost == -2.5 and pace.passed == 1.5
    pace.rest()
    assert pace.lost == pace.passed == 0 and pace.rates()[0] > FIRST_GUESS


def test_equal_observations_give_equal_choices():
    assert settled(CPU, 0.6, seed=1) == settled(CPU, 0.6, seed=1)


@pytest.mark.parametrize("costs", [GPU, CPU, {0: 1.0, 1: 1.6, 3: 9.0, 5: 9.0}], ids=["gpu", "cpu", "plain pays most"])
def test_output_is_the_targets_own_at_any_width(costs):
    costs = {1: {width: costs.get(width, costs[3]) for width in (0, 1, 3, 5)}}
    target, drafter = tiny_pair("qwen3")
    prompts = random_prompts(3, 9, 5, 17, 2)
    known = own_outputs(target.model, prompts, 90)
    oracle = Oracle(drafter.config).eval()
    by_length = sorted(range(5), key=lambda i: len(prompts[i]))
    oracle.script([prompts[i] for i in by_length], [known[i] for i in by_length], 3)
    place = {index: place for place, index in enumerate(by_length)}
    options = dict(max_new_tokens=80, block_size="auto", costs=costs)
    for draft in (drafter, oracle):
        callback = (lambda index, tokens: oracle.on_tokens(place[index], tokens)) if draft is oracle else None
        decoded = decode(target, draft, prompts, on_tokens=callback, **options)
        assert [completion.tokens for completion in decoded.completions] == [tokens[:80] for tokens in known]
    widths = {verified for completion in decoded.completions for verified in completion.verified}
    assert len(widths) > 1 and len(decoded.acceptance) == 5


def test_costs_are_measured_in_cycles_that_are_needed_anyway():
    target, drafter = tiny_pair("llama")
    engine = Engine(target, drafter, slots=3, max_length=100, block_size="auto")
    prompts = random_prompts(3, 9, 5)
    requests = [engine.submit(prompt, max_new_tokens=n) for prompt, n in zip(prompts, (15, 25, 40), strict=True)]
    cycles = 0
    while engine.step():
        cycles += 1
    for request, prompt in zip(requests, prompts, strict=True):
        assert request.completion.tokens == own_output(target.model, prompt, request.max_new_tokens)
    assert {rows for rows, _ in engine.costs.runs} == {CATCHING_UP, 1, 2, 3}
    counts = [len(seconds) for (rows, _), seconds in engine.costs.runs.items() if rows != CATCHING_UP]
    assert sum(counts) <= cycles and max(counts) <= RUNS
    tables = engine.costs.tables()
    assert min(tables.pop(CATCHING_UP).values()) > 0
    assert all({*table} == {0, 1, 3, 5} and min(table.values()) > 0 for table in tables.values())


def test_other_work_on_a_cpu_does_not_count(monkeypatch):
    """As long as the thread does not run, no cost grows, as beside other processes that take the processor."""
    engine = Engine(*tiny_pair("llama"), slots=1, max_length=100, block_size="auto")

    def sleep(self, slots, drawing, width, watch):
        watch.start("draft")
        time.sleep(0.5)
        watch.stop()
        return slots

    monkeypatch.setattr(Cycle, "__call__", sleep)
    _, cost = engine.runner.timed_run([0], Drawing(), 0)
    seconds, drafting = cost()
    assert drafting == seconds < 0.25


def test_catching_up_is_measured_by_the_number_of_tokens():
    costs = Costs((0, 1, 3))
    assert costs.catching_up(0) == 0 and costs.catching_up(5) is None
    costs.add_catching_up(5, 2.0)
    costs.add_catching_up(100, 3.0)
    assert [costs.catching_up(tokens) for tokens in (0, 1, 8, 64, 65, 999)] == [0.0, 2.0, 2.0, 2.0, 3.0, 3.0]
    assert costs.table(1) is None and costs.tables() == {CATCHING_UP: {8: 2.0, 128: 3.0}}
    assert not costs.knows_catching_up(5)
    for seconds in (1.0, 4.0):
        costs.add_catching_up(7, seconds)
    assert costs.knows_catching_up(5) and not costs.knows_catching_up(9) and costs.catching_up(5) == 1.0
    given = Costs((0, 1, 3), costs.tables() | {2: {0: 1.0, 3: 1.5}})
    assert (
        given.knows_catching_up(9) and given.catching_up(5) == 1.0 and given.tables()[2][1] == pytest.approx(1 + 1 / 6)
    )


def test_on_a_cpu_every_token_takes_time():
    costs = Costs((0, 1, 3), grows=True)
    costs.add_catching_up(8, 2.0)
    assert [costs.catching_up(tokens) for tokens in (1, 8, 16, 60)] == [2.0, 2.0, 4.0, 16.0]
    costs.add_catching_up(64, 9.0)
    assert [costs.catching_up(tokens) for tokens in (16, 60, 100)] == [4.0, 9.0, 18.0]


def test_what_a_draft_has_to_catch_up_counts_as_its_loss():
    cycles, each = {0: 1.0, 1: 1.2, 3: 1.3}, rows([RowPace()])
    pace = Pace((0, 1, 3))
    assert [pace.choose(cycles, each, list(cycles), lambda late=late: late) for late in (0.0, 3.0, 9.0)] == [3, 3, 0]
    pace.spend(0, 1.0 + 4.0)  # a row had no room for more
    assert pace.lost == 4.0 and pace.choose(cycles, each, list(cycles), lambda: 3.0) == 0


def test_costs_that_are_not_measured_are_estimated():
    costs = Costs((0, 1, 3, 7))
    assert costs.table(2) is None and costs.of(2, 0) == 1
    for seconds in (1.5, 1.0):
        costs.add(2, 0, seconds, 0.0)
    assert costs.table(2) is None  # plain cycles are measured three times first, and the shortest counts
    costs.add(2, 0, 1.2, 0.0)
    assert costs.table(2) == {0: 1.0, 1: 1.0, 3: 1.0, 7: 1.0} and costs.longest(2) == 1
    costs.add(2, 1, 1.4, 0.3)  # 0.1 to verify a token
    assert costs.table(2) == pytest.approx({0: 1.0, 1: 1.4, 3: 1.6, 7: 2.0}) and costs.longest(2) == 3
    assert costs.of(2, 3) == pytest.approx(1.6)
    costs.add(2, 3, 1.5, 0.3)
    assert costs.table(2) == pytest.approx({0: 1.0, 1: 1.4, 3: 1.5, 7: 1.5 + 0.2 * 4 / 3}) and costs.longest(2) == 7
    costs.add(2, 7, 3.0, 0.3)
    assert costs.table(2) == {0: 1.0, 1: 1.4, 3: 1.5, 7: 3.0}
    costs.add(4, 0, 2.0, 0.0)  # twice as much as for two rows
    assert costs.table(4) == {0: 2.0, 1: 2.8, 3: 3.0, 7: 6.0}
    assert costs.table(5) is None  # more than twice as many rows are measured anew
    assert costs.table(1) == costs.table(2) and {*costs.tables()} == {2, 4}
    assert Costs((0, 1, 3, 7), {2: {0: 1.0, 1: 1.4, 7: 1.2}}).table(2)[3] == pytest.approx(4 / 3)
    given = Costs((0, 1, 3, 7), {2: {0: 1.0, 7: 8.0}})
    assert given.table(2) == given.table(9) == {0: 1.0, 1: 2.0, 3: 4.0, 7: 8.0}
    assert Costs((0, 1, 3, 7), costs.tables()).table(4) == costs.table(4)
    with pytest.raises(ValueError, match="^costs has no table with the costs of cycles that draft 0 and 7 tokens"):
        Costs((0, 1, 3, 7), {2: {0: 1.0, 3: 2.0}})
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"^costs has {seconds} s for 7 tokens in 2 rows: above 0 is needed$"):
            Costs((0, 1, 3, 7), {2: {0: 1.0, 7: seconds}})


@pytest.mark.parametrize("costs", [GPU, CPU], ids=["gpu", "cpu"])
@pytest.mark.parametrize("prompts", [random_prompts(5), random_prompts(3, 9, 5, 17, 2)], ids=["one", "several"])
def test_a_bad_drafter_costs_less_than_a_twentieth(costs, prompts, monkeypatch):
    """The clock is that of the costs, and also runs while they are measured. Plain decoding takes 1 a step."""
    clock, own_run = [], PlainRunner.run

    def run(self, slots, drawing, width, size=None):
        clock.append(costs[width])
        return own_run(self, slots, drawing, width)

    monkeypatch.setattr(PlainRunner, "run", run)
    monkeypatch.setattr(
        PlainRunner, "timed_run", lambda self, *given: (self.run(*given), lambda: (costs[given[2]], 0.1))
    )
    target, drafter = tiny_pair("qwen3", block_size=16)
    decode(target, drafter, prompts, max_new_tokens=257, block_size="auto")
    assert sum(clock) < 1.05 * 256


def test_a_table_and_a_seed_repeat_an_answer():
    target, drafter = tiny_pair("qwen3")
    options = dict(max_new_tokens=60, block_size="auto", temperature=1.0, seed=3)
    first = decode(target, drafter, random_prompts(3, 9), **options)
    again = [decode(target, drafter, random_prompts(3, 9), **options, costs=first.costs) for _ in range(2)]
    assert [c.tokens for c in again[0].completions] == [c.tokens for c in again[1].completions]
    assert again[0].costs == first.costs


@pytest.mark.parametrize("groups", [1, 2, 7, 8])
def test_a_promise_counts_the_cycles_that_have_no_draft(groups, monkeypatch):
    """A cycle of one forward whose draft ends behind the last group is followed by one that has nothing to verify."""
    chance, pace = random.Random(0), Pace(draft_widths(7), 1, groups)
    monkeypatch.setattr(pace, "rates", lambda: [0.6] * 7)
    for width, promise in enumerate(pace.promised()):
        tokens, has_draft = 0, True
        for _ in range(4000):
            count = accepted(chance, 0.6, width) if has_draft else 0
            tokens, has_draft = tokens + count + 1, count < groups
        assert promise == pytest.approx(tokens / 4000, abs=0.1)
