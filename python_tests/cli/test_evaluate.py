import json

import pytest

from dflash_ext.decode import decode
from dflash_ext.train import new_drafter, save_drafter
from python_tests.tiny import MASK_TOKEN, random_prompts, tiny_pair


@pytest.fixture
def evaluate(workspace):
    words = ["evaluate", "--target", workspace / "target", "--drafter", workspace / "drafter", "--max-new-tokens", 8]
    return [*words, "--prompts", workspace / "prompts.jsonl"]


def test_the_figures_of_a_set(workspace, run, evaluate):
    out, plot = workspace / "figures.json", workspace / "figures.svg"
    code, printed, errors = run(*evaluate, "--output", out, "--plot", plot)
    assert code == 0 and not errors
    row = json.loads(out.read_text())["prompts"]
    assert row["prompts"] == 3 and row["tau"] >= 1 and len(row["acceptance"]) == 5 and row["left_out"] == {}
    assert "costs" in row["auto"] and "costs" not in row and row["plain"]["acceptance"] == []
    assert row["auto"]["tokens"] == row["tokens"] == row["plain"]["tokens"]
    assert row["plain"]["tau"] == row["plain"]["tokens_per_cycle"] == 1 <= row["auto"]["tau"]
    assert min(row["draft_ms"], row["verify_ms"], row["commit_ms"], row["plain"]["verify_ms"]) > 0
    assert row["times_plain"].keys() == {"drafter", "auto"}
    ratio = row["tokens_per_second"] / row["plain"]["tokens_per_second"]
    assert row["times_plain"]["drafter"] == pytest.approx(ratio, rel=0.01)
    for name in ("drafter", "auto", "plain"):
        assert f"prompts, {name}" in printed
    assert "<svg" in plot.read_text()


@pytest.mark.parametrize("options, runs", [(["--block-size", 4], {"plain", "times_plain"}), (["--tau-only"], set())])
def test_the_runs_that_options_leave_out(workspace, run, evaluate, options, runs):
    assert run(*evaluate, *options, "--output", workspace / "figures.json")[0] == 0
    row = json.loads((workspace / "figures.json").read_text())["prompts"]
    assert row.keys() & {"auto", "plain", "times_plain"} == runs


def test_a_run_has_the_name_of_its_block_size(run, evaluate):
    printed = run(*evaluate, "--block-size", "auto")[1]
    assert "prompts, auto" in printed and "prompts, drafter" not in printed


def test_a_plot_that_cannot_be_drawn_is_refused_first(workspace, run, evaluate):
    for name, expected in (
        ("figures.txt", "a name that ends in .png or .svg"),
        ("no/figures.png", "a file in a folder"),
    ):
        code, printed, errors = run(*evaluate, "--plot", workspace / name)
        assert code == 1 and f"--plot {workspace / name}: {expected}" in errors and not printed


@pytest.mark.parametrize("only_the_likeliest", [["--top-k", 1], ["--top-p", 1e-6], ["--min-p", 1]])
def test_a_filter_that_leaves_one_token_is_greedy(workspace, run, evaluate, only_the_likeliest):
    figures = []
    for options in ([], ["--temperature", 2, *only_the_likeliest], ["--temperature", 2]):
        assert run(*evaluate, *options, "--output", workspace / "figures.json")[0] == 0
        row = json.loads((workspace / "figures.json").read_text())["prompts"]
        figures.append([row[name] for name in ("tokens", "tau", "acceptance")])
    assert figures[0] == figures[1] != figures[2]


def test_a_prompt_that_is_too_long_is_left_out_and_counted(workspace, run, evaluate):
    texts = [" ".join(f"w{i:03}" for i in prompt) for prompt in random_prompts(5, 600, 7, 505)]
    (workspace / "long.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    code, _, errors = run(*evaluate, "--prompts", workspace / "long.jsonl", "--output", workspace / "figures.json")
    assert code == 0
    assert errors.splitlines() == [
        f"dflash-ext: left out of {workspace / 'long.jsonl'}: prompts of more than 504 tokens (2)"
    ]
    rows = json.loads((workspace / "figures.json").read_text())
    assert (rows["prompts"]["prompts"], rows["long"]["prompts"]) == (3, 2)
    assert rows["long"]["left_out"] == {"prompts of more than 504 tokens": 2}


def test_the_bound_is_the_targets_own(workspace, run, evaluate):
    """A window of its cache, or longrope, bounds rows before its table of positions does."""
    config = json.loads((workspace / "target" / "config.json").read_text())
    (workspace / "target" / "config.json").write_text(json.dumps(config | {"sliding_window": 16}))
    (workspace / "more.jsonl").write_text("".join(json.dumps({"prompt": "w003 " * n}) + "\n" for n in (8, 9)))
    code, _, errors = run(*evaluate, "--prompts", workspace / "more.jsonl")
    assert code == 0
    assert f"left out of {workspace / 'more.jsonl'}: prompts of more than 8 tokens (1)" in errors


def test_a_refused_run_leaves_the_output_alone(workspace, run, evaluate):
    out = workspace / "figures.json"
    out.write_text("mine\n")
    for refused in (["--max-prompt-tokens", 1], ["--max-new-tokens", 999], ["--block-size", 40]):
        code, printed, _ = run(*evaluate, "--output", out, *refused)
        assert code == 1 and "tau" not in printed
        assert out.read_text() == "mine\n" and not list(workspace.glob("*.part"))


def test_an_interrupt_shows_the_sets_that_are_done(workspace, run, evaluate, monkeypatch):
    calls = []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return decode(*args, **options)

    monkeypatch.setattr("dflash_ext.decode.decode", interrupted)
    (workspace / "more.jsonl").write_bytes((workspace / "prompts.jsonl").read_bytes())
    code, printed, _ = run(*evaluate, "--prompts", workspace / "more.jsonl")
    assert code == 130 and "prompts, plain" in printed and "more" not in printed


def test_two_drafters_are_compared_on_the_same_prompts(workspace, run, evaluate):
    target, _ = tiny_pair("llama")
    other = new_drafter(target, 7, mask_token_id=MASK_TOKEN, num_layers=1, taps=2, block_size=4)
    save_drafter(other, workspace / "other")
    out = workspace / "figures.json"
    code, printed, errors = run(*evaluate, "--compare", workspace / "other", "--output", out)
    assert code == 0, errors
    row = json.loads(out.read_text())["prompts"]
    assert row["compared"]["tau"] - row["tau"] == pytest.approx(row["tau_difference"]["mean"], abs=2e-4)
    assert f"prompts: tau differs by {row['tau_difference']['mean']:+.3f} (95% interval" in printed
    assert len(row["acceptance"]) == 5 and len(row["compared"]["acceptance"]) == 3
    code, _, _ = run(*evaluate, "--compare", workspace / "drafter", "--output", out)
    assert list(json.loads(out.read_text())["prompts"]["tau_difference"].values()) == [0, 0, 0]
