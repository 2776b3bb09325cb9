import contextlib
import json
from functools import partial

import pytest

from dflash_ext.cli import app
from python_tests.cli.test_train import words
from python_tests.train.ranks import in_processes, torchrun


def command(told, *words) -> None:
    """Runs a command line as one of several processes, which add what they write to standard error to the file `told`.

    The console of errors writes to what `sys.stderr` is then.
    """
    with open(told, "a") as file, contextlib.redirect_stderr(file):
        app([str(word) for word in words], standalone_mode=False)


def by_torchrun(told, *words) -> None:
    torchrun("--module", "dflash_ext", *words)


@pytest.mark.parametrize(
    "started",
    [partial(in_processes, command), pytest.param(by_torchrun, marks=pytest.mark.slow)],
    ids=["fork", "torchrun"],
)
def test_ranks_divide_the_prompts_of_the_command(workspace, run, started):
    """Sampled answers, too, are those of one process. A file that a killed run of two ranks left is used."""
    train = [*words(workspace), "--temperature", 0, "--temperature", 0.9]
    one, two = workspace / "one", workspace / "two"
    code, _, errors = run(*train, "--output", one, "--accumulation", 2)
    assert code == 0, errors
    header, *answers = (one / "answers.jsonl").read_bytes().splitlines(keepends=True)
    two.mkdir()
    (two / "answers.jsonl").write_bytes(header + answers[0])
    # The kill came while the second rank's answers were moved: one of them is in both files.
    (two / "answers.jsonl.rank1").write_bytes(header + answers[0] + answers[1] + answers[2][:-3])
    started(workspace / "told.txt", *train, "--output", two)
    assert sorted((two / "answers.jsonl").read_bytes().splitlines(keepends=True)[1:]) == sorted(answers)
    assert not list(two.glob("*.rank*")) and (two / "curve.png").exists()
    losses = [
        [entry["loss"] for entry in json.loads((folder / "training.json").read_text())["log"] if "loss" in entry]
        for folder in (one, two)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_answers_of_several_processes(workspace, run):
    """`answers` writes what `train` would, and `train --answers` reads it. Processes encode and answer parts, and what
    is left out is counted over all of them."""
    asked = ["--target", workspace / "target", "--prompts", workspace / "prompts.jsonl", "--max-new-tokens", 16]
    train = words(workspace)
    assert run(*train, "--output", workspace / "trained")[0] == 0
    expected = (workspace / "trained" / "answers.jsonl").read_bytes().splitlines()
    code, printed, errors = run("answers", *asked, "--output", workspace / "one.jsonl")
    assert code == 0 and "the answers are in" in printed, errors
    assert (workspace / "one.jsonl").read_bytes().splitlines() == expected
    in_processes(command, workspace / "told.txt", "answers", *asked, "--output", workspace / "two.jsonl")
    assert sorted((workspace / "two.jsonl").read_bytes().splitlines()) == sorted(expected)
    short = ["answers", *asked, "--output", workspace / "short.jsonl", "--max-prompt-tokens", 8]
    in_processes(command, workspace / "told.txt", *short)
    assert (workspace / "told.txt").read_text().count("prompts of more than 8 tokens (1)") == 1
    assert len((workspace / "short.jsonl").read_bytes().splitlines()) == 3
    train[train.index("--prompts") : train.index("--prompts") + 2] = ["--answers", workspace / "two.jsonl"]
    code, _, errors = run(*train, "--output", workspace / "again")
    assert code == 0, errors


def test_processes_share_the_layers_of_the_target(workspace, run):
    lora = ["--drafter", "lora", "--rank", 4, "--block-size", 4, "--mask-token", "w096"]
    lora += ["--steps", 2, "--batch-size", 2]
    asked = ["--target", workspace / "target", "--prompts", workspace / "prompts.jsonl", "--max-new-tokens", 16]
    assert run("answers", *asked, "--output", workspace / "answers.jsonl")[0] == 0
    train = ["train", "--target", workspace / "target", "--answers", workspace / "answers.jsonl", *lora]
    assert run(*train, "--output", workspace / "one")[0] == 0
    options = ["--output", workspace / "two", "--tensor-parallel"]
    in_processes(command, workspace / "told.txt", *train, *options)
    logs = [json.loads((workspace / folder / "training.json").read_text())["log"] for folder in ("one", "two")]
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert run("generate", "hello", *asked[:2], "--drafter", workspace / "two", "--max-new-tokens", 4)[0] == 0
