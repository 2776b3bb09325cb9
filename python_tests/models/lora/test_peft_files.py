"""Adapters that are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dflash_ext.models import LoraAdapter, Target
from dflash_ext.models.lora import load_adapter, save_adapter
from python_tests.tiny import tiny_model


@pytest.fixture
def target():
    return Target(tiny_model("qwen3"))


@pytest.fixture
def folder(target, tmp_path):
    save_adapter(LoraAdapter.for_target(target, rank=4), tmp_path)
    return tmp_path


def change(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"r": 8}, r"A and B of model.layers.0.* are \(4, 64\) and \(64, 4\); rank 8 .* need \(8, 64\) and \(64, 8\)"),
        ({"use_dora": True}, "has use_dora=True in its adapter_config.json, which is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, "has rank_pattern="),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save="),
        ({"bias": "all"}, "has bias='all'"),
        ({"peft_type": "IA3"}, "is of type .*IA3: LORA is supported"),
    ],
)
def test_what_is_not_supported_is_named(target, folder, settings, message):
    change(folder, **settings)
    with pytest.raises(ValueError, match=message) as raised:
        load_adapter(folder, target)
    assert "\n" not in str(raised.value)


def test_an_adapter_of_another_architecture_is_refused(folder):
    with pytest.raises(ValueError, match=r"does not fit: A and B of model.layers.0.self_attn.q_proj are \(4, 64\)"):
        load_adapter(folder, Target(tiny_model("llama", hidden_size=32)))
    with pytest.raises(ValueError, match="Qwen3ForCausalLM has no linear layer model.layers.2.mlp.down_proj"):
        load_adapter(folder, Target(tiny_model("qwen3", num_hidden_layers=2)))


@pytest.mark.parametrize("name", ["base_model.model.model.embed_tokens.lora_embedding_A", "x.lora_A.weight"])
def test_other_tensors_are_refused(target, folder, name):
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors | {name: torch.zeros(2)}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"holds {name}: only LoRA's A and B"):
        load_adapter(folder, target)


def test_half_a_pair_is_refused(target, folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    first = next(name for name in tensors if "lora_B" in name)
    del tensors[first]
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="has one of A and B alone for model.layers"):
        load_adapter(folder, target)


def test_a_folder_without_an_adapter_is_refused(target, tmp_path):
    with pytest.raises(ValueError, match="no adapter in .*: there is no adapter_config.json"):
        load_adapter(tmp_path, target)
