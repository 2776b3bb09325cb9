"""LoRA drafters and their folders."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from dflash_ext.models import LoraDrafter, Target, is_lora_drafter, load_lora_drafter, save_lora_drafter
from python_tests.tiny import FAMILIES, MASK_TOKEN, random_prompts, tiny_model

OPTIONS = dict(mask_token_id=MASK_TOKEN, rank=4, block_size=6)


def tiny_lora(family: str, **options) -> tuple[Target, LoraDrafter]:
    """A target and a random LoRA drafter for it, whose every part has an effect."""
    target = Target(tiny_model(family))
    torch.manual_seed(2)
    drafter = LoraDrafter.for_target(target, **OPTIONS | options)
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return target, drafter


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"sampler_width": 8, "kind": "whole", "causal": True}])
def test_a_drafter_survives_its_folder(family, options, tmp_path):
    target, drafter = tiny_lora(family, **options)
    assert not is_lora_drafter(tmp_path)
    save_lora_drafter(drafter, tmp_path, base_name="someone/base")
    assert is_lora_drafter(tmp_path)
    loaded = load_lora_drafter(tmp_path, target)
    assert loaded.config == drafter.config
    assert loaded.adapter.scale == drafter.adapter.scale and not loaded.training
    ours, theirs = drafter.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    PeftModel.from_pretrained(target.model, tmp_path)  # PEFT does not mind our files


def test_a_drafter_of_another_base_is_refused(tmp_path):
    _, drafter = tiny_lora("qwen3")
    save_lora_drafter(drafter, tmp_path)
    other = tiny_model("qwen3")
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="was made for another base: its weights is '.*', this target's is '.*'"):
        load_lora_drafter(tmp_path, Target(other))
    with pytest.raises(ValueError, match="its class is 'Qwen3ForCausalLM', this target's is 'LlamaForCausalLM'"):
        load_lora_drafter(tmp_path, Target(tiny_model("llama")))


def test_a_whole_drafter_is_refused_for_one_forward():
    target, drafter = tiny_lora("llama", kind="whole")
    drafter.config.check_target(target)
    with pytest.raises(ValueError, match="a whole LoRA drafter acts on every row"):
        drafter.config.check_one_forward()
    tiny_lora("llama")[1].config.check_one_forward()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "half"}, "the kind of a LoRA drafter is 'half': gated, whole are supported"),
        ({"block_size": 1}, "block_size is 1: at least 2"),
        ({"mask_token_id": 97}, "mask_token_id is 97: one of the base's 97 tokens"),
        ({"sampler_width": -1}, "sampler_width is -1"),
        ({"rank": 0}, "the rank of an adapter is 0"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_lora("llama", **options)


@pytest.mark.parametrize("content", ["[]", "{", '{"kind": "gated"}', '{"what": 1}'])
def test_a_broken_config_is_one_line(content, tmp_path):
    target, drafter = tiny_lora("llama")
    save_lora_drafter(drafter, tmp_path)
    (tmp_path / "lora_drafter.json").write_text(content)
    with pytest.raises(ValueError, match="cannot read the LoRA drafter's config in") as raised:
        load_lora_drafter(tmp_path, target)
    assert "\n" not in str(raised.value)


def test_tensors_that_do_not_fit_the_config_are_refused(tmp_path):
    target, drafter = tiny_lora("llama", sampler_width=8)
    save_lora_drafter(drafter, tmp_path)
    config = json.loads((tmp_path / "lora_drafter.json").read_text())
    (tmp_path / "lora_drafter.json").write_text(json.dumps(config | {"sampler_width": 4}))
    with pytest.raises(ValueError, match="does not hold mask_embedding, sampler.inner.weight, .* in the shapes of its"):
        load_lora_drafter(tmp_path, target)
    tensors = load_file(tmp_path / "lora_drafter.safetensors")
    save_file({"mask_embedding": tensors["mask_embedding"]}, tmp_path / "lora_drafter.safetensors")
    with pytest.raises(ValueError, match="does not hold mask_embedding"):
        load_lora_drafter(tmp_path, target)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mask_token_has_an_embedding_beside_the_table(family):
    target, drafter = tiny_lora(family)
    table = target.model.get_input_embeddings().weight.clone()
    ids = torch.tensor([*random_prompts(5)[0], MASK_TOKEN])
    embedded = drafter.embed(target, ids)
    assert torch.equal(embedded[:5], target.model.get_input_embeddings()(ids[:5]))
    assert torch.equal(embedded[5], drafter.mask_embedding)
    embedded.square().sum().backward()
    assert drafter.mask_embedding.grad is not None
    assert torch.equal(target.model.get_input_embeddings().weight, table)


def test_the_sampler_head_starts_without_effect_and_reads_both_of_its_inputs():
    target = Target(tiny_model("llama"))
    torch.manual_seed(0)
    sampler = LoraDrafter.for_target(target, **OPTIONS, sampler_width=8).sampler
    hidden, previous, other = torch.randn(3, 2, 5, 64)
    assert torch.equal(sampler(hidden, previous), hidden)
    torch.nn.init.normal_(sampler.outer.weight)
    assert not torch.isclose(sampler(hidden, previous), sampler(hidden, other)).all()
    assert torch.allclose(sampler(hidden, previous), sampler(hidden, 3 * previous), atol=1e-4)
