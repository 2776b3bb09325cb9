"""Checkpoints of vllm-project/speculators, against a plain implementation of its DFlash forward."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dflash_ext.models import DFlashConfig, Target, load_drafter, save_drafter, save_speculators_drafter
from python_tests.tiny import FAMILIES, MASK_TOKEN, VOCAB, random_prompts, tiny_model, tiny_pair

BLOCK, WINDOW, THETA, EPS, HEADS, KV_HEADS, DIM, HIDDEN = 5, 3, 50_000.0, 1e-5, 4, 2, 16, 64
KINDS = ["sliding_attention", "full_attention"]
DRAFTED = torch.tensor([0, 4, 9, 17, 50, 95])


def layout(**changes) -> dict:
    """`config.json` as speculators 0.9 writes it."""
    layers = dict(
        model_type="qwen3",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=len(KINDS),
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        rms_norm_eps=EPS,
        rope_parameters={"rope_theta": THETA, "rope_type": "default"},
        layer_types=KINDS,
        sliding_window=WINDOW,
        use_sliding_window=True,
    )
    config = dict(
        architectures=["DFlashDraftModel"],
        auto_map={"": "config.DFlashSpeculatorConfig"},
        speculators_model_type="dflash",
        speculators_version="0.9.0",
        speculators_config={"algorithm": "dflash"},
        transformer_layer_config=layers,
        draft_vocab_size=VOCAB,
        block_size=BLOCK,
        aux_hidden_state_layer_ids=[1, 3, 6],
        mask_token_id=MASK_TOKEN,
        sliding_window_non_causal=False,
        sample_from_anchor=False,
        target_hidden_size=None,
    )
    return config | changes


def random_tensors(reduced: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"fc.weight": (HIDDEN, 3 * HIDDEN), "hidden_norm.weight": (HIDDEN,), "norm.weight": (HIDDEN,)}
    for layer in range(len(KINDS)):
        own = {
            "self_attn.q_proj": (HEADS * DIM, HIDDEN),
            "self_attn.k_proj": (KV_HEADS * DIM, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * DIM, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * DIM),
            "self_attn.q_norm": (DIM,),
            "self_attn.k_norm": (DIM,),
            "mlp.gate_proj": (96, HIDDEN),
            "mlp.up_proj": (96, HIDDEN),
            "mlp.down_proj": (HIDDEN, 96),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }
        shapes |= {f"layers.{layer}.{name}.weight": shape for name, shape in own.items()}
    shapes["embed_tokens.weight"] = (VOCAB, HIDDEN)
    shapes["lm_head.weight"] = (len(DRAFTED) if reduced else VOCAB, HIDDEN)
    tensors = {}
    for name, shape in shapes.items():
        noise = 0.15 * torch.randn(shape, generator=generator)
        tensors[name] = noise + 1 if len(shape) == 1 else noise
    tensors["verifier_norm.weight"] = torch.ones(HIDDEN)  # kept for training alone
    if reduced:
        tensors["d2t"] = DRAFTED - torch.arange(len(DRAFTED))
        tensors["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill_(0, DRAFTED, True)
    return tensors


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """RoPE of [rows, heads, DIM] at `positions` [rows]."""
    angles = positions[:, None] / THETA ** (torch.arange(0, DIM, 2) / DIM)
    cos, sin = (f(torch.cat([angles, angles], dim=1))[:, None] for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def plain_forward(
    tensors: dict[str, torch.Tensor], features: torch.Tensor, anchor: int, token: int, non_causal: bool
) -> torch.Tensor:
    """Logits [BLOCK, rows of the head] of the block at `anchor`, over the `features` [S, 3 * HIDDEN] before it."""
    context = norm(features[:anchor] @ tensors["fc.weight"].T, tensors["hidden_norm.weight"])
    hidden = tensors["embed_tokens.weight"][[token] + [MASK_TOKEN] * (BLOCK - 1)]
    positions = torch.arange(anchor + BLOCK)
    for layer, kind in enumerate(KINDS):
        own = {k.removeprefix(f"layers.{layer}."): t for k, t in tensors.items() if k.startswith(f"layers.{layer}.")}
        x = norm(hidden, own["input_layernorm.weight"])
        source = torch.cat([context, x])
        q = (x @ own["self_attn.q_proj.weight"].T).view(BLOCK, HEADS, DIM)
        k = (source @ own["self_attn.k_proj.weight"].T).view(-1, KV_HEADS, DIM)
        v = (source @ own["self_attn.v_proj.weight"].T).view(-1, KV_HEADS, DIM)
        q = rotate(norm(q, own["self_attn.q_norm.weight"]), positions[anchor:])
        k = rotate(norm(k, own["self_attn.k_norm.weight"]), positions)
        sliding = kind == "sliding_attention"
        out = torch.zeros(BLOCK, HEADS, DIM)
        for slot in range(BLOCK):
            seen = list(range(max(0, anchor - WINDOW) if sliding else 0, anchor))
            last = slot if sliding and not non_causal else BLOCK - 1
            seen += range(anchor, anchor + last + 1)
            for head in range(HEADS):
                kv = head // (HEADS // KV_HEADS)
                weights = torch.softmax(k[seen, kv] @ q[slot, head] / DIM**0.5, dim=0)
                out[slot, head] = weights @ v[seen, kv]
        hidden = hidden + out.flatten(1) @ own["self_attn.o_proj.weight"].T
        x = norm(hidden, own["post_attention_layernorm.weight"])
        gate = torch.nn.functional.silu(x @ own["mlp.gate_proj.weight"].T)
        hidden = hidden + (gate * (x @ own["mlp.up_proj.weight"].T)) @ own["mlp.down_proj.weight"].T
    return norm(hidden, tensors["norm.weight"]) @ tensors["lm_head.weight"].T


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("non_causal", [False, True])
@torch.no_grad()
def test_the_forward_is_that_of_speculators(tmp_path, non_causal, reduced):
    tensors = random_tensors(reduced)
    rows = len(tensors["lm_head.weight"])
    (tmp_path / "config.json").write_text(
        json.dumps(layout(sliding_window_non_causal=non_causal, draft_vocab_size=rows))
    )
    save_file(tensors, tmp_path / "model.safetensors")
    drafter = load_drafter(tmp_path, dtype=torch.float32, device=torch.device("cpu"))
    assert drafter.config.target_layer_ids == [0, 2, 5] and drafter.config.block_size == BLOCK
    target = Target(tiny_model("qwen3"), drafter.config.target_layer_ids)
    drafter.check_target(target)

    generator = torch.Generator().manual_seed(2)
    tokens, anchors = torch.randint(3, MASK_TOKEN, (1, 14), generator=generator), torch.tensor([[2, 7, 13]])
    features = torch.randn(1, 14, 3 * HIDDEN, generator=generator)
    positions = anchors[:, :, None] + torch.arange(BLOCK)
    noise = torch.full_like(positions, MASK_TOKEN)
    noise[:, :, 0] = tokens.gather(1, anchors)
    hidden = drafter(
        noise_embeds=drafter.embed(target, noise.flatten(1)),
        context_hidden_states=features,
        position_ids=torch.cat([torch.arange(14)[None], positions.flatten(1)], dim=1),
        attention_mask=drafter.anchor_masks(14, anchors),
    ).last_hidden_state
    trained = drafter.logits(target, hidden).unflatten(1, (-1, BLOCK))
    for block, anchor in enumerate(anchors[0].tolist()):
        expected = plain_forward(tensors, features[0], anchor, int(tokens[0, anchor]), non_causal)
        decoded = drafter.logits(
            target,
            drafter(
                noise_embeds=drafter.embed(target, noise[:, block]),
                context_hidden_states=features[:, :anchor],
                position_ids=torch.arange(anchor + BLOCK)[None],
            ).last_hidden_state,
        )
        for logits in (trained[0, block], decoded[0]):
            logits = logits[:, DRAFTED] if reduced else logits
            torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:the drafter in")
def test_what_was_read_survives_the_published_layout(tmp_path):
    tensors = random_tensors(False)
    (tmp_path / "config.json").write_text(
        json.dumps(layout(sliding_window_non_causal=True, sample_from_anchor=True, block_size=7))
    )
    save_file(tensors, tmp_path / "model.safetensors")
    drafter = load_drafter(tmp_path, dtype=torch.float32, device=torch.device("cpu"))
    save_drafter(drafter, tmp_path / "again")
    again = load_drafter(tmp_path / "again", dtype=torch.float32, device=torch.device("cpu"))
    for config in (drafter.config, again.config):
        assert (config.block_size, config.sample_from_anchor, config.first_draft_slot) == (7, True, 0)
        assert (config.window_convention, config.is_causal, config.own_head) == ("speculators", False, True)
        assert config.rope_parameters["rope_theta"] == THETA and config.rms_norm_eps == EPS
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speculators_model_type": "dspark"}, "speculators_model_type is 'dspark': 'dflash' is supported"),
        ({"aux_hidden_state_layer_ids": [0, 3]}, r"aux_hidden_state_layer_ids is \[0, 3\]: layer numbers from 1 on"),
        ({"aux_hidden_state_layer_ids": None}, "aux_hidden_state_layer_ids is None"),
        ({"markov_rank": 256}, "markov_rank is 256"),
        ({"conv_kernel_size": 2}, "conv_kernel_size is 2"),
        ({"target_hidden_size": 128}, "target_hidden_size is 128, hidden_size 64"),
    ],
)
def test_other_speculators_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        DFlashConfig.from_dict(layout(**change))


@torch.no_grad()
def drafted(target: Target, drafter) -> torch.Tensor:
    """The logits of a block behind 9 tokens of `random_prompts`."""
    tokens = torch.tensor(random_prompts(9))
    size = drafter.config.block_size
    block = torch.tensor([[5] + [MASK_TOKEN] * (size - 1)])
    hidden = drafter(
        noise_embeds=drafter.embed(target, block),
        context_hidden_states=target.features(tokens),
        position_ids=torch.arange(9 + size)[None],
    ).last_hidden_state
    return drafter.logits(target, hidden)


def read(folder) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


@pytest.mark.parametrize("non_causal", [False, True])
@pytest.mark.parametrize("reduced", [False, True])
def test_what_speculators_wrote_is_written_again(tmp_path, reduced, non_causal):
    """The config has the keys and values that it had, and the tensors are the same, but for those of training."""
    tensors = random_tensors(reduced)
    rows = len(tensors["lm_head.weight"])
    given = layout(sliding_window_non_causal=non_causal, draft_vocab_size=rows, aux_hidden_state_layer_ids=[1, 3, 5])
    for folder in ("given", "again"):
        (tmp_path / folder).mkdir()
    (tmp_path / "given" / "config.json").write_text(json.dumps(given))
    save_file(tensors, tmp_path / "given" / "model.safetensors")
    drafter = load_drafter(tmp_path / "given", dtype=torch.float32, device=torch.device("cpu"))
    target = Target(tiny_model("qwen3"), drafter.config.target_layer_ids)
    save_speculators_drafter(drafter, target, tmp_path / "again")
    config, written = read(tmp_path / "again")
    layers, given_layers = config.pop("transformer_layer_config"), given.pop("transformer_layer_config")
    assert {key: layers[key] for key in given_layers} == given_layers
    proposal = {"proposal_type": "greedy", "speculative_tokens": BLOCK - 1}
    assert config.pop("speculators_config") == {
        "algorithm": "dflash",
        "proposal_methods": [proposal],
        "default_proposal_method": "greedy",
        "verifier": {"name_or_path": None, "architectures": ["Qwen3ForCausalLM"]},
    }
    del given["speculators_config"], given["auto_map"]
    assert {key: config[key] for key in given} == given
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("verifier")}
    assert written.keys() == kept.keys() and all(torch.equal(written[name], kept[name]) for name in kept)


@pytest.mark.filterwarnings("ignore:the drafter in")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_drafter_is_written(tmp_path, family):
    """The written one drafts as it did, with the factors of Gemma's embedding in its own table; and back again."""
    target, drafter = tiny_pair(family, taps=[0, 2, 4])
    drafter.config.dflash_config["output_multiplier"] = 0.5
    save_speculators_drafter(drafter, target, tmp_path / "speculators")
    config, tensors = read(tmp_path / "speculators")
    assert config["aux_hidden_state_layer_ids"] == [1, 3, 5] and tensors["embed_tokens.weight"].shape[0] == VOCAB
    again = load_drafter(tmp_path / "speculators", dtype=torch.float32, device=torch.device("cpu"))
    again.check_target(target)
    expected = drafted(target, drafter)
    torch.testing.assert_close(drafted(target, again), expected)
    save_drafter(again, tmp_path / "published")
    back = load_drafter(tmp_path / "published", dtype=torch.float32, device=torch.device("cpu"))
    torch.testing.assert_close(drafted(target, back), expected)
    save_speculators_drafter(drafter, target, tmp_path / "speculators", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in read(tmp_path / "speculators")[1].values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_causal": True}, "its full layers are bidirectional"),
        ({"dflash_config": {"final_logit_softcapping": 30.0}}, "it has no final_logit_softcapping"),
        ({"dflash_config": {"target_layer_ids": [0, 2, 5]}}, "it has no tap at the target's last layer, 5"),
        ({"sliding": True}, "each slot has a window of its own"),
    ],
)
def test_what_the_layout_cannot_describe_is_refused(tmp_path, change, message):
    target, drafter = tiny_pair("llama", taps=[0, 2, 4], sliding=change.pop("sliding", False))
    drafter.config.dflash_config |= change.pop("dflash_config", {})
    for name, value in change.items():
        setattr(drafter.config, name, value)
    with pytest.raises(ValueError, match=f"speculators' layout cannot describe this drafter: .*{message}"):
        save_speculators_drafter(drafter, target, tmp_path / "speculators")
    assert not (tmp_path / "speculators").exists()
