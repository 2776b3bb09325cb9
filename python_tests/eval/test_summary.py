"""The summary of a decoding run, as numbers and as a table."""

import io
import json
import re

import pytest
from rich.console import Console

from dflash_ext.decode import Completion, Decoded
from dflash_ext.eval import summarize, table


@pytest.fixture
def decoded():
    """Two prompts; the second one ended in its only cycle, before the third of its accepted tokens."""
    first = Completion([1, 2, 3, 4, 5, 6], committed=[4, 1], verified=[3, 3], accepted=[3, 0])
    second = Completion([7, 8, 9], committed=[2], verified=[3], accepted=[3])
    return Decoded(
        [first, second], 3, cycles=4, prefill_seconds=9.0, draft_seconds=0.5, verify_seconds=1.3, commit_seconds=0.2
    )


def test_the_summary_by_hand(decoded):
    row = summarize(decoded)
    assert row == {
        "prompts": 2,
        "tokens": 9,
        "tau": 2.25,  # the mean of (4 + 1) / 2 and 2
        "tokens_per_cycle": 2.3333,  # 7 tokens in 3 cycles of a row
        "acceptance": [0.6667] * 3,  # two of three cycles accepted every position
        "tokens_per_second": 3.5,  # 7 tokens in 2 seconds: prefill and its token are left out
        "draft_ms": 125.0,
        "verify_ms": 325.0,
        "commit_ms": 50.0,
    }
    assert json.loads(json.dumps(row)) == row


def test_acceptance_falls_with_the_position(decoded):
    decoded.completions[0].verified, decoded.completions[0].accepted = [3] * 4, [2, 0, 1, 3]
    assert summarize(decoded)["acceptance"] == [0.8, 0.6, 0.4]


def test_acceptance_counts_only_cycles_that_verified_the_position(decoded):
    decoded.completions[1].verified, decoded.completions[1].accepted = [1], [1]
    assert summarize(decoded)["acceptance"] == [0.6667, 0.5, 0.5]


def test_an_answer_that_prefill_alone_finished():
    row = summarize(Decoded([Completion([1])], 3))
    assert (row["tau"], row["tokens_per_second"], row["draft_ms"], row["acceptance"]) == (1.0, 0.0, 0.0, [0.0] * 3)


def test_the_table_has_a_row_for_each_run(decoded):
    answer = Completion([1, 2, 3], committed=[1, 1], verified=[0, 0], accepted=[0, 0])
    plain = Decoded([answer], 0, cycles=2, verify_seconds=0.5)
    out = io.StringIO()
    Console(file=out, width=120).print(table({"speculative": decoded, "plain": plain}))
    assert "tau: tokens committed per cycle, bonus included, as the mean over prompts" in out.getvalue()
    cells = [re.split(r"  +", line.strip()) for line in out.getvalue().splitlines()]
    rows = [row for row in cells if row[0] in ("speculative", "plain")]
    assert rows == [
        ["speculative", "2", "2.25", "3.5", "125.0+325.0+50.0", "67 67 67"],
        ["plain", "1", "1.00", "4.0", "0.0+250.0+0.0", "-"],
    ]


def test_a_narrow_table_loses_nothing():
    shares = Decoded([Completion([1], committed=[1], verified=[15], accepted=[15])], 15, cycles=1, draft_seconds=2.0)
    out = io.StringIO()
    Console(file=out, width=80).print(table({"humaneval, drafter": shares}))
    assert out.getvalue().count("100") == 15
