"""The demo's second part; SmolLM2 itself is decoded in python_tests/decode/test_smollm2.py."""

import io

import pytest
from rich.console import Console

from dflash_ext.demo import real
from dflash_ext.models import load_drafter
from python_tests.data.words import word_tokenizer
from python_tests.tiny import tiny_pair


def test_the_shipped_drafter_is_whole_and_made_for_smollm2():
    config = load_drafter(real.DRAFTER).config
    assert (config.hidden_size, config.num_target_layers, config.vocab_size) == (576, 30, 49152)
    assert config.mask_token_id == 16 and config.block_size >= 8


@pytest.mark.parametrize("count", [1, 6])
def test_prompts_are_answered_and_compared(monkeypatch, count):
    target, drafter = tiny_pair("llama", block_size=10)
    asked = {}

    def compare(console, target, drafter, tokenizer, prompts, *, max_new_tokens, stop_token_ids, block_size):
        asked.update(prompts)
        assert target.tap_ids == tuple(drafter.config.target_layer_ids)
        assert (max_new_tokens, stop_token_ids, block_size) == (5, (2,), 8)
        console.print("compared")

    monkeypatch.setattr(real, "load_target", lambda name, dtype: {"smollm2": (target.model, word_tokenizer())}[name])
    monkeypatch.setattr(real, "load_drafter", lambda *_, **__: drafter)
    monkeypatch.setattr(real, "compare", compare)
    out = io.StringIO()
    real.real_model(Console(file=out, width=160), count=count, max_new_tokens=5)
    assert "compared" in out.getvalue() and "this part took" in out.getvalue()
    assert len(asked) == count and all(asked.values())
    assert next(iter(asked)).startswith("A baker sells 12 loaves")
