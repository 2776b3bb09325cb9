"""Every mistake of a user ends in one line on standard error and exit code 1, without a traceback."""

import json
import shutil

from safetensors.torch import load_file, save_file

from python_tests.data.words import word_tokenizer


def wrong_cases(workspace):
    target, drafter, prompts = workspace / "target", workspace / "drafter", workspace / "prompts.jsonl"
    other, tokenizers = workspace / "other", workspace / "tokenizer"
    generate = ["generate", "--target", target, "--max-new-tokens", 4]
    train = [
        "train",
        "--target",
        target,
        "--output",
        workspace / "out",
        "--steps",
        1,
        "--taps",
        "3",
        "--mask-token",
        96,
    ]
    bad = workspace / "bad.jsonl"
    bad.write_text('{"prompt": "w3"}\n{"prompt": \n')
    empty = workspace / "empty.jsonl"
    empty.write_text("")
    others, torn = workspace / "others.jsonl", workspace / "torn.jsonl"
    others.write_text('{"format": "dflash_ext.responses", "vocab_size": 98}\n')
    torn.write_text('{"format": "dflash_ext.responses", "vocab_size": 97}\n{"index": 0}\n')
    (workspace / "again").mkdir()
    shutil.copy(prompts, workspace / "again")
    evaluate = ["evaluate", "--target", target, "--drafter", drafter, "--max-new-tokens", 4]
    config = json.loads((drafter / "config.json").read_text())
    changes = {
        "other": {"num_target_layers": 9},
        "foreign": {
            "num_target_layers": 50,
            "dflash_config": {"mask_token_id": 96, "target_layer_ids": [1, 3, 40]},
        },
        "far": {"dflash_config": {"mask_token_id": 96, "target_layer_ids": [1, 3, 40]}},
        "wide": {"intermediate_size": 128},
    }
    for name, change in changes.items():
        (workspace / name).mkdir()
        (workspace / name / "config.json").write_text(json.dumps(config | change))
        (workspace / name / "model.safetensors").write_bytes((drafter / "model.safetensors").read_bytes())
    far = workspace / "far"
    state = load_file(target / "model.safetensors")
    for name in ("torn", "junk", "nan", "narrow", "odd"):
        shutil.copytree(target, workspace / name)
    norm = "model.layers.2.input_layernorm.weight"
    save_file(state | {norm: state[norm] * float("nan")}, workspace / "nan" / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (workspace / "narrow" / "config.json").write_text(json.dumps(config | {"vocab_size": 10}))
    (workspace / "odd" / "config.json").write_text(json.dumps(config | {"hidden_size": 63}))
    del state["model.layers.2.self_attn.k_proj.weight"]
    save_file(state, workspace / "torn" / "model.safetensors")
    (workspace / "junk" / "model.safetensors").write_bytes(b"not safetensors")
    word_tokenizer(200).save_pretrained(tokenizers / "larger")
    return [
        (["generate", "w3", "--target", workspace / "nowhere"], "nowhere': there is no such folder"),
        (["generate", "w3", "--target", "./nowhere"], "cannot read a target from './nowhere': there is no such folder"),
        ([*generate, "w3", "--tokenizer", "./nowhere"], "cannot read a tokenizer from './nowhere': there is no such"),
        ([*generate, "--prompts", workspace / "missing.jsonl"], "missing.jsonl: no such file"),
        ([*generate, "--prompts", empty], "the file is empty"),
        ([*generate, "--prompts", bad], "bad.jsonl:2: not valid JSON"),
        ([*generate, "--prompts", workspace], "a file is expected, this is a folder"),
        ([*generate, "w003 \udcff"], "the tokenizer refuses 'w003 "),
        ([*generate, "w003 " * 3000], "a prompt has 3000 tokens, at most 508 are allowed"),
        ([*generate, "w003", "--output", workspace], "a file in a folder that exists"),
        ([*generate, "--prompts", prompts, "--output", prompts], "reads or writes that file already"),
        (
            [*generate, "w003", "--output", workspace / "one", "--trace", workspace / "one"],
            "one: this command reads or writes that file already",
        ),
        ([*generate, ""], "a prompt has no token"),
        ([*generate, "w003", "--max-new-tokens", 999], "do not fit: the target has 512 positions"),
        ([*generate, "w003", "--device", "cuda:x"], "device 'cuda:x' is not supported"),
        ([*evaluate, "--prompts", prompts, "--prompts", workspace / "again" / "prompts.jsonl"], "have the same name"),
        ([*evaluate, "--prompts", prompts, "--field", "problem"], "prompts.jsonl:1: the key 'problem' is expected"),
        ([*evaluate, "--prompts", prompts, "--output", workspace], "a file in a folder that exists"),
        (
            [*evaluate, "--prompts", prompts, "--output", workspace / "nowhere" / "a.json"],
            "a file in a folder that exists",
        ),
        ([*train, "--answers", workspace / "missing.jsonl"], "missing.jsonl: no such file"),
        ([*train, "--answers", prompts], "prompts.jsonl: not a file of answers"),
        ([*train, "--answers", others], "a vocabulary of 98; this one has 97"),
        ([*train, "--answers", torn], "torn.jsonl:2: a row with index"),
        ([*train, "--prompts", prompts, "--learning-rate", 0], "learning_rate is 0"),
        ([*train, "--prompts", prompts, "--answers", others], "either --prompts"),
        (["train", "--target", target, "--output", prompts, *train[5:], "--prompts", prompts], "a folder is expected"),
        (
            [*train[:-4], *train[-2:], "--prompts", prompts, "--drafter", "lora", "--alpha", -1],
            "alpha is -1.0; a positive number is needed",
        ),
        (
            ["features", "--target", target, "--answers", others, "--taps", "3", "--output", prompts],
            "a folder is expected, this is a file",
        ),
        ([*generate, "w3", "--tokenizer", tokenizers / "larger"], "the tokenizer is another model's"),
        ([*generate, "w3", "--drafter", workspace / "nowhere"], "there is no such folder"),
        ([*generate, "w3", "--drafter", target], "no drafter in"),
        (
            [*generate, "w3", "--drafter", other],
            f"'{other}': the drafter was made for another target: its num_target_layers is 9",
        ),
        (
            [*generate, "w3", "--drafter", workspace / "foreign"],
            "foreign': the drafter was made for another target: its num_target_layers is 50",
        ),
        ([*generate, "w3", "--drafter", far], f"'{far}': tap 40 is out of range"),
        ([*generate, "w3", "--drafter", workspace / "wide"], "does not fit its config: 6 mismatched keys"),
        ([*generate, "w3", "--drafter", drafter, "--block-size", 1], "block size 1"),
        ([*generate, "w3", "--drafter", drafter, "--block-size", 40], "block size 40"),
        ([*generate], "needs prompts"),
        ([*generate, "w3", "--prompts", prompts], "either as arguments or in the file of --prompts: leave one of them"),
        ([*generate, "w3", "--dtype", "float8"], "dtype 'float8' is not supported"),
        ([*generate, "w3", "--device", "cuda:99"], "no CUDA device for --device cuda:99"),
        ([*train, "--prompts", prompts, "--block-size", 1], "block_size is 1"),
        ([*train, "--prompts", prompts, "--taps", "1,6"], "tap 6 is out of range"),
        ([*train, "--prompts", prompts, "--taps", "many"], "--taps is 'many'"),
        ([*train, "--prompts", prompts, "--taps", "1,x"], "--taps is 'x'"),
        ([*train, "--prompts", prompts, "--taps", "6"], "6 taps are not supported"),
        ([*train, "--prompts", prompts, "--gamma", "0"], "gamma is 0"),
        ([*generate, "w003", "--device", "meta"], "device 'meta' is not supported"),
        ([*generate, "w003", "--block-size", 4], "--block-size needs a drafter, which --drafter names"),
        ([*generate, "w003", "--drafter-base", target], "--drafter-base needs a drafter"),
        ([*generate, "w003", "--greedy-draft"], "--greedy-draft needs a drafter"),
        (
            [*generate, "w003", "--drafter", drafter, "--costs", workspace / "costs.json", "--block-size", 4],
            "--costs goes with --block-size auto",
        ),
        ([*generate[:2], workspace / "torn", "w003"], "is not whole: 1 tensors are missing"),
        ([*generate[:2], workspace / "junk", "w003"], "cannot read a target from"),
        (
            [*generate[:2], workspace / "narrow", "w003"],
            "does not fit its config: 2 mismatched keys, such as lm_",
        ),
        ([*generate[:2], workspace / "odd", "w003"], "The hidden size (63) is not a multiple"),
        ([*generate[:2], workspace / "nan", "w003"], "the target's logits are not finite after 0 decoded tokens"),
        ([*train[:-2], "--prompts", prompts], "has no mask token"),
        ([*train[:-2], "--prompts", prompts, "--mask-token", "nope"], "mask token 'nope'"),
        ([*train[:-2], "--prompts", prompts, "--mask-token", "500"], "mask token 500"),
        ([*train], "--prompts"),
    ]


def test_mistakes_that_need_no_target_are_found_before_it_is_loaded(workspace, run, monkeypatch):
    def load_target(*_, **__):
        raise ValueError("the target is loaded")

    monkeypatch.setattr("dflash_ext.models.load_target", load_target)
    prompts = workspace / "prompts.jsonl"
    train = ["train", "--target", "org/model", "--output", workspace / "out", "--mask-token", 96]
    generate = ["generate", "w003", "--target", "org/model"]
    for words, message in (
        ([*train, "--prompts", workspace / "missing.jsonl"], "missing.jsonl: no such file"),
        ([*train, "--answers", workspace / "missing.jsonl"], "missing.jsonl: no such file"),
        ([*train, "--prompts", prompts, "--field", "problem"], "the key 'problem' is expected"),
        ([*train, "--prompts", prompts, "--output", prompts], "a folder is expected"),
        ([*train, "--prompts", prompts, "--taps", "many"], "--taps is 'many'"),
        ([*train, "--prompts", prompts, "--gamma", "0"], "gamma is 0"),
        ([*generate, "--output", workspace], "a file in a folder that exists"),
        ([*train, "--prompts", prompts], "the target is loaded"),
    ):
        code, _, errors = run(*words)
        assert code == 1 and message in errors, (words, errors)
    assert not (workspace / "out").exists()


def test_every_mistake_is_one_line(workspace, run):
    for words, message in wrong_cases(workspace):
        code, printed, errors = run(*words)
        assert code == 1, (words, printed, errors)
        assert message in errors, (words, errors)
        assert len(errors.strip().splitlines()) == 1 and "Traceback" not in errors, errors
