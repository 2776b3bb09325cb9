"""Targets of other families than Llama at the command line: they are served, or refused in one line."""

import inspect

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from python_tests.cli.conftest import word_tokenizer
from python_tests.tiny import MASK_TOKEN, SHAPE


@pytest.fixture
def target(tmp_path, request):
    """A folder with a random model of the family that the test names, and a tokenizer."""
    config_class = CONFIG_MAPPING[request.param]
    known = {*inspect.signature(config_class.__init__).parameters, *config_class.attribute_map}
    config = config_class(**{name: value for name, value in SHAPE.items() if name in known})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "target")
    word_tokenizer().save_pretrained(tmp_path / "target")
    return tmp_path / "target"


@pytest.mark.parametrize("target", ["gpt2", "gpt_neox", "phi", "cohere"], indirect=True)
def test_served(target, run):
    code, out, errors = run("generate", "--target", target, "w005 w007", "--max-new-tokens", 4, "--device", "cpu")
    assert code == 0 and out.strip(), errors


@pytest.mark.parametrize("target", ["bloom", "mamba", "bert"], indirect=True)
def test_refused_in_one_line(target, tmp_path, run):
    (tmp_path / "prompts.txt").write_text("w005 w007\n")
    train = ("train", "--prompts", tmp_path / "prompts.txt", "--output", tmp_path / "out", "--mask-token", MASK_TOKEN)
    for words in (("generate", "w005 w007"), train):
        code, _, errors = run(*words, "--target", target, "--device", "cpu")
        assert code == 1 and "cannot be a target" in errors and len(errors.strip().splitlines()) == 1, errors
