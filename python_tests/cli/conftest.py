import json
from collections.abc import Callable

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from dflash_ext import models
from dflash_ext.cli import app
from dflash_ext.models import Denoiser, Target
from dflash_ext.train import save_drafter
from python_tests.data.words import word_tokenizer
from python_tests.decode.canvas.models import tiny_diffusion_gemma
from python_tests.tiny import MASK_TOKEN, random_prompts, tiny_pair

COMMANDS = get_command(app)  # typer's runner would make it, and all that reads the options, anew in each run


@pytest.fixture
def workspace(tmp_path):
    """A target with its tokenizer, a drafter, and a file of prompts."""
    target, drafter = tiny_pair("llama")
    target.model.save_pretrained(tmp_path / "target")
    word_tokenizer().save_pretrained(tmp_path / "target")
    save_drafter(drafter, tmp_path / "drafter")
    rows = [{"prompt": " ".join(f"w{i:03}" for i in p)} for p in random_prompts(5, 7, 9)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def gemma(workspace):
    """A workspace with a DiffusionGemma, too."""
    tiny_diffusion_gemma().save_pretrained(workspace / "gemma")
    word_tokenizer().save_pretrained(workspace / "gemma")
    return workspace


@pytest.fixture
def denoiser(workspace, monkeypatch):
    """A folder that is read as a denoiser."""
    monkeypatch.setattr(
        models, "load_denoiser", lambda model, folder: Denoiser(Target(model), MASK_TOKEN), raising=False
    )
    return ["--model", workspace / "target", "--denoiser", workspace / "drafter"]


@pytest.fixture
def text(workspace):
    """A file of documents in the words of the target's tokenizer."""
    rows = [" ".join(f"w{3 + (5 * i + j) % 90:03}" for j in range(6 + i % 9)) for i in range(20)]
    (workspace / "text.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return workspace / "text.jsonl"


@pytest.fixture
def run(monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line; returns its exit code and what it wrote to standard output and standard error."""
    monkeypatch.setattr("typer.testing._get_command", lambda _: COMMANDS)

    def run(*words):
        result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
        return result.exit_code, result.stdout, result.stderr

    return run
