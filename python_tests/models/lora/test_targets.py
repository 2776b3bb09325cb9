"""Which linear layers an adapter acts on."""

import pytest
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

from dflash_ext.models import Target
from dflash_ext.models.lora import linear_paths
from python_tests.tiny import GEMMA, SHAPE, tiny_model

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    "targets, names",
    [
        ("all", ATTENTION + MLP),
        ("attention", ATTENTION),
        ("mlp", MLP),
        ("o_proj", ["o_proj"]),
        (["o_proj", "up_proj"], ["o_proj", "up_proj"]),
    ],
)
def test_presets_and_names_choose_linear_layers_by_their_full_paths(targets, names):
    model = tiny_model("llama")
    paths = linear_paths(Target(model), targets)
    assert len(paths) == 6 * len(names)
    assert {path.rpartition(".")[2] for path in paths} == set(names)
    assert all(model.get_submodule(path).weight.dim() == 2 for path in paths)
    assert paths[0].startswith("model.layers.0.")


def test_a_name_that_no_layer_has_is_refused():
    with pytest.raises(ValueError, match="no linear layer w_proj to adapt: its layers have down_proj, .* are presets"):
        linear_paths(Target(tiny_model("qwen3")), ["q_proj", "w_proj"])


def test_the_vision_tower_of_a_model_is_left_alone():
    text = Gemma3TextConfig(**SHAPE | GEMMA)
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    towers = [name for name, _ in model.named_modules() if name.endswith("q_proj") and "vision" in name]
    assert towers, "the tower has linear layers of the same name"
    paths = linear_paths(Target(model.eval()))
    assert len(paths) == 6 * 7
    assert not [path for path in paths if "vision" in path or "lm_head" in path]
