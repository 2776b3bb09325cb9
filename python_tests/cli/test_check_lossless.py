from functools import partial

import pytest

from dflash_ext import progress
from dflash_ext.decode import cycle
from python_tests.eval.test_lossless import believing


def checked(workspace, run, *options):
    files = ["--target", workspace / "target", "--drafter", workspace / "drafter"]
    return run("check-lossless", *files, "--prompts", workspace / "prompts.jsonl", "--max-new-tokens", 8, *options)


@pytest.mark.parametrize(
    "draws, drafting", [(0, []), (200, []), (200, ["--denoising-steps", 2]), (200, ["--greedy-draft"])]
)
def test_a_lossless_drafter_passes(workspace, run, draws, drafting):
    sampling = ["--draws", draws, "--temperature", 0.05, "--batch-size", 100]
    code, printed, _ = checked(workspace, run, *sampling, *drafting)
    assert code == 0
    assert "greedy: 3 of 3 answers are equal token by token" in printed
    assert ("the second token of 200 answers fits the target's distribution" in printed) == bool(draws)


def test_progress_is_shown_while_it_decodes(workspace, run, monkeypatch):
    monkeypatch.setattr(progress, "_lines", partial(progress._lines, every=0))
    code, printed, _ = checked(workspace, run, "--draws", 20)
    assert code == 0
    for what, total in (("decoding greedily", 6), ("sampling answers", 20)):
        shown = [line for line in printed.splitlines() if line.startswith(what)]
        assert [line.partition(",")[0] for line in shown] == [f"{what}: {n} of {total}" for n in range(1, total + 1)]


def test_too_few_draws_say_nothing(workspace, run):
    """At temperature 1 the tiny target finds all tokens about as likely."""
    code, printed, _ = checked(workspace, run, "--draws", 20)
    assert code == 0 and "sampling: the second token of 20 answers says nothing at this temperature" in printed


def test_a_divergence_is_named_with_its_regret(workspace, run, monkeypatch):
    monkeypatch.setattr(cycle, "verify", believing)
    code, printed, told = checked(workspace, run, "--draws", 0)
    assert code == 1 and "the output is not the target's own" in told
    assert "greedy: 0 of 3 answers are equal" in printed
    assert "prompt 1, token 2:" in printed and "nats: wrong" in printed
    code, printed, _ = checked(workspace, run, "--draws", 0, "--tolerance", 100)
    assert code == 0 and printed.count("a tie of rounding") == 3
