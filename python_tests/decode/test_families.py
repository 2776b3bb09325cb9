"""Lossless with every causal family of transformers of which the common fields of a config make a tiny model.

A family gives equal output (plain decoding as `generate`, speculative as plain), or it is refused in one line.
"""

import inspect

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dflash_ext.decode import decode
from dflash_ext.models import DFlashDrafter, Target
from python_tests.decode.oracle import Oracle, own_output
from python_tests.tiny import MASK_TOKEN, SHAPE, random_prompts

NEW, BLOCK = 12, 4
FIELDS = SHAPE | dict(
    num_hidden_layers=4,
    max_position_embeddings=128,
    head_dim=16,
    rotary_dim=16,
    is_decoder=True,
    sliding_window=8,
    # of mixtures of experts
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    # of latent attention
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=16,
    qk_nope_head_dim=16,
    v_head_dim=16,
    # of Gemma 3n and 4
    vocab_size_per_layer_input=97,
    hidden_size_per_layer_input=8,
    num_kv_shared_layers=0,
)
# A refusal, or a config that is not made, passes the test; but not of these.
MUST_BE_EQUAL = """
    apertus arcee bert biogpt codegen cohere cohere2 deepseek_v3 ernie4_5 exaone4 falcon gemma gemma2 gemma3_text
    gemma4_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite granitemoe helium llama ministral
    mistral mixtral modernbert-decoder nemotron olmo olmo2 olmo3 olmoe opt phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe
    roberta seed_oss smollm3 stablelm starcoder2 xglm
""".split()


def tiny(model_type: str) -> PreTrainedModel | None:
    """A random model of a family; None if the common fields make none, none that is small, or none that generates."""
    config_class = CONFIG_MAPPING[model_type]
    known = {*inspect.signature(config_class.__init__).parameters, *config_class.attribute_map}
    fields = {name: value for name, value in FIELDS.items() if name in known}
    for heads in ({}, {"num_key_value_heads": FIELDS["num_attention_heads"]}):  # latent attention shares no heads
        try:
            config = config_class(**fields | heads)
            model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
            with torch.device("meta"):
                if sum(p.numel() for p in model_class(config).parameters()) > 40e6:
                    return None
            torch.manual_seed(0)
            model = model_class(config).eval().requires_grad_(False)
            own_output(model, [5, 6], 2)
            return model
        except Exception:  # whatever a config, a model or generate cannot do with these fields, decoding cannot mend
            continue
    return None


@pytest.mark.parametrize("model_type", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_a_family_is_equal_or_refused_in_one_line(model_type):
    model = tiny(model_type)
    if model is None:
        assert model_type not in MUST_BE_EQUAL
        pytest.skip("the common fields make no tiny model of this family that generates")
    try:
        target = Target(model)
        options = dict(mask_token_id=MASK_TOKEN, num_layers=1, block_size=BLOCK, taps=[0, 2, 3])
        drafter = DFlashDrafter.for_target(target, **options).eval()
    except ValueError as refusal:
        assert model_type not in MUST_BE_EQUAL and "\n" not in str(refusal)
        print(f"{model_type}: {refusal}")
        return

    prompts = random_prompts(2, 7, 13)
    known = [own_output(model, prompt, NEW + BLOCK) for prompt in prompts]
    expected = [tokens[:NEW] for tokens in known]
    plain = decode(target, None, prompts, max_new_tokens=NEW)
    assert [c.tokens for c in plain.completions] == expected
    tapped = Target(model, drafter.config.target_layer_ids)
    oracle = Oracle(drafter.config).eval()
    oracle.script(prompts, known, 3)
    for draft in (drafter, oracle):
        decoded = decode(tapped, draft, prompts, max_new_tokens=NEW, on_tokens=oracle.on_tokens)
        assert [c.tokens for c in decoded.completions] == expected
        oracle.script(prompts, known, 3)
    assert decoded.tau > 1.2

    ids = torch.tensor([prompts[2]])
    positions = torch.arange(13)[None]
    states = model(ids, position_ids=positions, output_hidden_states=True, use_cache=False).hidden_states
    torch.testing.assert_close(tapped.features(ids), torch.cat([states[i] for i in (1, 3, 4)], dim=-1))
