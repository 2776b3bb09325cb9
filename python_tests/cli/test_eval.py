import json

import pytest

from dflash_ext.models import save_adaptation
from python_tests.models.test_adaptation import adaptation_of


@pytest.fixture
def denoisers(workspace):
    """Folders of two denoisers of the workspace's target."""
    for name in ("causal", "prefix_block"):
        save_adaptation(adaptation_of("llama", pattern=name), workspace / name)
    return workspace / "causal", workspace / "prefix_block"


def test_reconstruct(workspace, text, denoisers, run):
    words = ("eval", "reconstruct", "--model", workspace / "target", "--text", text, "--length", 32, "--device", "cpu")
    out, plot = workspace / "figures.json", workspace / "plot.png"
    code, printed, errors = run(
        *words, "--denoiser", denoisers[0], "--denoiser", denoisers[1], "--output", out, "--plot", plot, "--rows", 4
    )
    assert code == 0, errors
    told = json.loads(out.read_text())
    assert told["settings"]["rows"] == 4 and list(told["denoisers"]) == ["causal", "prefix_block"]
    assert list(told["denoisers"]["causal"]) == ["0.15", "0.25", "0.5"] and plot.exists()
    code, _, errors = run(*words, "--denoiser", workspace / "nowhere")
    assert code == 1 and "no denoiser in" in errors
    code, _, errors = run(*words, "--denoiser", denoisers[0], "--denoiser", denoisers[0])
    assert code == 1 and "have the same name" in errors


def test_ablate(workspace, denoisers, run):
    words = ("eval", "ablate", "--model", workspace / "target", "--denoiser", denoisers[1], "--device", "cpu")
    sizes = ("--samples", 1, "--canvas-length", 8, "--max-new-tokens", 8)
    prompts = workspace / "asked.jsonl"
    prompts.write_text(json.dumps({"kind": "code", "prompt": "w005 w006"}) + "\n")
    files = {name: workspace / f"out.{name}" for name in ("json", "svg", "md")}
    code, printed, errors = run(
        *words,
        *sizes,
        "--prompts",
        prompts,
        "--variant",
        "I_argmax",
        "--variant",
        'slow={"steps": 8}',
        *("--output", files["json"], "--plot", files["svg"], "--answers", files["md"]),
    )
    assert code == 0, errors
    told = json.loads(files["json"].read_text())
    assert list(told)[:2] == ["I_argmax", "slow"] and len(told["slow"]["answers"]) == 1
    assert files["svg"].exists() and "**slow**" in files["md"].read_text()
    prompts.write_text('{"text": "w005"}\n')
    code, _, errors = run(*words, *sizes, "--prompts", prompts)
    assert code == 1 and "asked.jsonl, line 1: 'kind', 'prompt' and perhaps 'suffix' are expected" in errors
    for variant, message in (
        ("J", "there is no variant 'J'"),
        ("x={}{", "--variant x"),
        ('x={"step": 3}', "--variant x"),
    ):
        code, _, errors = run(*words, *sizes, "--variant", variant)
        assert code == 1 and message in errors and len(errors.strip().splitlines()) == 1, errors
