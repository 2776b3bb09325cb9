import json

import pytest


def test_steps_and_settings_are_crossed(workspace, run, denoiser):
    out, plot = workspace / "front.json", workspace / "front.png"
    code, printed, told = run(
        *("eval", "canvas", *denoiser, "--prompts", workspace / "prompts.jsonl", "--canvas-length", 6),
        *("--max-new-tokens", 6, "--steps", 2, "--steps", 3, "--output", out, "--plot", plot),
        *("--process", "{}", "--process", '{"order": "left_to_right"}'),
    )
    assert code == 0, told
    names = ["2 steps", "3 steps", "2 steps, order left_to_right", "3 steps, order left_to_right"]
    figures = json.loads(out.read_text())
    assert list(figures) == [*names, "base, token by token"]
    assert "the plot is in" in printed
    assert len(figures["2 steps"]["answers"]) == 3 and figures["2 steps"]["nll"]["mean"] > 0
    assert plot.stat().st_size > 0


def test_a_diffusion_gemma_has_no_base_but_may_have_a_judge(gemma, run):
    out = gemma / "front.json"
    words = ["eval", "canvas", "--model", gemma / "gemma", "--prompts", gemma / "prompts.jsonl", "--output", out]
    words += ["--max-new-tokens", 6, "--steps", 2, "--limit", 1]
    assert run(*words)[0] == 0
    assert json.loads(out.read_text())["2 steps"]["nll"] is None
    assert run(*words, "--judge", gemma / "target")[0] == 0
    assert json.loads(out.read_text())["2 steps"]["nll"]["mean"] > 0


@pytest.mark.parametrize("process", ["{", "[1]", '{"order": "up"}', '{"t_max": 1}', '{"steps": 3}'])
def test_settings_that_are_refused(workspace, run, denoiser, process):
    code, _, told = run("eval", "canvas", *denoiser, "--prompts", workspace / "prompts.jsonl", "--process", process)
    assert code == 1 and told.startswith(f"dflash-ext: --process {process}")


def test_several_denoisers_and_right_answers(workspace, run, denoiser):
    rows = [json.loads(line) for line in (workspace / "prompts.jsonl").read_text().splitlines()]
    asked, out = workspace / "asked.jsonl", workspace / "front.json"
    asked.write_text("".join(json.dumps(row | {"answer": "#### 7"}) + "\n" for row in rows))
    words = ["eval", "canvas", *denoiser, "--prompts", asked, "--canvas-length", 6, "--max-new-tokens", 6]
    words += ["--steps", 2, "--temperature", 0, "--temperature", 1, "--output", out]
    assert run(*words, "--denoiser", workspace / "target", "--references", "answer")[0] == 0
    figures = json.loads(out.read_text())
    base = "base, token by token, temperature"
    assert list(figures) == ["drafter, 2 steps", "target, 2 steps", f"{base} 0", f"{base} 1"]
    assert all(len(point["right"]) == 3 and point["exact"]["mean"] <= 1 for point in figures.values())
    code, _, told = run(*words, "--references", "solution")
    assert code == 1 and "under 'solution'" in told
