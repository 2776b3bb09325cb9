import json

import pytest
import torch
from safetensors import safe_open
from transformers import DynamicCache, Qwen3Config

from dflash_ext.models import DFlashConfig, DFlashDrafter, Target, default_taps, load_drafter
from dflash_ext.models import drafter as drafter_module
from dflash_ext.train import save_drafter
from python_tests.tiny import FAMILIES, MASK_TOKEN, random_prompts, tiny_model, tiny_pair

LENGTH = 24


def training_forward(
    target: Target, drafter: DFlashDrafter, tokens: torch.Tensor, anchors: torch.Tensor
) -> torch.Tensor:
    """Logits [B, N, block, V] of all anchors' blocks in one pass."""
    size = drafter.config.block_size
    positions = anchors[:, :, None] + torch.arange(size)
    noise = torch.full_like(positions, MASK_TOKEN)
    noise[:, :, 0] = tokens.gather(1, anchors)
    context = torch.arange(tokens.shape[1]).expand_as(tokens)
    hidden = drafter(
        noise_embeds=drafter.embed(target, noise.flatten(1)),
        context_hidden_states=target.features(tokens),
        position_ids=torch.cat([context, positions.flatten(1)], dim=1),
        attention_mask=drafter.anchor_masks(tokens.shape[1], anchors),
    ).last_hidden_state
    return drafter.logits(target, hidden).unflatten(1, (-1, size))


def decoding_forward(target: Target, drafter: DFlashDrafter, tokens: list[int], cuts: list[int]) -> torch.Tensor:
    """Logits [block, V] of the block behind the last of `tokens`, its context fed to a cache in pieces."""
    size, anchor = drafter.config.block_size, len(tokens) - 1
    features = target.features(torch.tensor([tokens]))[:, :anchor]
    cache = DynamicCache()
    noise = torch.tensor([[tokens[anchor]] + [MASK_TOKEN] * (size - 1)])
    for begin, end in zip([0, *cuts], [*cuts, anchor], strict=True):
        positions = torch.arange(begin, end + size)[None]
        hidden = drafter(
            noise_embeds=drafter.embed(target, noise),
            context_hidden_states=features[:, begin:end],
            position_ids=positions,
            attention_mask=drafter.decode_masks(torch.tensor([end], dtype=torch.int32), size, end + size),
            cache=cache,
        ).last_hidden_state
        cache.crop(-size)  # drops the block
    return drafter.logits(target, hidden)[0]


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("is_causal", [None, True, False])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_training_and_decoding_give_the_same_logits(family, sliding, is_causal):
    target, drafter = tiny_pair(family, sliding=sliding)
    drafter.config.is_causal = is_causal
    tokens = torch.tensor(random_prompts(LENGTH, LENGTH))
    anchors = torch.tensor([[3, 11, 17], [20, 1, 9]])
    trained = training_forward(target, drafter, tokens, anchors)
    for row, column in [(0, 0), (0, 2), (1, 0), (1, 1)]:
        anchor = int(anchors[row, column])
        cuts = [anchor // 2] if anchor > 3 else []
        decoded = decoding_forward(target, drafter, tokens[row, : anchor + 1].tolist(), cuts)
        torch.testing.assert_close(trained[row, column], decoded, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_the_cache_has_two_names_and_other_keywords_are_refused(capfd):
    _, drafter = tiny_pair("qwen3")
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(1, 6, 64, generator=generator)
    context = torch.randn(1, 9, 3 * 64, generator=generator)

    want = drafter(block, context, torch.arange(15)[None]).last_hidden_state
    for name in ("cache", "past_key_values"):
        cache = DynamicCache(config=drafter.config)
        drafter(block, context[:, :4], torch.arange(10)[None], **{name: cache})
        cache.crop(-6)  # the block
        got = drafter(block, context[:, 4:], torch.arange(4, 15)[None], **{name: cache}).last_hidden_state
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    assert not capfd.readouterr().err
    with pytest.raises(ValueError, match="cache and past_key_values name the same argument"):
        drafter(block, context, torch.arange(15)[None], cache=cache, past_key_values=cache)
    with pytest.raises(TypeError, match="unexpected keyword argument 'kv_cache'"):
        drafter(block, context, torch.arange(15)[None], kv_cache=cache)


@pytest.mark.parametrize("is_causal", [None, True, False])
def test_each_slot_of_a_sliding_layer_has_a_window_of_its_own(is_causal):
    """z-lab's rule, here with a window of 5 and a block of 6: the first slot does not see the last one either."""
    _, drafter = tiny_pair("llama", sliding=True)
    drafter.config.is_causal = is_causal
    slots, keys = torch.arange(9, 15)[:, None], torch.arange(15)
    expected = (slots - keys).abs() < 5 if is_causal is False else (slots - keys < 5) & (keys <= slots)
    masks = drafter.decode_masks(torch.tensor([9], dtype=torch.int32), 6, 15)
    assert torch.equal(masks["sliding_attention"].to_bool()[0, 0], expected)
    trained = drafter.anchor_masks(20, torch.tensor([[9]]))["sliding_attention"].to_bool()[0, 0]
    assert torch.equal(torch.cat([trained[:, :9], trained[:, 20:]], dim=1), expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_tokens_behind_the_anchor_change_nothing(family):
    target, drafter = tiny_pair(family)
    tokens = torch.tensor(random_prompts(LENGTH))
    anchors = torch.tensor([[10]])
    before = training_forward(target, drafter, tokens, anchors)
    for position in range(11, LENGTH):
        changed = tokens.clone()
        changed[0, position] = 3 + (changed[0, position] - 2) % 90
        assert torch.equal(training_forward(target, drafter, changed, anchors), before), position
    # The anchor's own token and the one before it do count.
    for position in (9, 10):
        changed = tokens.clone()
        changed[0, position] = 3 + (changed[0, position] - 2) % 90
        assert not torch.allclose(training_forward(target, drafter, changed, anchors), before)


def test_published_layout(tmp_path):
    """The keys and names of the published Qwen3-8B drafter, at a small size."""
    target, drafter = tiny_pair("qwen3", num_layers=5)
    save_drafter(drafter, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "qwen3"
    assert config["architectures"] == ["DFlashDraftModel"]
    assert config["dflash_config"] == {"mask_token_id": MASK_TOKEN, "target_layer_ids": default_taps(6, 3)}
    assert config["block_size"] == 6 and config["num_target_layers"] == 6 and config["num_hidden_layers"] == 5
    assert isinstance(config["rope_theta"], float) and "rope_scaling" not in config
    assert config["layer_types"] == ["full_attention"] * 5
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    layer = {f"self_attn.{p}.weight" for p in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")}
    layer |= {f"mlp.{p}.weight" for p in ("gate_proj", "up_proj", "down_proj")}
    layer |= {"input_layernorm.weight", "post_attention_layernorm.weight"}
    expected = {"fc.weight", "hidden_norm.weight", "norm.weight"}
    assert names == expected | {f"layers.{i}.{name}" for i in range(5) for name in layer}
    assert len(names) == 58


def test_round_trip(tmp_path):
    _, drafter = tiny_pair("llama")
    save_drafter(drafter, tmp_path)
    again = load_drafter(tmp_path, dtype=torch.float32, device=torch.device("cpu"))
    assert again.config.target_layer_ids == drafter.config.target_layer_ids
    for name, tensor in drafter.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_reads_the_published_qwen3_8b_config(tmp_path):
    published = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "num_hidden_layers": 5,
        "num_target_layers": 36,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "vocab_size": 151936,
        "sliding_window": None,
        "layer_types": ["full_attention"] * 5,
        "dflash_config": {"mask_token_id": 151669, "target_layer_ids": [1, 9, 17, 25, 33], "block_size": 8},
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    config = DFlashConfig.from_pretrained(tmp_path)
    assert config.block_size == 8
    assert (config.mask_token_id, config.target_layer_ids) == (151669, [1, 9, 17, 25, 33])
    assert config.to_dict()["rope_theta"] == 1000000
    with torch.device("meta"):
        drafter = DFlashDrafter(config)
    assert len(drafter.state_dict()) == 58
    assert 1.04e9 < sum(p.numel() for p in drafter.parameters()) < 1.06e9


def test_a_longer_rotary_scaling_survives(tmp_path):
    config = DFlashConfig(
        num_target_layers=36,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 5e5,
            "original_max_position_embeddings": 4096,
        },
        dflash_config={"mask_token_id": 1},
    )
    config.save_pretrained(tmp_path)
    again = DFlashConfig.from_pretrained(tmp_path)
    assert again.rope_parameters["factor"] == 4.0 and again.rope_parameters["rope_theta"] == 5e5
    assert isinstance(again, Qwen3Config)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"block_size": 1}, "block_size is 1"),
        ({"taps": [1, 6]}, "tap 6 is out of range"),
        ({"mask_token_id": 97}, "mask token 97"),
    ],
)
def test_refuses(change, message):
    options = {"mask_token_id": MASK_TOKEN, "taps": 3} | change
    with pytest.raises(ValueError, match=message):
        DFlashDrafter.for_target(Target(tiny_model("llama")), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_from_anchor": True}, "does not read sample_from_anchor: decode with dflash_ext.decode"),
        ({"window_convention": "speculators"}, "keeps too little context for speculators' windows"),
        ({"noise": "uniform"}, "fills blocks with the mask token instead of random tokens"),
        ({"own_head": True}, "uses the target's embedding and head instead of the drafter's own"),
    ],
)
@torch.no_grad()
def test_transformers_loop_is_refused_what_it_would_misread(change, message, monkeypatch):
    class LoopCache(DynamicCache):
        """Stands for transformers' DFlashCache, by which its loop is known."""

    monkeypatch.setattr(drafter_module, "_LOOP_CACHE", LoopCache)
    _, drafter = tiny_pair("llama", sliding=True)
    inputs = {
        "noise_embeds": torch.randn(1, 6, 64),
        "context_hidden_states": torch.randn(1, 4, 192),
        "position_ids": torch.arange(10)[None],
    }
    drafter(**inputs, cache=LoopCache())
    for name, value in change.items():
        setattr(drafter.config, name, value)
    drafter(**inputs, cache=DynamicCache())
    with pytest.raises(ValueError, match=message):
        drafter(**inputs, cache=LoopCache())


def test_refuses_another_target():
    _, drafter = tiny_pair("llama")
    other = Target(tiny_model("llama", num_hidden_layers=5))
    with pytest.raises(ValueError, match="num_target_layers is 6.*has 5"):
        drafter.check_target(other)


def test_refuses_folders_without_a_drafter(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        load_drafter(tmp_path)
    tiny_model("qwen3").save_pretrained(tmp_path / "target")
    with pytest.raises(ValueError, match="no drafter"):
        load_drafter(tmp_path / "target")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target_layer_ids": "all"}, "target_layer_ids is 'all'"),
        ({"target_layer_ids": [1, -2]}, "list of layer numbers"),
        ({"target_layer_ids": [1], "mask_token_id": 64}, "mask_token_id is 64: a token of the vocabulary of 64"),
        ({"target_layer_ids": [1], "mask_token_id": "<mask>"}, "mask_token_id is '<mask>'"),
    ],
)
def test_a_wrong_config_is_refused_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        DFlashConfig(dflash_config=given, vocab_size=64, num_target_layers=4)


def test_a_drafter_starts_from_another_one_of_the_same_shape():
    def drafter(shape=None, **options):
        target = Target(tiny_model("llama", **shape or {}))
        return DFlashDrafter.for_target(target, mask_token_id=MASK_TOKEN, num_layers=1, taps=1, **options)

    new, other = drafter(block_size=4), drafter(block_size=8)
    new.start_from(other)
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in new.state_dict().items())
    for changed in (
        drafter({"num_attention_heads": 2, "num_key_value_heads": 1}, block_size=4),
        drafter(block_size=4, sample_from_anchor=True),
        drafter({"hidden_size": 32}, block_size=4),
    ):
        with pytest.raises(ValueError, match="the drafter to start from has .*, the new one") as caught:
            new.start_from(changed)
        assert "\n" not in str(caught.value)
