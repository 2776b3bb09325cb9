"""A LoRA adapter beside a model."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from dflash_ext.models import LoraAdapter, Target
from dflash_ext.models.lora import load_adapter, save_adapter
from python_tests.tiny import FAMILIES, random_prompts, tiny_model

IDS = torch.tensor(random_prompts(12, 12))


def trained_adapter(target, **options) -> LoraAdapter:
    """An adapter that changes what the model computes."""
    torch.manual_seed(1)
    adapter = LoraAdapter.for_target(target, **{"rank": 4, "alpha": 6} | options)
    for b in adapter.lora_b:
        torch.nn.init.normal_(b, std=0.2)
    return adapter


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["all", ["o_proj"]])
def test_peft_reads_a_saved_adapter_and_gives_the_same_logits(family, targets, tmp_path):
    model = tiny_model(family)
    base = logits(model)
    adapter = trained_adapter(Target(model), targets=targets)
    with adapter.applied(model):
        adapted = logits(model)
    assert (adapted - base).abs().max() > 0.01
    assert torch.equal(logits(model), base), "outside of applied, the model is the base"
    save_adapter(adapter, tmp_path)
    theirs = PeftModel.from_pretrained(tiny_model(family), tmp_path)
    assert sum("lora_A" in name for name, _ in theirs.named_parameters()) == len(adapter.paths)
    torch.testing.assert_close(logits(theirs), adapted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_peft_gives_the_same_logits_here(rslora, tmp_path):
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_rslora=rslora)
    theirs = get_peft_model(tiny_model("qwen3"), config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path)
    model = tiny_model("qwen3")
    adapter = load_adapter(tmp_path, Target(model))
    with adapter.applied(model):
        torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rows_that_the_gate_leaves_out_keep_the_bits_of_the_base():
    model = tiny_model("llama")
    adapter = trained_adapter(Target(model), targets=["down_proj"])
    rows = torch.zeros(IDS.shape, dtype=torch.bool)
    rows[:, 8:] = True  # under the causal mask, no earlier row sees these
    base = logits(model)
    with adapter.applied(model, rows):
        gated = logits(model)
    with adapter.applied(model):
        whole = logits(model)
    assert torch.equal(gated[:, :8], base[:, :8])
    assert not torch.isclose(gated[:, 8:], base[:, 8:]).all(dim=-1).any()
    assert not torch.equal(gated[:, 8:], whole[:, 8:]), "the context of the gated rows is the base's"


def test_only_the_adapter_gets_gradients():
    model = tiny_model("llama")
    adapter = trained_adapter(Target(model))
    with adapter.applied(model):
        model(input_ids=IDS).logits.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapter.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("rank", [2, 4, 7])
def test_an_adapter_starts_from_another_one(rank):
    """With as much rank or more it computes the same, and with less it has the best approximation of each update."""
    target = Target(tiny_model("llama"))
    first = trained_adapter(target)
    second = LoraAdapter.for_target(target, rank=rank, alpha=3)
    second.start_from(first)
    for path in first.paths:
        want, got = (each.scale * each.halves(path)[1] @ each.halves(path)[0] for each in (first, second))
        u, sizes, v = torch.linalg.svd(want)
        best = (u[:, :rank] * sizes[:rank]) @ v[:rank] if rank < 4 else want
        torch.testing.assert_close(got, best, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="has the shape .*, and that of the adapter to start from"):
        second.start_from(LoraAdapter.for_target(Target(tiny_model("llama", hidden_size=32)), rank=2))


def test_a_new_adapter_changes_nothing():
    model = tiny_model("gemma3")
    adapter = LoraAdapter.for_target(Target(model), rank=2)
    with adapter.applied(model):
        adapted = logits(model)
    assert torch.equal(adapted, logits(model))
