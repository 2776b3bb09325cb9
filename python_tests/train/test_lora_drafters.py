"""Training runs of LoRA drafters, from samples to a folder that PEFT and the decoder read."""

import json

import pytest
import torch

from dflash_ext.models import Target, load_lora_drafter
from dflash_ext.train import LoraRecipe, Recipe, new_lora_drafter, train_drafter
from python_tests.tiny import MASK_TOKEN, tiny_model
from python_tests.train.test_reproducible import Interrupt
from python_tests.train.test_training import Cycles


def train(folder, *, interrupt_at=None, resume=False, held_out=None, settings=None, **options):
    target = Target(tiny_model("llama"))
    drafter = new_lora_drafter(target, 0, **dict(mask_token_id=MASK_TOKEN, block_size=4, rank=4) | options)
    calls = []

    def count(module, *_):
        calls.append(1)
        if len(calls) == interrupt_at:
            raise Interrupt

    drafter.register_forward_hook(count)
    recipe = LoraRecipe(**dict(steps=6, batch_size=3, anchors=3, learning_rate=1e-2, log_every=1) | (settings or {}))
    log = train_drafter(drafter, target, Cycles(24), folder, recipe, resume=resume, held_out=held_out)
    return target, drafter, log


@pytest.mark.parametrize(
    "options, settings",
    [
        ({}, {}),
        ({"kind": "whole"}, {"checkpoint_activations": True}),
        ({"causal": True, "sampler_width": 16}, {"kl_weight": 0.1, "gamma": 2.0, "pack_length": 90}),
        ({"targets": ["o_proj", "down_proj"]}, {"noise_ratio": 0.9, "context_ratio": (0.1, 0.5)}),
        ({"targets": "attention"}, {"fixed_anchors": True, "optimizer": "muon"}),
    ],
)
def test_a_run_lowers_the_loss_and_its_folder_is_read(options, settings, tmp_path):
    target, drafter, log = train(tmp_path, **options, settings=settings | {"steps": 20}, held_out=Cycles(5))
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert sum(losses[-5:]) / 5 < 0.95 * sum(losses[:2]) / 2
    assert 0 < next(entry["eval_accuracy"] for entry in log if "eval_accuracy" in entry) <= 1
    loaded = load_lora_drafter(tmp_path, target)
    assert loaded.config == drafter.config
    for (name, ours), theirs in zip(loaded.state_dict().items(), drafter.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs.bfloat16().float()), name
    assert {"recipe", "log"} <= json.loads((tmp_path / "training.json").read_text()).keys()


@pytest.mark.parametrize("kind", ["gated", "whole"])
def test_a_resumed_run_equals_the_uninterrupted_one_bitwise(kind, tmp_path):
    options = dict(kind=kind, sampler_width=8, settings={"save_every": 2, "kl_weight": 0.5, "noise_ratio": 0.8})
    _, whole, _ = train(tmp_path / "whole", **options)
    with pytest.raises(Interrupt):
        train(tmp_path / "cut", interrupt_at=4, **options)
    _, resumed, _ = train(tmp_path / "cut", resume=True, **options)
    for (name, ours), theirs in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_checkpoint_of_another_drafter_is_refused(tmp_path):
    train(tmp_path, settings={"save_every": 2, "steps": 2})
    with pytest.raises(ValueError, match="rank is 4, this one's is 8"):
        train(tmp_path, settings={"save_every": 2}, rank=8, alpha=4, resume=True)


def test_the_first_weights_follow_from_the_seed():
    target = Target(tiny_model("llama"))
    options = dict(mask_token_id=MASK_TOKEN, rank=2, sampler_width=4)
    first, again, other = (new_lora_drafter(target, seed, **options).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["adapter.lora_a.0"], other["adapter.lora_a.0"])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kl_weight": -1.0}, "kl_weight is -1.0"),
        ({"context_ratio": 1.0}, "context_ratio is 1.0: a share from 0 on and below 1"),
        ({"context_ratio": (0.5, 0.2)}, r"context_ratio is \(0.5, 0.2\)"),
        ({"compile": True}, "compile is not supported for LoRA drafters"),
        ({"noise_ratio": 0.0}, "noise_ratio is 0.0"),
        ({"forwards": 3}, "forwards is 3: 1 and 2 are supported"),
        ({"tensor_parallel": True, "save_every": 2}, "tensor_parallel writes no checkpoints: save_every must be 0"),
        ({"tensor_parallel": True, "trainer_args": {"fsdp": True}}, "tensor_parallel and fsdp do not go together"),
        ({"forwards": 1, "gamma": 4.0}, "forwards is 1: this is for D-PACE weights"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraRecipe(**settings)


def test_one_process_has_nobody_to_share_layers_with(tmp_path):
    with pytest.raises(ValueError, match="tensor parallelism needs several processes, which torchrun starts"):
        train(tmp_path, settings={"tensor_parallel": True})


def test_a_recipe_of_another_kind_of_drafter_is_refused(tmp_path):
    target = Target(tiny_model("llama"))
    drafter = new_lora_drafter(target, 0, mask_token_id=MASK_TOKEN)
    with pytest.raises(ValueError, match="a LoraDrafter is trained by a LoraRecipe, not Recipe"):
        train_drafter(drafter, target, Cycles(4), tmp_path, Recipe(steps=1))
