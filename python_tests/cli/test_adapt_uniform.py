"""A causal LM learns uniform-state diffusion, and decodes by it."""

import json

import pytest
import torch

from dflash_ext.models import Target, UniformAdaptation, load_adaptation, load_denoiser, load_target


def words(workspace, text):
    return [
        *("adapt", "--noise", "uniform", "--model", workspace / "target", "--text", text),
        *("--output", workspace / "denoiser", "--length", 32, "--steps", 2, "--batch-size", 2, "--device", "cpu"),
    ]


@pytest.mark.parametrize(
    ("kind", "options"),
    [("whole", ("--ar-weight", 0.5)), ("gated", ()), ("full", ("--ar-weight", 0.5, "--checkpoint-activations"))],
)
def test_adapt_then_canvas(workspace, text, run, kind, options):
    code, _, errors = run(
        *words(workspace, text),
        *("--pattern", "block_causal", "--block-size", 4, "--prefix-share", "0.1,0.5", "--kind", kind),
        *("--decay", 4, "--held-out", text, "--save-every", 1, "--learning-rate", 1e-2, *options),
    )
    assert code == 0, errors
    model, _ = load_target(workspace / "target")
    adaptation = load_adaptation(workspace / "denoiser", Target(model))
    assert isinstance(adaptation, UniformAdaptation) and adaptation.config.mask_id is None
    assert adaptation.config.kind == kind
    assert adaptation.self_conditioning.down.weight.abs().max() > 0  # it has learnt from zeros
    denoiser = load_denoiser(model, workspace / "denoiser")
    assert denoiser.mask_id is None and denoiser.prefix == "causal"
    torch.testing.assert_close(denoiser.self_conditioning.state_dict(), adaptation.self_conditioning.state_dict())
    out = workspace / "out.jsonl"
    code, _, errors = run(
        *("canvas", "--model", workspace / "target", "--denoiser", workspace / "denoiser"),
        *("--prompts", workspace / "prompts.jsonl", "--canvas-length", 4, "--max-new-tokens", 8, "--steps", 3),
        *("--confidence", 0, "--output", out),
    )
    assert code == 0, errors
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 3 and all(set(row["steps"]) == {3} for row in rows)
    figures = workspace / "figures.json"
    code, _, errors = run(
        *("evaluate", "--target", workspace / "target", "--drafter", workspace / "denoiser", "--output", figures),
        *("--prompts", workspace / "prompts.jsonl", "--max-new-tokens", 8, "--denoising-steps", 2, "--tau-only"),
    )
    assert code == 0, errors
    assert json.loads(figures.read_text())["prompts"]["tau"] >= 1


def test_own_answers_instead_of_text(workspace, run):
    options = ["--prompts", workspace / "prompts.jsonl", "--max-new-tokens", 16, "--steps", 1, "--layers", 1]
    options += ["--taps", 1, "--block-size", 4, "--mask-token", "w096", "--held-out", 0, "--noise", "uniform"]
    code, _, errors = run("train", "--target", workspace / "target", "--output", workspace / "trained", *options)
    assert code == 0, errors
    answers = workspace / "trained" / "answers.jsonl"
    adapt = [word for word in words(workspace, None) if word not in ("--text", None)]
    code, said, errors = run(*adapt, "--answers", answers)
    assert code == 0 and "text: 3 documents" in said, errors
    code, _, errors = run(*adapt)
    assert code == 1 and "adapt needs either --text or --answers" in errors


def test_a_drafter_for_the_denoiser_drafts_its_canvases(workspace, text, run):
    assert run(*words(workspace, text))[0] == 0
    denoiser = ["--denoiser", workspace / "denoiser"]
    prompts = ["--prompts", workspace / "prompts.jsonl", "--max-new-tokens", 8, "--device", "cpu"]
    options = ["--layers", 1, "--taps", 1, "--block-size", 5, "--mask-token", "w096", "--held-out", 0, "--steps", 1]
    train = ["train", "--target", workspace / "target", *denoiser, *prompts, "--output", workspace / "trained"]
    code, _, errors = run(*train, *options)
    assert code == 0, errors
    out = workspace / "front.json"
    front = ["eval", "canvas", "--model", workspace / "target", *denoiser, *prompts, "--output", out]
    front += ["--canvas-length", 4, "--steps", 1]
    answers = []
    for drafting in ([], ["--drafter", workspace / "trained"]):
        code, _, errors = run(*front, *drafting)
        assert code == 0, errors
        answers.append(json.loads(out.read_text())["1 steps"]["answers"])
    assert len(answers[0]) == 3


def test_hidden_tokens_cannot_be_filled_in(workspace, text, run):
    assert run(*words(workspace, text))[0] == 0
    denoiser = ["--model", workspace / "target", "--denoiser", workspace / "denoiser"]
    code, _, errors = run("eval", "reconstruct", *denoiser, "--text", text, "--length", 32)
    assert code == 1 and "has no mask token, and cannot fill in hidden tokens" in errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--noise", "gaussian"), "--noise gaussian: masked and uniform are supported"),
        (("--pattern", "causal"), "a block sees both directions and there is no mask token"),
        (("--mask-token", "w096"), "a block sees both directions and there is no mask token"),
        (("--complementary",), "all tokens of a block count"),
        (("--kl-weight", 1), "kl_weight must be 0"),
        (("--noise", "masked", "--decay", 3), "--decay goes with --noise uniform"),
        (("--kind", "half"), "kind is 'half': whole, gated, full are supported"),
        (("--kind", "full", "--rank", 4), "--rank is an option of adapters, and --kind full has none"),
        (("--kind", "full", "--compile"), "torch.compile is supported with an adapter, and not with full weights"),
        (("--kind", "gated", "--ar-weight", 1), "the base itself reads right tokens: ar_weight must be 0"),
    ],
)
def test_mistakes_take_one_line(workspace, text, run, options, message):
    code, _, errors = run(*words(workspace, text), *options)
    assert code == 1 and message in errors and len(errors.strip().splitlines()) == 1, errors
