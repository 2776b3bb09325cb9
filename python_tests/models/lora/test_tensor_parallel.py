"""Which layers ranks share, and which models they cannot share. (train/test_parallel.py trains with shared layers.)"""

import pytest

from dflash_ext.models import Target
from dflash_ext.models.lora.tensor_parallel import linear_styles
from python_tests.tiny import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_mlps_are_divided(family):
    target = Target(tiny_model(family))
    styles = linear_styles(target, 2)
    by_name = {path.rpartition(".")[2]: style for path, style in styles.items()}
    rowwise = {name for name, style in by_name.items() if style == "rowwise"}
    assert rowwise == {"o_proj", "down_proj"}
    assert by_name.keys() - rowwise == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert len(styles) == 7 * target.num_layers


@pytest.mark.parametrize(
    "plan, ranks, message",
    [
        (None, 2, "LlamaForCausalLM cannot be divided: transformers has no plan of tensor parallelism for it"),
        ({"layers.*.mlp": "moe_tp_experts"}, 2, "its plan has 'moe_tp_experts' for layers.0.mlp"),
        ({"layers.*.mlp.up_proj": "packed_colwise"}, 2, "its plan has 'packed_colwise' for layers.0.mlp.up_proj"),
        ({}, 3, "transformers has no plan"),
        ({"layers.*.mlp.up_proj": "colwise"}, 4, "among 4 ranks: it has 4 heads, 2 of keys"),
    ],
)
def test_what_cannot_be_divided_is_refused(plan, ranks, message):
    target = Target(tiny_model("llama"))
    target.config.base_model_tp_plan = plan
    with pytest.raises(ValueError, match=message):
        linear_styles(target, ranks)


def test_a_layer_without_equal_parts_is_refused():
    target = Target(tiny_model("llama", intermediate_size=97))
    with pytest.raises(ValueError, match="among 2 ranks: layers.0.mlp.gate_proj has no equal parts"):
        linear_styles(target, 2)
