"""What is read of a drafter's config, in which order, and what is refused by name."""

import json
import re

import pytest
import torch

from dflash_ext.models import DFlashConfig, default_taps
from python_tests.tiny import tiny_pair

TAPS = {"mask_token_id": 3, "target_layer_ids": [1]}
SLIDING = ["full_attention", "sliding_attention"]
SMALL = {"num_hidden_layers": 2, "vocab_size": 64, "num_target_layers": 4}


def read(tmp_path, dflash=None, **top) -> DFlashConfig:
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, **top, "dflash_config": {**TAPS, **(dflash or {})}}))
    return DFlashConfig.from_pretrained(tmp_path)


def test_what_stands_inside_dflash_config_comes_first_but_is_causal(tmp_path):
    config = read(tmp_path, {"block_size": 8, "causal": True, "sample_from_anchor": True}, block_size=16)
    assert (config.block_size, config.is_causal, config.sample_from_anchor) == (8, True, True)
    config = read(tmp_path, {"causal": True, "num_target_layers": 7}, is_causal=False, sample_from_anchor=True)
    assert (config.block_size, config.is_causal, config.sample_from_anchor) == (16, False, True)
    assert config.num_target_layers == 7


def test_a_null_is_no_value(tmp_path):
    unset = {"block_size": None, "causal": None, "sample_from_anchor": None, "num_target_layers": None}
    config = read(tmp_path, unset, block_size=8, is_causal=True, sample_from_anchor=True, num_target_layers=7)
    assert (config.block_size, config.is_causal, config.sample_from_anchor) == (8, True, True)
    assert config.num_target_layers == 7
    assert read(tmp_path, unset, block_size=None).block_size == 16


def test_what_was_read_is_written_where_everybody_reads_it(tmp_path):
    config = read(tmp_path, {"block_size": 8, "causal": False}, sample_from_anchor=True, sliding_window=4)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["block_size"], written["is_causal"], written["sample_from_anchor"]) == (8, False, True)
    assert written["dflash_config"] == TAPS
    again = DFlashConfig.from_pretrained(tmp_path)
    assert (again.block_size, again.is_causal, again.sample_from_anchor) == (8, False, True)
    read(tmp_path).save_pretrained(tmp_path)
    assert not {"is_causal", "sample_from_anchor", "window_convention", "own_head"} & set(
        json.loads((tmp_path / "config.json").read_text())
    )


@pytest.mark.parametrize(
    ("is_causal", "expected"),
    [
        (None, [("full_attention", False, None), ("sliding_attention", True, 5)]),
        (True, [("full_attention", True, None), ("sliding_attention", True, 5)]),
        (False, [("full_attention", False, None), ("sliding_attention", False, 5)]),
    ],
)
def test_is_causal_holds_for_all_kinds_of_layer(tmp_path, is_causal, expected):
    kinds = ["sliding_attention", "full_attention"]
    config = read(tmp_path, is_causal=is_causal, layer_types=kinds, sliding_window=5, use_sliding_window=True)
    assert list(config.attention_kinds()) == expected


@pytest.mark.parametrize("softcap", [None, 0, 0.0, -1.0, 5.0])
@torch.no_grad()
def test_a_soft_cap_that_is_not_above_zero_is_none(softcap):
    target, drafter = tiny_pair("llama")
    hidden = 100 * torch.randn(1, 2, 64)
    plain = drafter.logits(target, hidden)
    drafter.config.dflash_config["final_logit_softcapping"] = softcap
    expected = 5 * torch.tanh(plain / 5) if softcap == 5.0 else plain
    torch.testing.assert_close(drafter.logits(target, hidden), expected)


UNSUPPORTED = {
    "query_zero_predicts_next": True,
    "shift_label": True,
    "use_swa": True,
    "swa_window_size": 128,
    "attention_value_scale": 0.707,
    "attention_sink_bias": True,
    "causal_head": True,
    "logit_scale": 0.5,
    "partial_rotary_factor": 0.5,
    "rope_is_neox_style": False,
    "use_aux_hidden_state": False,
    "projector_type": "domino",
    "quantization_config": {"quant_method": "fp8"},
    "markov_rank": 256,
    "conv_kernel_size": 2,
    "conv_group_size": 16,
    "selector_rank": 256,
    "selector_top_k": 16,
}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("key", UNSUPPORTED)
def test_a_key_that_changes_the_computation_is_refused_by_name(tmp_path, key, inside):
    given = {key: UNSUPPORTED[key]}
    with pytest.raises(
        ValueError, match=f"^{key} is {re.escape(repr(UNSUPPORTED[key]))}: drafters with this key are not supported$"
    ):
        read(tmp_path, given) if inside else read(tmp_path, **given)


def test_a_key_that_changes_nothing_is_read_over(tmp_path):
    unset = {"query_zero_predicts_next": False, "use_swa": False, "swa_window_size": 0, "attention_value_scale": 1.0}
    assert read(tmp_path, {**unset, "shift_label": None, "conv_kernel_size": 0}, selector_top_k=None).block_size == 16


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"architectures": ["DFlash2DraftModel"]}, "architecture DFlash2DraftModel is not supported"),
        ({"architectures": ["Qwen3DSparkModel"]}, "architecture Qwen3DSparkModel"),
        ({"target_hidden_size": 512}, "target_hidden_size is 512, hidden_size 4096"),
        ({"dflash": {"is_causal": True}}, "is_causal is inside dflash_config"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries, the drafter 2 layers"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types has 'chunked_attention'"),
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4}, "use_sliding_window and a"),
        ({"window_convention": "mine"}, "window_convention is 'mine': zlab and speculators are supported"),
        ({"noise": "gauss"}, "noise is 'gauss': mask and uniform are supported"),
        ({"noise": "uniform", "sample_from_anchor": True}, "so that sample_from_anchor is not supported"),
        ({"block_size": 1}, "block_size is 1: a block is an anchor and"),
        ({"block_size": -1, "sample_from_anchor": True}, "block_size is -1: a block is at least one slot"),
        ({"block_size": 0}, "block_size is 0: a block is an anchor and"),
        ({"dflash": {"block_size": 8.0}}, "block_size is 8.0: a block is an anchor and"),
        ({"is_causal": "false"}, "is_causal is 'false': true or false is needed"),
        ({"dflash": {"causal": "no"}}, "is_causal is 'no': true or false is needed"),
        ({"dflash": {"sample_from_anchor": "false"}}, "sample_from_anchor is 'false': true or false is needed"),
        ({"layer_types": SLIDING, "sliding_window": -1, "use_sliding_window": True}, "use_sliding_window and a"),
        ({"rope_parameters": {kind: {"rope_type": "default"} for kind in SLIDING}}, "differ by kind of layer"),
        ({"speculators_model_type": "eagle3"}, "speculators_model_type is 'eagle3'"),
    ],
)
def test_refuses(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, **given)


def test_a_shallow_target_has_fewer_taps_by_default():
    assert default_taps(30) == default_taps(30, 5) and default_taps(4) == [1, 2, 3]


def test_layer_ids_are_not_taken_for_the_default_taps():
    with pytest.raises(ValueError, match="dflash_config has layer_ids"):
        DFlashConfig(dflash_config={"layer_ids": [2], "mask_token_id": 3}, **SMALL)


@pytest.mark.parametrize("scale", [None, 1.0, 3.0])
@torch.no_grad()
def test_the_embedding_is_the_raw_table_times_the_scale(scale):
    """As z-lab reads it: a config that says no scale takes none from a target that has one of its own (Gemma)."""
    target, drafter = tiny_pair("gemma3")
    assert drafter.config.dflash_config["input_embedding_scale"] == target.embedding_scale == 8.0
    drafter.config.dflash_config["input_embedding_scale"] = scale
    tokens = torch.tensor([[5, 96]])
    expected = target.model.get_input_embeddings().weight[tokens] * (scale or 1.0)
    torch.testing.assert_close(drafter.embed(target, tokens), expected)
