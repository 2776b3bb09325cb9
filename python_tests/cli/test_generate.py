import json

import pytest

from dflash_ext.decode import decode
from dflash_ext.models import Target
from python_tests.data.words import word_tokenizer
from python_tests.tiny import random_prompts, tiny_pair


def test_generate_writes_the_targets_own_tokens(workspace, run):
    out = workspace / "out.jsonl"
    code, _, printed = run(
        *("generate", "--target", workspace / "target", "--drafter", workspace / "drafter"),
        *("--prompts", workspace / "prompts.jsonl", "--max-new-tokens", 12, "--output", out),
    )
    assert code == 0 and "tau" in printed
    rows = sorted(map(json.loads, out.read_text().splitlines()), key=lambda r: r["index"])
    target, _ = tiny_pair("llama")
    plain = decode(Target(target.model), None, random_prompts(5, 7, 9), max_new_tokens=12, stop_token_ids=[2])
    tokenizer = word_tokenizer()
    expected = [tokenizer.decode(c.tokens, skip_special_tokens=True) for c in plain.completions]
    assert [row["text"] for row in rows] == expected


@pytest.mark.parametrize("only_the_likeliest", [["--top-k", 1], ["--top-p", 1e-6], ["--min-p", 1]])
def test_a_filter_that_leaves_one_token_is_greedy(workspace, run, only_the_likeliest):
    texts = []
    for options in ([], ["--temperature", 2, *only_the_likeliest]):
        out = workspace / "out.jsonl"
        files = ["--target", workspace / "target", "--prompts", workspace / "prompts.jsonl", "--output", out]
        assert run("generate", *files, "--max-new-tokens", 12, *options)[0] == 0
        texts.append([json.loads(line)["text"] for line in sorted(out.read_text().splitlines())])
    assert texts[0] == texts[1]


def test_penalties_and_a_bias_change_answers(workspace, run):
    texts = {}
    for options in (
        [],
        ["--repetition-penalty", 1.5],
        ["--presence-penalty", 2, "--frequency-penalty", 1],
        ["--logit-bias", '{"9": 100}'],
    ):
        out = workspace / "out.jsonl"
        files = ["--target", workspace / "target", "--prompts", workspace / "prompts.jsonl", "--output", out]
        assert run("generate", *files, "--max-new-tokens", 12, *options)[0] == 0
        texts[str(options)] = [json.loads(line)["text"] for line in sorted(out.read_text().splitlines())]
    assert len(set(map(tuple, texts.values()))) == 4
    assert set(" ".join(texts.popitem()[1]).split()) == {"w009"}
    code, _, told = run("generate", "w005", "--target", workspace / "target", "--logit-bias", '{"a": 1}')
    assert code == 2 and "does not give numbers to token ids" in told


def test_stop_ends_answers_before_a_text(workspace, run):
    target = ["--target", workspace / "target", "--max-new-tokens", 12]
    whole, cut = ([], [])
    for texts, stop in ((whole, []), (cut, ["--stop", "never", "--stop", " w"])):
        out = workspace / "out.jsonl"
        assert run("generate", *target, "--prompts", workspace / "prompts.jsonl", "--output", out, *stop)[0] == 0
        texts += sorted(map(json.loads, out.read_text().splitlines()), key=lambda row: row["index"])
    assert [row["text"] for row in cut] == [row["text"].split(" w")[0] for row in whole]
    assert [row["finish_reason"] for row in cut] == ["stop"] * 3
    _, printed, _ = run("generate", "w005 w006 w007", *target, "--stop", " w")
    assert printed.strip() == whole_answer(run, target).split(" w")[0]


def whole_answer(run, target) -> str:
    return run("generate", "w005 w006 w007", *target)[1].strip()


def test_generate_streams_one_prompt(workspace, run):
    code, printed, told = run("generate", "w005 w006 w007", "--target", workspace / "target", "--max-new-tokens", 4)
    assert code == 0 and "w" in printed and "tau" not in printed and "tau" in told


def conversations(path, *questions):
    """A file of the questions, in which one conversation has the result of a tool."""
    rows = [{"messages": [{"role": "user", "content": question}]} for question in questions]
    rows[0]["messages"].insert(0, {"role": "tool", "content": "w001"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_cannot_be_used_is_left_out_and_named_in_one_line(workspace, run):
    """A prompt that is too long and a turn of a tool stop none of the others."""
    prompts = conversations(workspace / "chats.jsonl", "w005 w006", "w007 " * 600, "w008")
    out = workspace / "out.jsonl"
    generate = ["generate", "--target", workspace / "target", "--prompts", prompts, "--max-new-tokens", 4]
    code, printed, told = run(*generate, "--output", out)
    assert code == 0
    assert sorted(json.loads(line)["index"] for line in out.read_text().splitlines()) == [0, 2]
    line = f"dflash-ext: left out of {prompts}: turns of role 'tool' (1), prompts of more than 508 tokens (1)"
    assert line in told.splitlines()
    _, printed, told = run(*generate, "--max-prompt-tokens", 1)
    assert "prompt 3" in printed and "prompt 1" not in printed and "more than 1 tokens (2)" in told


@pytest.mark.parametrize(
    "refused",
    [
        ["--max-prompt-tokens", 1],
        ["--max-new-tokens", 999],
        ["--block-size", 4],
        ["--stop", ""],
    ],
)
def test_a_refused_run_leaves_the_output_alone(workspace, run, refused):
    out = workspace / "out.jsonl"
    out.write_text("mine\n")
    words = ["generate", "--target", workspace / "target", "--prompts", workspace / "prompts.jsonl", "--output", out]
    assert run(*words, *refused)[0] == 1
    assert out.read_text() == "mine\n" and not list(workspace.glob("*.part"))
    assert run(*words, "--max-new-tokens", 4)[0] == 0
    assert len(out.read_text().splitlines()) == 3 and not list(workspace.glob("*.part"))


def test_an_interrupt_keeps_the_old_output_and_what_was_written(workspace, run, monkeypatch):
    def interrupted(*args, on_finish, **options):
        done = decode(*args, **options)
        on_finish(0, done.completions[0])
        raise KeyboardInterrupt

    monkeypatch.setattr("dflash_ext.decode.decode", interrupted)
    out = workspace / "out.jsonl"
    out.write_text("mine\n")
    words = ["generate", "--target", workspace / "target", "--prompts", workspace / "prompts.jsonl", "--output", out]
    code, _, told = run(*words, "--max-new-tokens", 4)
    assert code == 130 and "what was written so far is in" in told and "out.jsonl.part" in told
    assert out.read_text() == "mine\n"
    assert json.loads((workspace / "out.jsonl.part").read_text())["index"] == 0


def test_a_variable_that_the_chat_template_does_not_have_is_said(workspace, run):
    words = ["generate", "w005", "--target", workspace / "target", "--max-new-tokens", 2, "--chat-template-args"]
    code, _, told = run(*words, '{"enable_thinking": false}')
    assert code == 0 and "the tokenizer's chat template has no variable 'enable_thinking'" in told
    for wrong in ("enable_thinking", "[1]"):
        assert run(*words, wrong)[0] == 2


def test_the_block_size_may_be_chosen_by_cycle(workspace, run):
    files = ["--target", workspace / "target", "--drafter", workspace / "drafter", "--max-new-tokens", 8]
    printed = [run("generate", "w005 w006 w007", *files, *size)[1] for size in ([], ["--block-size", "auto"])]
    assert printed[0] == printed[1]
    assert printed[0] == run("generate", "w005 w006 w007", *files, "--block-size", 3)[1]
    code, _, told = run("generate", "w005", *files, "--block-size", "wide")
    assert code == 2 and "'wide' is no number of slots" in " ".join(told.split())


def test_costs_are_written_once_and_then_read(workspace, run):
    costs = workspace / "costs.json"
    files = ["--target", workspace / "target", "--drafter", workspace / "drafter", "--max-new-tokens", 30]
    sampled = ["generate", "w005 w006", *files, "--temperature", 1, "--costs", costs]
    assert run(*sampled)[0] == 0
    written = costs.read_text()
    assert json.loads(written)["1"]["0"] > 0
    assert run(*sampled)[1] == run(*sampled)[1] and costs.read_text() == written
    costs.write_text("[]")
    code, _, told = run(*sampled)
    assert code == 1 and f"{costs} has no costs of cycles" in told


def test_a_trace_shows_every_cycle(workspace, run):
    page = workspace / "trace.html"
    files = [
        "--target",
        workspace / "target",
        "--drafter",
        workspace / "drafter",
        "--prompts",
        workspace / "prompts.jsonl",
    ]
    assert run("generate", *files, "--max-new-tokens", 8, "--trace", page)[0] == 0
    text = page.read_text()
    assert text.count('class="answer"') == 3 and "cycle 1: " in text and text.startswith("<!doctype html>")
