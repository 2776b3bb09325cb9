import json

import pytest

from dflash_ext.cli.eval_ablate import read_prompts
from dflash_ext.data import DataError
from dflash_ext.eval.ablation import AblationPrompt
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
    text.write_text("".join(f'"w{word:03}"\n' for word in range(3, 90)))
    code, _, errors = run(*words, "--denoiser", denoisers[0])
    assert code == 1 and "text.jsonl: there is nothing to denoise, since no document has 4 tokens" in errors
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
    for variant, message in (
        ("J", "there is no variant 'J'"),
        ("x={}{", "--variant x"),
        ('x={"step": 3}', "--variant x"),
        ('x={"steps": 2.5}', "--variant x: steps is 2.5 (float); an integer is needed"),
        ('x={"temperature": "low"}', "--variant x: MaskedDiffusion: temperature is 'low' (str); a number"),
        ("={}", "a name of its own is needed"),
        ("A_baseline={}", "--variant A_baseline={}: a name of its own is needed before the ="),
    ):
        code, _, errors = run(*words, *sizes, "--variant", "A_baseline", "--variant", variant)
        assert code == 1 and message in errors and len(errors.strip().splitlines()) == 1, errors


def test_prompts_of_an_ablation(tmp_path):
    file = tmp_path / "asked.jsonl"
    row = {"kind": "code", "prompt": "a\u2028b"}  # JSON need not write this line separator in another way
    file.write_text(f"\n{json.dumps(row, ensure_ascii=False)}\n")
    assert read_prompts(file) == [AblationPrompt(**row)]
    for wrong in ({"text": "a"}, row | {"prompt": 5}, row | {"kind": ["code"]}, row | {"suffix": None}, [1]):
        file.write_text(f"\n{json.dumps(wrong)}\n")
        with pytest.raises(DataError, match="asked.jsonl, line 2: the texts 'kind', 'prompt' and perhaps 'suffix'"):
            read_prompts(file)
    file.write_text("\n")
    with pytest.raises(DataError, match="there is no prompt in it"):
        read_prompts(file)
