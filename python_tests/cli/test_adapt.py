import json

import pytest

from dflash_ext.models import Target, load_adaptation, load_target


def words(workspace, text):
    return [
        *("adapt", "--model", workspace / "target", "--text", text, "--output", workspace / "denoiser"),
        *("--length", 32, "--steps", 2, "--batch-size", 2, "--device", "cpu"),
    ]


def test_adapt(workspace, text, run):
    """The defaults are those of the build log; every setting reaches the run."""
    code, out, errors = run(*words(workspace, text), "--held-out", text, "--save-every", 1)
    assert code == 0, errors
    assert (
        "denoiser: whole adapter of rank 16 on 42 linear layers" in out and "20 documents, 6 rows of 32 tokens" in out
    )
    model, _ = load_target(workspace / "target")
    adaptation = load_adaptation(workspace / "denoiser", Target(model))
    assert (adaptation.config.pattern, adaptation.adapter.scale, adaptation.config.mask_id) == ("prefix_block", 2.0, 97)
    settings = json.loads((workspace / "denoiser" / "training.json").read_text())["recipe"]
    assert (settings["steps"], settings["batch_size"]) == (2, 2)
    assert (workspace / "denoiser" / "curve.png").exists()
    code, out, errors = run(*words(workspace, text), "--held-out", text, "--resume")
    assert code == 0 and "checkpoint-2" in out, errors
    code, _, errors = run(*words(workspace, text), "--held-out", text, "--resume", "--kl-weight", 0.5)
    assert code == 1 and "other options: its kl_weight is 0.0, this one's is 0.5" in errors, errors
    text.write_text(text.read_text().replace("w010", "w011"))
    code, _, errors = run(*words(workspace, text), "--held-out", text, "--resume")
    assert code == 1 and "other options: its samples' fingerprint is" in errors, errors


def test_every_option(workspace, text, run):
    code, _, errors = run(
        *words(workspace, text),
        *("--pattern", "block_causal", "--block-size", 4, "--context", "causal", "--prefix-share", "0.1,0.5"),
        *("--mask-rate", "0.2,0.8", "--span", 1, "--complementary", "--inverse-rate", "--ar-weight", 0.2),
        *("--kl-weight", 0.1, "--mask-token", "w096", "--rank", 4, "--alpha", 8, "--linear-layers", "q_proj,v_proj"),
        *("--learning-rate", 1e-3, "--attention", "sdpa", "--accumulation", 2, "--seed", 3),
    )
    assert code == 0, errors
    model, _ = load_target(workspace / "target")
    adaptation = load_adaptation(workspace / "denoiser", Target(model))
    config, adapter = adaptation.config, adaptation.adapter
    assert (config.pattern, config.context, config.block_size, config.mask_id) == ("block_causal", "causal", 4, 96)
    assert (adapter.rank, adapter.scale, len(adapter.paths)) == (4, 2.0, 12)


def test_a_mask_token_that_the_text_has_is_named(workspace, text, run):
    code, out, errors = run(*words(workspace, text), "--mask-token", "w003")
    assert code == 0, errors
    assert f"the text has the mask token 3 in {text.read_text().count('w003')} places" in out


def test_full_weights_are_a_model_with_its_tokenizer(workspace, text, run):
    code, _, errors = run(*words(workspace, text), "--kind", "full", "--save-every", 1)
    assert code == 0, errors
    _, tokenizer = load_target(workspace / "denoiser")
    assert tokenizer.get_vocab() == load_target(workspace / "target")[1].get_vocab()
    code, _, errors = run(*words(workspace, text), "--kind", "gated", "--resume")
    assert code == 1 and "another denoiser: its kind is full, this one's is gated" in errors, errors


def test_the_folder_of_the_model_is_not_overwritten(workspace, text, run):
    before = (workspace / "target" / "model.safetensors").read_bytes()
    link = workspace / "link"
    link.symlink_to(workspace / "target")
    for output in (workspace / "target", link):
        for command in (words(workspace, text), ("train", "--target", workspace / "target", "--prompts", text)):
            code, _, errors = run(*command, "--output", output, "--overwrite")
            assert code == 1 and f"--output {output}: the model is read from this folder" in errors, errors
    assert (workspace / "target" / "model.safetensors").read_bytes() == before


def test_answers_have_prefixes_of_their_own(workspace, run):
    options = ("--answers", "answers.jsonl", "--output", workspace / "denoiser", "--prefix-share", 0.3)
    code, _, errors = run("adapt", "--model", workspace / "target", *options)
    assert code == 1 and "--prefix-share is for text, and --answers have their prompts as prefixes" in errors, errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mask-rate", "much"), "--mask-rate is 'much': a share such as 0.5, or two such as 0.1,0.6, are expected"),
        (("--prefix-share", "0.8,0.2"), "0.8 to 0.2 is no share"),
        (("--prefix-share", "1"), "a prefix of 1 leaves no token to denoise: a share below 1 is needed"),
        (("--cuda-graphs",), "cuda_graphs is for LoRA drafters, and for denoisers of masked noise"),
        (("--mask-rate", "0"), "a mask rate of 0 hides no token"),
        (("--mask-rate", ""), "--mask-rate is ''"),
        (("--pattern", "diagonal"), "pattern is 'diagonal': causal, prefix_block, block_causal are supported"),
        (("--pattern", "block_causal"), "--pattern block_causal needs --block-size, which is missing"),
        (("--block-size", 4), "--block-size goes with --pattern block_causal alone, and the pattern is prefix_block"),
        (("--length", 5000), "text.jsonl has 213 tokens: at least a row of 5000 is needed"),
        (("--mask-token", "w999"), "mask token 'w999' is not in the tokenizer's vocabulary"),
        (("--text", "nowhere.txt"), "nowhere.txt: no such file"),
    ],
)
def test_mistakes_take_one_line(workspace, text, run, options, message):
    code, _, errors = run(*words(workspace, text), *options)
    assert code == 1 and message in errors and len(errors.strip().splitlines()) == 1, errors
