"""Where targets are read from, and what is said where there is none."""

import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from transformers import AutoModelForCausalLM

from dflash_ext.integrations import gguf
from dflash_ext.models import drafter_files, load_drafter, load_target, stop_tokens
from dflash_ext.train import save_drafter
from python_tests.data.words import word_tokenizer
from python_tests.tiny import tiny_model, tiny_pair


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "target")
    word_tokenizer().save_pretrained(tmp_path / "target")
    return tmp_path / "target"


def test_smollm2_is_the_packaged_model(folder, monkeypatch):
    monkeypatch.setattr(gguf, "smollm2_path", lambda: folder)
    model, tokenizer = load_target("smollm2", dtype=torch.float32, device=torch.device("cpu"))
    assert model.config.name_or_path == str(folder) and len(tokenizer) == 97


def test_a_folder_without_a_tokenizer_or_with_a_drafter(folder, tmp_path):
    tiny_model("qwen3").save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=f"there is no tokenizer in '{tmp_path / 'bare'}': name a place"):
        load_target(tmp_path / "bare")
    assert len(load_target(tmp_path / "bare", tokenizer=folder)[1]) == 97
    _, drafter = tiny_pair("llama")
    save_drafter(drafter, tmp_path / "drafter")
    with pytest.raises(ValueError, match="drafter' holds a drafter; a target is needed"):
        load_target(tmp_path / "drafter", tokenizer=folder)


def test_a_folder_may_be_a_path_and_be_called_as_the_packaged_model(folder, monkeypatch):
    (folder.parent / "smollm2").symlink_to(folder)
    monkeypatch.chdir(folder.parent)
    for name in (folder, "smollm2"):
        model, _ = load_target(name, tokenizer=folder, dtype=torch.float32, device=torch.device("cpu"))
        assert model.config.name_or_path == str(name)


def test_another_end_token_is_a_warning(folder, tmp_path):
    word_tokenizer(eos="w005").save_pretrained(tmp_path / "ends")
    with pytest.warns(UserWarning, match="may be another model's: it ends texts with token 5, LlamaForCausalLM with 2"):
        model, tokenizer = load_target(folder, tokenizer=tmp_path / "ends")
    assert stop_tokens(tokenizer, model) == (2, 5)


def test_reading_and_writing_weights_shows_no_bars(folder, tmp_path, capsys):
    load_target(folder)
    _, drafter = tiny_pair("llama")
    save_drafter(drafter, tmp_path / "drafter")
    load_drafter(tmp_path / "drafter")
    assert "%|" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["./nowhere", "../nowhere", "/nowhere", "nowhere/", "some/where/else", "~/nowhere"])
def test_a_path_that_is_no_folder_is_not_asked_of_the_hub(name, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(ValueError, match=rf"^cannot read a target from '{name}': there is no such folder$"):
        load_target(name)


@pytest.mark.parametrize(
    ("cause", "problem"),
    [
        (GatedRepoError, "and its owner on the hub restricts who may read it"),
        (RepositoryNotFoundError, "and the hub has no such model or does not show it to this user"),
        (LocalEntryNotFoundError, "and the hub cannot be reached"),
        (OfflineModeIsEnabled, "and the hub cannot be reached"),
        (KeyError, "and the model on the hub cannot be read: Got: something"),
    ],
)
def test_what_the_hub_answered_is_said(monkeypatch, cause, problem):
    """For targets, tokenizers and drafters alike, whatever exception wraps the hub's own."""

    def from_hub(*_, **__):
        raise OSError("Got: something\nand more") from cause.__new__(cause)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_hub)
    monkeypatch.setattr(drafter_files, "snapshot_download", from_hub)
    names = "there is no such folder, smollm2 is the one built-in name, "
    with pytest.raises(ValueError, match=f"^cannot read a target from 'org/name': {names}{problem}$"):
        load_target("org/name")
    with pytest.raises(ValueError, match=f"^no drafter in 'org/name': there is no such folder, {problem}$"):
        load_drafter("org/name")


def test_a_name_that_is_no_folder(folder, monkeypatch):
    def from_pretrained(*_, **__):
        raise OSError("We couldn't connect to the hub.\nCheck your connection.")

    with pytest.raises(ValueError, match="^cannot read a tokenizer from './nowhere': there is no such folder$"):
        load_target(str(folder), tokenizer="./nowhere")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match="target': We couldn't connect to the hub.$"):
        load_target(str(folder))
