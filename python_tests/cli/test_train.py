import json
import logging

import pytest
import torch

from dflash_ext import models
from dflash_ext.data import AnswerDataset
from dflash_ext.models import Denoiser, Target, load_drafter, load_lora_drafter, load_target
from python_tests.data.words import word_tokenizer
from python_tests.tiny import MASK_TOKEN


def words(workspace):
    return [
        *("train", "--target", workspace / "target", "--prompts", workspace / "prompts.jsonl"),
        *("--mask-token", "w096", "--layers", 1, "--taps", "1,3", "--block-size", 4, "--steps", 2, "--batch-size", 2),
        *("--anchors", 4, "--max-new-tokens", 16, "--held-out", 0.34),
    ]


def test_train(workspace, run):
    """A drafter from prompts in one command; a second run reuses the answers."""
    out = workspace / "trained"
    train = [*words(workspace), "--output", out]
    code, printed, errors = run(*train)
    assert code == 0, errors
    drafter = load_drafter(out)
    assert drafter.config.target_layer_ids == [1, 3] and drafter.config.mask_token_id == 96
    assert {p.name for p in out.iterdir()} >= {"answers.jsonl", "config.json", "model.safetensors", "training.json"}
    answers = (out / "answers.jsonl").read_text()
    assert run(*train, "--overwrite")[0] == 0
    assert (out / "answers.jsonl").read_text() == answers
    assert "answers: 2 to train on, 1 held out\n" in printed
    header, answer, *others = answers.splitlines(keepends=True)
    short = json.dumps(json.loads(answer) | {"response_ids": [5]})
    (out / "answers.jsonl").write_text("".join([header, short + "\n", *others]))
    assert "answers: 1 to train on, 1 held out, 1 too short to train on\n" in run(*train, "--overwrite")[1]


@pytest.mark.parametrize(
    ("denoiser", "message"),
    [
        (
            lambda model: Denoiser(Target(model), MASK_TOKEN),
            "only canvases of denoisers of uniform noise begin with drafts",
        ),
        (lambda model: Denoiser(Target(model), encoder=Target(model)), "a drafter of the base serves both"),
    ],
    ids=["masked", "gated"],
)
def test_denoisers_whose_canvases_take_no_drafter_of_theirs(workspace, run, monkeypatch, denoiser, message):
    """They are refused before prompts are answered."""
    monkeypatch.setattr(models, "load_denoiser", lambda model, folder: denoiser(model), raising=False)
    out = workspace / "trained"
    code, _, errors = run(*words(workspace), "--denoiser", workspace / "drafter", "--output", out)
    assert code == 1 and message in errors
    assert not (out / "answers.jsonl").exists()


def test_the_seed_decides_what_is_drawn(workspace, run):
    """The drafter's first weights too: a run can be repeated."""
    losses = []
    for seed in (1, 1, 2):
        out = workspace / f"run {len(losses)}"
        code, _, errors = run(*words(workspace), "--output", out, "--seed", seed)
        assert code == 0, errors
        losses.append([entry["loss"] for entry in json.loads((out / "training.json").read_text())["log"][:1]])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.filterwarnings("error:the drafter in")
def test_the_slot_of_the_anchor_may_draft(workspace, run):
    """A block of four slots then drafts four tokens, in the evaluation of the training, too."""
    out = workspace / "trained"
    code, printed, errors = run(*words(workspace), "--output", out, "--sample-from-anchor")
    assert code == 0, errors
    assert printed.count("vLLM's DFlash does not read sample_from_anchor and drafts from slot 1 on\n") == 1
    assert load_drafter(out).config.first_draft_slot == 0
    log = json.loads((out / "training.json").read_text())["log"]
    assert any("eval_acceptance_4" in entry for entry in log)


def test_a_training_may_begin_with_a_drafter(workspace, run):
    first, second = workspace / "first", workspace / "second"
    train = [*words(workspace), "--steps", 1, "--save-every", 1]
    assert run(*train, "--output", first, "--learning-rate", 0.1)[0] == 0
    code, _, errors = run(*train, "--output", second, "--start-from", first, "--learning-rate", 1e-9, "--seed", 7)
    assert code == 0, errors
    begun, trained = (load_drafter(folder).state_dict() for folder in (first, second))
    for name, weights in begun.items():
        torch.testing.assert_close(trained[name], weights, rtol=1e-2, atol=1e-6)  # they are saved in bfloat16
    code, _, errors = run(*train, "--output", workspace / "third", "--start-from", first, "--taps", "0,3")
    assert code == 1 and "the drafter to start from has target_layer_ids [1, 3], the new one [0, 3]" in errors


def test_turns_of_one_conversation_stay_together(workspace, run):
    rows = [[f"w{10 + conversation:03} w{number:03}" for number in (5, 6, 7)] for conversation in range(6)]
    chats = [{"messages": [{"role": "user", "content": turn} for turn in turns]} for turns in rows]
    (workspace / "prompts.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    out = workspace / "trained"
    code, printed, errors = run(*words(workspace), "--output", out)
    assert code == 0, errors
    _, *answers = map(json.loads, (out / "answers.jsonl").read_text().splitlines())
    assert sorted(answer["conversation"] for answer in answers) == [i for i in range(6) for _ in range(3)]
    assert ", 6 held out" in printed
    sides = AnswerDataset(out / "answers.jsonl", 99).split(0.34)
    first_words = [{int(side[i]["input_ids"][0]) for i in range(len(side))} for side in sides]
    assert len(first_words[1]) == 2 and not first_words[0] & first_words[1]


def test_an_evaluation_decodes_held_out_prompts(workspace, run):
    out = workspace / "trained"
    code, printed, errors = run(*words(workspace), "--output", out, "--evaluate-every", 1)
    assert code == 0, errors
    log = json.loads((out / "training.json").read_text())["log"]
    evaluations = [entry for entry in log if "eval_tau" in entry]
    assert [entry["step"] for entry in evaluations] == [1, 2]
    assert {"eval_loss", "eval_acceptance_1", "eval_acceptance_3", "eval_tokens_per_second"} <= evaluations[0].keys()
    assert f"step 1: loss {evaluations[0]['eval_loss']:.2f} on held-out samples, tau " in printed
    assert (out / "curve.png").exists()


def test_chat_template_args_are_kept_with_the_answers(workspace, run):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}{{ ' w009' if enable_thinking else ' w010' }}"
    tokenizer.save_pretrained(workspace / "target")
    out = workspace / "trained"
    train = [*words(workspace), "--output", out]
    code, _, errors = run(*train, "--chat-template-args", '{"enable_thinking": true}')
    assert code == 0, errors
    header, *answers = map(json.loads, (out / "answers.jsonl").read_text().splitlines())
    assert header["chat_template_args"] == {"enable_thinking": True}
    assert all(answer["prompt_ids"][-1] == 9 for answer in answers)
    code, _, errors = run(*train, "--overwrite")
    assert code == 1 and "made with other chat template args" in errors


def test_a_refused_run_leaves_the_output_folder_alone(workspace, run):
    """A run that is refused changes nothing, and does not hold up the next one."""
    out = workspace / "trained"
    train = [*words(workspace), "--output", out]
    for refused in (["--max-new-tokens", 999], ["--max-prompt-tokens", 1], ["--block-size", 1], ["--block-size", 0]):
        assert run(*train, *refused)[0] == 1
    code, _, errors = run(*train, "--save-every", 1)
    assert code == 0, errors
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for refused in (
        [],
        ["--overwrite", "--max-new-tokens", 12],
        ["--overwrite", "--max-prompt-tokens", 1],
        ["--resume", "--layers", 2],
        ["--resume", "--gamma", 4],
        ["--overwrite", "--limit", 2],
        ["--overwrite", "--max-length", 4],
    ):
        code, _, errors = run(*train, *refused)
        assert code == 1, refused
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before, refused


@pytest.mark.filterwarnings("error")
def test_resume_is_said(workspace, run):
    """By the command alone: an option may have changed, of which Trainer would warn."""
    told, handler = [], logging.Handler()
    handler.emit = told.append
    logging.getLogger("transformers.trainer_utils").addHandler(handler)
    out = workspace / "trained"
    train = [*words(workspace), "--output", out, "--resume", "--save-every", 1]
    code, printed, errors = run(*train)
    assert code == 0 and "%|" not in errors, errors  # checkpoints are saved without a bar
    assert "nothing to resume: there is no complete checkpoint in" in printed
    _, printed, _ = run(*train, "--steps", 3, "--evaluate-every", 1)
    assert f"continuing from {out / 'checkpoint-2'}" in printed
    logging.getLogger("transformers.trainer_utils").removeHandler(handler)
    assert not told


def test_a_process_of_torchrun_has_its_own_gpu(workspace, run, monkeypatch):
    for name, value in {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)

    def load_target(name, *, device, **options):
        raise ValueError(f"the target is loaded to {device}")

    monkeypatch.setattr("dflash_ext.models.load_target", load_target)
    train = [*words(workspace), "--output", workspace / "out"]
    for device, expected in ((), "cuda:1"), (("--device", "cuda"), "cuda:1"), (("--device", "cuda:0"), "cuda:0"):
        code, _, errors = run(*train, *device)
        assert code == 1 and f"the target is loaded to {expected}" in errors


def test_training_on_written_features(workspace, run):
    out = workspace / "trained"
    assert run(*words(workspace), "--output", out)[0] == 0
    given = ["--target", workspace / "target", "--answers", out / "answers.jsonl", "--taps", "1,3"]
    code, printed, errors = run("features", *given, "--output", workspace / "features")
    assert code == 0, errors
    assert "the features of 3 answers at layers [1, 3] are in" in printed
    train = [word for word in words(workspace) if word not in ("--prompts", workspace / "prompts.jsonl")]
    again = ["--answers", out / "answers.jsonl", "--output", workspace / "again", "--features", workspace / "features"]
    code, _, errors = run(*train, *again)
    assert code == 0, errors
    losses = [
        [entry["loss"] for entry in json.loads((folder / "training.json").read_text())["log"] if "loss" in entry]
        for folder in (out, workspace / "again")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("kind, forwards", [("gated", 1), ("whole", 2)])
def test_a_lora_drafter(workspace, run, kind, forwards):
    out = workspace / "trained"
    train = [
        *("train", "--target", workspace / "target", "--prompts", workspace / "prompts.jsonl", "--output", out),
        *("--mask-token", "w096", "--drafter", "lora", "--lora-kind", kind, "--linear-layers", "o_proj"),
        *("--rank", 4, "--block-size", 4, "--steps", 2, "--batch-size", 2, "--anchors", 4),
        *("--max-new-tokens", 16, "--held-out", 0.34),
        *("--kl-weight", 0.5, "--context-ratio", "0.1,0.3", "--noise-ratio", 0.9, "--causal", "--sampler-width", 8),
        *("--forwards", forwards),
    ]
    code, printed, errors = run(*train)
    assert code == 0, errors
    assert f"a {kind} adapter of rank 4 on 6 linear layers" in printed
    drafter = load_lora_drafter(out, Target(load_target(workspace / "target")[0]))
    config = drafter.config
    assert (config.kind, config.block_size, config.causal, config.sampler_width) == (kind, 4, True, 8)
    written = json.loads((out / "training.json").read_text())
    recipe, tau = written["recipe"], [entry["eval_tau"] for entry in written["log"] if "eval_tau" in entry]
    assert len(tau) == 1 and tau[0] >= 1, "an evaluation decodes held-out prompts"
    assert (recipe["kl_weight"], recipe["context_ratio"], recipe["noise_ratio"]) == (0.5, [0.1, 0.3], 0.9)
    assert recipe["forwards"] == forwards
    drafts = [name for entry in written["log"] for name in entry if name.startswith("eval_acceptance_")]
    assert len(drafts) == 1 + forwards, "one forward drafts a token less"
    again = [*train, "--output", workspace / "smaller", "--rank", 2, "--learning-rate", 1e-9, "--start-from", out]
    assert run(*again)[0] == 0
    smaller = load_lora_drafter(workspace / "smaller", Target(load_target(workspace / "target")[0]))
    assert smaller.adapter.rank == 2 and torch.equal(smaller.mask_embedding, drafter.mask_embedding)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--drafter", "eagle"], "--drafter 'eagle' is not known: choose one of dflash, lora"),
        (["--drafter", "lora", "--taps", "1,3"], "--taps is an option of --drafter dflash, not of lora"),
        (["--kl-weight", "1"], "--kl-weight is an option of --drafter lora, not of dflash"),
        (
            ["--drafter", "lora", "--tensor-parallel"],
            "--tensor-parallel is for training on --answers, which must be given",
        ),
        (
            ["--drafter", "lora", "--forwards", "1", "--block-size", "2", "--mask-token", "w096"],
            "a cycle of one forward takes blocks of 3 slots or more",
        ),
        (["--drafter", "lora", "--context-ratio", "half"], "--context-ratio is 'half': a share such as 0.5, or two"),
        (["--drafter", "lora", "--lora-kind", "both", "--mask-token", "w096"], "the kind of a LoRA drafter is 'both'"),
    ],
)
def test_options_of_another_kind_of_drafter_are_refused(workspace, run, options, message):
    base = ["train", "--target", workspace / "target", "--prompts", workspace / "prompts.jsonl"]
    code, _, errors = run(*base, "--output", workspace / "trained", *options)
    assert code == 1 and message in errors
    assert not (workspace / "trained").exists()
