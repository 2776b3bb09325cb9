import pytest
import torch

from dflash_ext import IntervalMask
from dflash_ext.models import Target, load_target, probe
from dflash_ext.models.probe import LENGTH, PREFIX, visible
from python_tests.data.words import word_tokenizer
from python_tests.tiny import FAMILIES, MASK_TOKEN, tiny_gemma4, tiny_model

MASKS = {
    "bidirectional": IntervalMask.full(LENGTH, q_len=LENGTH),
    "block-wise": IntervalMask.prefix_block(LENGTH, PREFIX),
    "blocks": IntervalMask.block_causal(LENGTH, 4),
    "windows": IntervalMask.sliding_window(LENGTH, 3),
}


def model_of(family):
    return tiny_gemma4() if family == "gemma4" else tiny_model(family)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("implementation", ["block_attn", "sdpa", "eager"])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma4"])
def test_every_layer_sees_what_the_mask_shows(family, implementation, mask):
    """Layers that share the keys of an earlier one (Gemma 4) included."""
    target = Target(model_of(family))
    target.decoder.set_attn_implementation(implementation)
    for layer, seen in visible(target, MASKS[mask]).items():
        assert torch.equal(seen, MASKS[mask].to_bool()[0, 0]), layer


def test_layers_under_masks_of_their_own():
    target = Target(tiny_model("gemma3"))
    target.decoder.set_attn_implementation("block_attn")
    masks = {"full_attention": MASKS["blocks"], "sliding_attention": MASKS["windows"]}
    target.mask_arguments = lambda *_: {"interval_mask": masks}
    for layer, seen in visible(target, MASKS["blocks"]).items():
        assert torch.equal(seen, masks[target.layer_kinds[layer]].to_bool()[0, 0]), layer


@pytest.fixture(scope="module")
def gemma4(tmp_path_factory):
    """Gemma 4's conditional class, read from its folder."""
    folder = tmp_path_factory.mktemp("gemma4")
    tiny_gemma4().save_pretrained(folder)
    tokenizer = word_tokenizer()
    tokenizer.mask_token = f"w{MASK_TOKEN:03}"
    tokenizer.save_pretrained(folder)
    return load_target(folder)


def found(model, tokenizer, **options):
    return {(v.level, v.subject): v.found for v in probe(model, tokenizer, **options)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gemma_4_with_towers(gemma4, dtype):
    model, tokenizer = gemma4
    verdicts = found(model.to(dtype), tokenizer)
    assert all(level != "wrong" for level, _ in verdicts)
    assert (
        "6 layers under model.language_model.layers (3 of full_attention, 3 of sliding_attention"
        in (verdicts["ok", "language model"])
    )
    assert (
        "6 under model.language_model.layers, 1 under model.vision_tower.encoder.layers"
        in (verdicts["ok", "checkpoint"])
    )
    assert "model.language_model.layers.*.self_attn.q_proj (6)" in verdicts["ok", "adapter"]
    assert verdicts["note", "adapter"].endswith("model.audio_tower.layers, model.vision_tower.encoder.layers")
    assert verdicts["ok", "mask token"] == "w096 (id 96)"
    for kind in ("full_attention", "sliding_attention"):
        assert verdicts["ok", f"block_attn, interval mask, {kind}"] == "honoured, bidirectional and block-wise"
        # A bool mask is added as 0 and 1, so that it hides nothing.
        assert "pairs that the mask hides" in verdicts["note", f"eager, mask in bool, {kind}"]
    assert model.model.language_model.config._attn_implementation == "sdpa"  # as before


def test_a_mask_that_one_kind_of_layer_ignores(monkeypatch):
    model, tokenizer = tiny_model("gemma3"), word_tokenizer()
    given = Target.mask_arguments
    causal = IntervalMask.causal(LENGTH)
    monkeypatch.setattr(
        Target, "mask_arguments", lambda self, masks, dtype: given(self, masks | {"sliding_attention": causal}, dtype)
    )
    verdicts = found(model, tokenizer)
    assert verdicts["ok", "block_attn, interval mask, full_attention"] == "honoured, bidirectional and block-wise"
    ignored = verdicts["wrong", "block_attn, interval mask, sliding_attention"]
    assert ignored.startswith("bidirectional: layer 0 sees 0% of the later tokens that the mask shows; block-wise:")
    assert ("note", "sdpa, mask in float32, sliding_attention") in verdicts
    verdicts = found(model, tokenizer, implementation="sdpa")
    assert ("wrong", "sdpa, mask in float32, sliding_attention") in verdicts
    assert ("note", "block_attn, interval mask, sliding_attention") in verdicts


def test_sharp_attention_is_probed_with_further_inputs():
    """In bfloat16 it sees few keys of one random input, as Gemma 3 270M does."""
    model = tiny_model("gemma3").bfloat16()
    for layer in model.model.layers:
        layer.self_attn.q_norm.weight.fill_(80)
    mask = IntervalMask.prefix_block(LENGTH, 6)
    target = Target(model)
    target.decoder.set_attn_implementation("block_attn")
    shown = mask.to_bool()[0, 0].triu(1)
    assert min(float(rows[shown].float().mean()) for rows in visible(target, mask).values()) < 0.5
    verdicts = found(model, word_tokenizer())
    assert verdicts["ok", "block_attn, interval mask, full_attention"] == "honoured, bidirectional and block-wise"


def test_what_is_refused_is_told():
    model, tokenizer = tiny_model("llama"), word_tokenizer()
    verdicts = found(model, tokenizer, targets="c_attn", implementation="flash_attention_2")
    assert "no linear layer c_attn" in verdicts["wrong", "adapter"]
    assert verdicts["wrong", "flash_attention_2, mask in float32"].startswith("refused: ")
    assert "a new one has an embedding of its own" in verdicts["note", "mask token"]


def test_a_mask_token_that_the_model_does_not_embed():
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<|diffusion_mask|>"})
    assert "id 97, which the model does not embed" in found(tiny_model("llama"), tokenizer)["wrong", "mask token"]
