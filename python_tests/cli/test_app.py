"""What all commands share."""

import json
import os
import subprocess
import sys
import warnings
from typing import get_type_hints
from unittest.mock import Mock

import pytest
import torch
import typer
from typer.main import get_command

import dflash_ext
from dflash_ext.cli import app
from dflash_ext.cli.output import replacing
from dflash_ext.decode import Engine, decode
from dflash_ext.decode.kv_cache import SCRATCH

COMMANDS = (
    *("demo", "train", "answers", "features", "adapt", "generate", "canvas", "evaluate"),
    *("check-lossless", "doctor", "probe", "eval"),
)


def test_the_module_is_the_command():
    """What only some commands need is not imported."""
    command = [sys.executable, "-X", "importtime", "-m", "dflash_ext", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"dflash_ext {dflash_ext.__version__}\n"
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "torch" in imported and not imported & {"transformers", "torch._dynamo"}


def test_every_command_and_option_has_a_help_text_that_is_a_sentence(run):
    group = get_command(app)
    assert tuple(group.commands) == COMMANDS
    assert tuple(group.commands["eval"].commands) == ("reconstruct", "ablate", "canvas")
    commands = {(name,): command for name, command in group.commands.items()}
    commands |= {("eval", name): command for name, command in group.commands["eval"].commands.items()}
    for name, command in commands.items():
        assert run(*name, "--help")[0] == 0
        assert command.help.endswith(".") and command.help[0].isupper()
        for option in command.params:
            assert option.help.endswith(".") and option.help[0].isupper(), (name, option.name)


def test_no_option_takes_a_number_that_is_not_finite():
    """Whatever its bounds, and before anything is read."""
    group = get_command(app)
    commands = {(name,): command for name, command in group.commands.items() if name != "eval"}
    commands |= {("eval", name): command for name, command in group.commands["eval"].commands.items()}
    tried = 0
    for name, command in commands.items():
        needed = [word for p in command.params if p.required for word in ([p.opts[0], "1"] if p.opts else [])]
        for option in command.params:
            if "float" not in str(get_type_hints(command.callback).get(option.name)):
                continue
            for number in ("nan", "inf", "-inf"):
                with pytest.raises(typer.BadParameter) as refused:
                    command.make_context(name[-1], [*needed, option.opts[0], number])
                assert refused.value.param is option, (name, option.name, number)
                tried += 1
    assert tried > 60


def test_flags_take_no_value_in_the_help(run):
    _, printed, _ = run("train", "--help")
    assert "--resume" in printed and "bool" not in printed


def test_commands_that_decode_have_the_same_options():
    """They differ in what they decode and print, and in options that change or end the answers of a user."""
    commands = get_command(app).commands
    generate, evaluate = ({p.name: p for p in commands[name].params} for name in ("generate", "evaluate"))
    penalties = {"repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias"}
    assert set(generate) - set(evaluate) == {"prompt", "trace", "stop", "costs"} | penalties
    assert set(evaluate) - set(generate) == {"compare", "plot", "tau_only"}
    for name in set(evaluate) - {"drafter", "prompts", "output", "compare", "plot", "tau_only", "block_size"}:
        assert evaluate[name].help == generate[name].help, name


def test_the_largest_block_is_in_the_help():
    commands = get_command(app).commands
    told = [
        p.help
        for name in ("generate", "evaluate", "check-lossless")
        for p in commands[name].params
        if p.name == "block_size"
    ]
    told += [" ".join(decoder.__doc__.split()) for decoder in (Engine, decode)]
    assert len(told) == 5 and all(f"a LoRA drafter and a denoiser take up to {SCRATCH}" in text for text in told)


def test_a_mistake_is_one_line_or_a_traceback_on_request(workspace, run):
    words = ["generate", "w003", "--target", workspace / "nowhere"]
    code, _, errors = run(*words)
    assert code == 1 and len(errors.splitlines()) == 1
    with pytest.raises(ValueError, match="there is no such folder"):
        run("--traceback", *words)


def test_a_warning_is_one_line(run, monkeypatch):
    """Python adds the place in the code, which tells a user nothing."""
    lines = []

    def load(*args, **options):
        lines.append(warnings.formatwarning("an odd tokenizer", UserWarning, "loading.py", 75))
        raise ValueError("no model")

    monkeypatch.setattr("dflash_ext.models.load_target", load)
    before = warnings.formatwarning
    assert run("probe", "--model", "any")[0] == 1
    assert lines == ["dflash-ext: an odd tokenizer\n"] and warnings.formatwarning is before


def test_a_file_is_replaced_when_the_new_one_is_complete(tmp_path):
    path, link = tmp_path / "a.txt", tmp_path / "link.txt"
    path.write_text("old")
    link.symlink_to(path)
    with pytest.raises(RuntimeError), replacing(link) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "old" and (tmp_path / "a.txt.part").read_text() == "half"
    with pytest.raises(RuntimeError), replacing(path):
        raise RuntimeError
    assert path.read_text() == "old" and not (tmp_path / "a.txt.part").exists()
    with replacing(link) as file:
        file.write("new")
    assert path.read_text() == "new" and link.is_symlink() and len(list(tmp_path.iterdir())) == 2


def test_a_pipe_is_written_to(workspace, run):
    """Also by the name of an open file, as the shell's >(...) and /dev/stdout give it."""
    reads, writes = os.pipe()
    output = f"/dev/fd/{writes}"
    code, _, errors = run(
        *("generate", "w003", "w004", "--target", workspace / "target", "--max-new-tokens", 2, "--output", output)
    )
    os.close(writes)
    with open(reads) as pipe:
        assert code == 0 and [json.loads(line)["index"] for line in pipe] == [0, 1], errors


def test_a_file_that_cannot_be_opened_is_named_alone(tmp_path, capsys):
    (tmp_path / "a.txt.part").mkdir()
    (tmp_path / "a.txt.part" / "b").touch()
    with pytest.raises(IsADirectoryError, match="a.txt.part"), replacing(tmp_path / "a.txt"):
        pass
    assert not capsys.readouterr().err


def test_memory_that_does_not_suffice_is_one_line_and_a_bug_is_not(workspace, run, monkeypatch):
    words = ["generate", "w003", "--target", workspace / "target"]
    monkeypatch.setattr("dflash_ext.models.load_target", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    assert run(*words)[::2] == (1, "dflash-ext: CUDA out of memory\n")
    monkeypatch.setattr("dflash_ext.models.load_target", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        run(*words)
