"""The demo's second part; SmolLM2 itself is decoded in python_tests/decode/test_smollm2.py."""

import io

import pytest
from rich.console import Console
from safetensors.torch import load_file

from dflash_ext.demo import real
from dflash_ext.models import load_drafter
from dflash_ext.models.lora import LoraDrafterConfig
from python_tests.data.words import word_tokenizer
from python_tests.tiny import tiny_pair


def test_the_shipped_drafter_is_whole_and_made_for_smollm2():
    config = load_drafter(real.DRAFTER).config
    assert (config.hidden_size, config.num_target_layers, config.vocab_size) == (576, 30, 49152)
    assert config.mask_token_id == 16 and config.block_size >= 8


def test_the_shipped_lora_drafter_is_whole_and_small():
    sizes = [file.stat().st_size for file in real.LORA_DRAFTER.iterdir() if file.name.startswith(("adapter", "lora"))]
    assert sum(sizes) < 10e6
    config = LoraDrafterConfig.load(real.LORA_DRAFTER / "lora_drafter.json")
    assert (config.kind, config.block_size, config.mask_token_id) == ("gated", 8, 16)
    tensors = load_file(real.LORA_DRAFTER / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 30 and all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize("count", [1, 6])
def test_prompts_are_answered_and_compared(monkeypatch, count):
    target, drafter = tiny_pair("llama", block_size=10)
    asked, compared = {}, []

    def compare(console, target, drafter, tokenizer, prompts, *, max_new_tokens, stop_token_ids, block_size):
        asked.update(prompts)
        compared.append(drafter)
        assert target.tap_ids == tuple(drafter.config.target_layer_ids)
        assert (max_new_tokens, stop_token_ids, block_size) == (5, (2,), 8)
        console.print("compared")

    monkeypatch.setattr(real, "load_target", lambda name, dtype: {"smollm2": (target.model, word_tokenizer())}[name])
    monkeypatch.setattr(real, "load_pair", lambda model, folder: (target, drafter))
    monkeypatch.setattr(real, "compare", compare)
    out = io.StringIO()
    real.real_model(Console(file=out, width=160), count=count, max_new_tokens=5)
    assert "compared" in out.getvalue() and "this part took" in out.getvalue()
    assert len(compared) == 2, "the DFlash drafter and the LoRA drafter"
    assert len(asked) == count and all(asked.values())
    assert next(iter(asked)).startswith("A baker sells 12 loaves")
