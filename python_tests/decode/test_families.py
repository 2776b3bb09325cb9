"""Lossless with every causal family of transformers of which the common fields of a config make a tiny model.

A family gives equal output (plain decoding as `generate`, speculative as plain), or it is refused in one line.
"""

import inspect

import pytest
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dflash_ext.decode import decode, kv_cache
from dflash_ext.models import DFlashDrafter, Target
from python_tests.decode.oracle import Oracle, own_output
from python_tests.tiny import MASK_TOKEN, SHAPE, random_prompts

PROMPTS = random_prompts(2, 13)
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
    """A random model of a family; None if the common fields make none, or none that is small."""
    config_class = CONFIG_MAPPING[model_type]
    known = {*inspect.signature(config_class.__init__).parameters, *config_class.attribute_map}
    fields = {name: value for name, value in FIELDS.items() if name in known}
    if "kv_lora_rank" in fields:  # latent attention shares no heads
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    try:
        config = config_class(**fields)
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
        with torch.device("meta"):
            if sum(p.numel() for p in model_class(config).parameters()) > 15e6:
                return None
        torch.manual_seed(0)
        return model_class(config).eval().requires_grad_(False)
    except Exception:  # whatever a config or a model cannot do with these fields, decoding cannot mend
        return None


def answers(model: PreTrainedModel) -> list[list[int]] | None:
    """The model's own answers to PROMPTS; None if `generate` does not work with it."""
    try:
        return [own_output(model, prompt, NEW + BLOCK) for prompt in PROMPTS]
    except Exception:  # a fault of the model's own
        return None


@pytest.mark.parametrize("model_type", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_a_family_is_equal_or_refused_in_one_line(model_type, monkeypatch):
    """The pages of layers with a window are so small that the first ones are used again."""
    monkeypatch.setattr(kv_cache, "ALIGNMENT", 8)
    pages_of = kv_cache.Pages.of
    monkeypatch.setattr(kv_cache.Pages, "of", lambda capacity, window, rows: pages_of(capacity, window, 13))
    model = tiny(model_type)
    if model is None:
        assert model_type not in MUST_BE_EQUAL
        pytest.skip("the common fields make no tiny model of this family")
    check(model, model_type, model_type in MUST_BE_EQUAL)


def check(model: PreTrainedModel, name: str, must_be_equal: bool) -> None:
    try:
        target = Target(model)
        options = dict(mask_token_id=MASK_TOKEN, num_layers=1, block_size=BLOCK, taps=[0, 2, 3])
        drafter = DFlashDrafter.for_target(target, **options)
        known = answers(model)
        if known is None:
            assert not must_be_equal
            pytest.skip("`generate` does not work with the tiny model of this family")
        plain = decode(target, None, PROMPTS, max_new_tokens=NEW)
        target.features(torch.tensor([PROMPTS[0]]))
    except ValueError as refusal:
        assert not must_be_equal and "\n" not in str(refusal)
        print(f"{name}: {refusal}")
        return

    expected = [tokens[:NEW] for tokens in known]
    assert [c.tokens for c in plain.completions] == expected
    tapped = Target(model, drafter.config.target_layer_ids)
    oracle = Oracle(drafter.config).eval()
    oracle.script(PROMPTS, known, 3)
    decoded = decode(tapped, oracle, PROMPTS, max_new_tokens=NEW, on_tokens=oracle.on_tokens)
    assert [c.tokens for c in decoded.completions] == expected
    assert 1.2 < decoded.tau < BLOCK

    ids = torch.tensor([PROMPTS[1]])
    positions = torch.arange(13)[None]
    states = model(ids, position_ids=positions, output_hidden_states=True, use_cache=False).hidden_states
    torch.testing.assert_close(tapped.features(ids), torch.cat([states[i] for i in (1, 3, 4)], dim=-1))


@pytest.mark.parametrize("model_type", ["gemma3", "llava", "mistral3", "qwen2_5_vl", "qwen3_vl"])
def test_models_that_also_see_images_decode_text(model_type):
    tower = dict(intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    if "qwen" in model_type:
        tower = dict(depth=1, hidden_size=16, num_heads=2, intermediate_size=16, out_hidden_size=SHAPE["hidden_size"])
        tower |= dict(deepstack_visual_indexes=[0]) if model_type == "qwen3_vl" else {}
    else:
        tower |= dict(hidden_size=16)
    config_class = CONFIG_MAPPING[model_type]
    text = config_class().text_config
    for name, value in (FIELDS | {"num_key_value_heads": 2}).items():
        if hasattr(text, name):
            setattr(text, name, value)
    text.layer_types = ["sliding_attention", "full_attention"] * 2 if model_type == "gemma3" else None
    if "qwen" in model_type:
        text.layer_types = ["full_attention"] * 4
        text.rope_parameters = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = config_class().vision_config.model_type
    torch.manual_seed(0)
    config = config_class(text_config=text.to_dict(), vision_config=tower | {"model_type": vision})
    model = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[config_class](config).eval().requires_grad_(False)
    check(model, model_type, must_be_equal=True)


def pair(model: PreTrainedModel, taps: list[int]) -> tuple[Target, DFlashDrafter]:
    target = Target(model.eval().requires_grad_(False), taps)
    options = dict(mask_token_id=MASK_TOKEN, num_layers=1, block_size=6, taps=taps)
    return target, DFlashDrafter.for_target(target, **options).eval()


def test_blocks_stay_within_a_table_of_positions():
    """GPT-2 looks positions up in a table: a drafted slot beyond its end would be an error."""
    target, drafter = pair(GPT2LMHeadModel(GPT2Config(**SHAPE | {"max_position_embeddings": 24})), [1, 2])
    prompts = random_prompts(1, 9, 17)
    decoded = decode(target, drafter, prompts, max_new_tokens=7)
    assert [c.tokens for c in decoded.completions] == [own_output(target.model, p, 7) for p in prompts]


def test_longrope_is_equal_up_to_its_switch_and_refused_beyond():
    """Beyond it all tokens of a forward turn by other factors, which drafted slots and other rows cause too."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    torch.manual_seed(0)
    model = Phi3ForCausalLM(Phi3Config(**SHAPE, rope_parameters=rope, original_max_position_embeddings=32))
    target, drafter = pair(model, [1, 2])
    prompts = random_prompts(5, 20)
    decoded = decode(target, drafter, prompts, max_new_tokens=12)
    assert [c.tokens for c in decoded.completions] == [own_output(model, p, 12) for p in prompts]
    for draft in (drafter, None):
        with pytest.raises(
            ValueError, match=r"20 tokens and 13 new ones do not fit: the target's longrope .* beyond 32$"
        ):
            decode(target, draft, prompts, max_new_tokens=13)
    target.features(torch.ones(2, 32, dtype=torch.int64))
    with pytest.raises(ValueError, match="sequences of 33 tokens do not fit: the target's longrope"):
        target.features(torch.ones(2, 33, dtype=torch.int64))


def test_dynamic_rope_is_equal_up_to_the_models_positions():
    """The drafted slots of the last block would reach beyond them."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 64.0}
    torch.manual_seed(0)
    target, drafter = pair(
        LlamaForCausalLM(LlamaConfig(**SHAPE | {"rope_parameters": rope, "max_position_embeddings": 32})), [1, 2]
    )
    prompts = random_prompts(5, 20)
    decoded = decode(target, drafter, prompts, max_new_tokens=12)
    assert [c.tokens for c in decoded.completions] == [own_output(target.model, p, 12) for p in prompts]
    with pytest.raises(ValueError, match="do not fit: the target has 32 positions"):
        decode(target, drafter, prompts, max_new_tokens=13)


def test_a_window_that_only_the_cache_has_bounds_the_rows():
    """`generate` makes a sliding cache wherever a config has a window, also for models whose masks have none."""
    torch.manual_seed(0)
    target, drafter = pair(LlamaForCausalLM(LlamaConfig(**SHAPE, sliding_window=16)), [1, 2])
    prompts = random_prompts(3, 8)
    decoded = decode(target, drafter, prompts, max_new_tokens=8)
    assert [c.tokens for c in decoded.completions] == [own_output(target.model, p, 8) for p in prompts]
    with pytest.raises(ValueError, match="do not fit: its cache, but none of its masks, has a sliding window of 16"):
        decode(target, drafter, prompts, max_new_tokens=9)


def test_a_target_that_is_not_causal_by_itself_gives_no_features(monkeypatch):
    """Decoding gives it masks. Training features come from whole sequences, for which the model makes its own."""
    torch.manual_seed(0)
    target, drafter = pair(LlamaForCausalLM(LlamaConfig(**SHAPE)), [1, 2])
    prompts = random_prompts(5, 20)
    expected = [own_output(target.model, p, 12) for p in prompts]

    def see_all(*_, attention_mask=None, **__):
        return torch.zeros(1, 1, 1, 1) if attention_mask is None else attention_mask

    monkeypatch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", see_all)
    decoded = decode(target, drafter, prompts, max_new_tokens=12)
    assert [c.tokens for c in decoded.completions] == expected
    with pytest.raises(ValueError, match="LlamaForCausalLM gives no context features: .*'sdpa'.* see later ones; "):
        target.features(torch.tensor(prompts[:1]))


@pytest.mark.parametrize("shared", [1, 3])
def test_taps_of_gemma_4_in_layers_that_share_keys(shared):
    """Their hidden states are shortened to the columns that get logits, unless those are given as an index."""
    fields = SHAPE | dict(
        head_dim=16,
        global_head_dim=32,
        num_global_key_value_heads=1,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 3,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=97,
        num_kv_shared_layers=shared,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["gemma4_text"](**fields))
    target, drafter = pair(model, [0, 2, 3, 5])
    prompts = random_prompts(3, 9, 21)
    for draft in (drafter, None):
        decoded = decode(target, draft, prompts, max_new_tokens=12)
        assert [c.tokens for c in decoded.completions] == [own_output(model, p, 12) for p in prompts]


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("bert", {}, "BertLMHeadModel cannot be a target: its attention is not causal"),
        ("bloom", {}, "BloomForCausalLM cannot be a target: its decoder takes no position_ids"),
        ("mamba", {}, "MambaForCausalLM cannot be a target: it keeps a recurrent state"),
        ("xlm", {}, "XLMWithLMHeadModel cannot be a target: its decoder makes attention masks of its own"),
        (
            "electra",
            {"is_decoder": True},
            "a drafter for ElectraForCausalLM is not supported: its embedding has width 128",
        ),
    ],
)
def test_refuses(model_type, changes, message):
    config_class = CONFIG_MAPPING[model_type]
    known = {*inspect.signature(config_class.__init__).parameters, *config_class.attribute_map}
    config = config_class(**{name: value for name, value in SHAPE.items() if name in known} | changes)
    with pytest.raises(ValueError, match=f"^{message}"):
        DFlashDrafter.for_target(Target(AutoModelForCausalLM.from_config(config)), mask_token_id=MASK_TOKEN, taps=[1])
