"""Commands with a LoRA drafter's folder."""

import json

import pytest

from dflash_ext.decode import decode
from dflash_ext.models import Target, save_lora_drafter
from python_tests.decode.test_lora_drafters import pair
from python_tests.tiny import random_prompts, tiny_model

TARGET = tiny_model("llama")


@pytest.fixture
def files(workspace):
    """The options of a command with a target, a gated LoRA drafter and prompts."""
    target, drafter, _ = pair("llama", "one forward")
    save_lora_drafter(drafter, workspace / "lora")
    options = "--target", workspace / "target", "--prompts", workspace / "prompts.jsonl", "--max-new-tokens", 12
    return *options, "--drafter", workspace / "lora"


@pytest.mark.parametrize(
    "options", [[], ["--forwards", 1, "--block-size", 4], ["--groups", 2], ["--forwards", 2, "--denoising-steps", 2]]
)
def test_generate_and_a_folder_in_decode(files, workspace, run, options):
    out = workspace / "out.jsonl"
    assert run("generate", *files, "--output", out, *options)[0] == 0
    texts = [json.loads(line)["text"] for line in sorted(out.read_text().splitlines())]
    plain = workspace / "plain.jsonl"
    assert run("generate", *files[:-2], "--output", plain)[0] == 0
    assert texts == [json.loads(line)["text"] for line in sorted(plain.read_text().splitlines())]
    prompts = random_prompts(5, 7, 9)
    one, two = (
        decode(Target(TARGET), folder, prompts, max_new_tokens=12) for folder in (None, str(workspace / "lora"))
    )
    assert [c.tokens for c in one.completions] == [c.tokens for c in two.completions] and two.draft_width == 5


def test_evaluate_and_check_lossless(files, workspace, run):
    out = workspace / "figures.json"
    code, printed, _ = run("evaluate", *files, "--forwards", 1, "--output", out)
    figures = json.loads(out.read_text())["prompts"]
    assert code == 0 and figures["tau"] >= 1 and figures["times_plain"].keys() == {"drafter", "auto"}
    sampling = ["--draws", 200, "--temperature", 0.05, "--batch-size", 100]
    code, printed, _ = run("check-lossless", *files, "--groups", 1, *sampling)
    assert code == 0 and "greedy: 3 of 3 answers are equal" in printed and "fits the target's distribution" in printed


def test_another_model_verifies(files, workspace, run):
    base, drafter, _ = pair("llama", "whole")
    save_lora_drafter(drafter, workspace / "lora")
    other = tiny_model("llama", num_hidden_layers=3)
    other.save_pretrained(workspace / "other")
    options = *files, "--target", workspace / "other", "--tokenizer", workspace / "target"
    code, _, told = run("evaluate", *options)
    assert code == 1 and "was made for another base" in told
    options = *options, "--drafter-base", workspace / "target"
    out = workspace / "figures.json"
    assert run("evaluate", *options, "--tau-only", "--output", out)[0] == 0
    assert json.loads(out.read_text())["prompts"]["tau"] >= 1
    code, printed, _ = run("check-lossless", *options, "--draws", 0)
    assert code == 0 and "greedy: 3 of 3 answers are equal" in printed


def test_doctor(files, run):
    code, printed, _ = run("doctor", *files)
    assert code == 0 and "causal attention within a block" in printed and "tau of decoding" in printed


def test_what_does_not_fit_is_one_line(files, workspace, run):
    code, _, told = run("generate", *files[:-2], "--forwards", 1)
    assert code == 1 and "--forwards needs a drafter, which --drafter names" in told
    target, drafter, _ = pair("qwen3", "whole")
    save_lora_drafter(drafter, workspace / "lora")
    code, _, told = run("generate", *files)
    assert code == 1 and "made for another base: its class is 'Qwen3ForCausalLM'" in told
    target, drafter, _ = pair("llama", "whole")
    save_lora_drafter(drafter, workspace / "lora")
    code, _, told = run("generate", *files, "--forwards", 1)
    assert code == 1 and "a whole LoRA drafter acts on every row" in told
