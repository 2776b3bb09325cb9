"""The doctor finds how a drafter was trained when its config says something else."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch

from dflash_ext import drafter_doctor
from dflash_ext.decode import decode
from dflash_ext.drafter_doctor import AS_CONFIGURED, Findings, examine
from dflash_ext.models import LoraDrafter, Target
from dflash_ext.train import AnchorCollator
from dflash_ext.train.objectives import DFlashObjective, LoraObjective
from python_tests.data.letters import letters
from python_tests.tiny import MASK_TOKEN, tiny_model, tiny_pair

PROMPTS = [[10 + (i * i + shift) % 7 for i in range(12)] for shift in range(4)]


def learn(objective, rate: float) -> None:
    """Trains a drafter on the target's own answers to the prompts, so that each wrong reading costs it tau."""
    answers = decode(Target(objective.target.model), None, PROMPTS, max_new_tokens=24).completions
    samples = []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor(prompt + answer.tokens)
        samples.append({"input_ids": ids, "loss_mask": torch.arange(len(ids)) >= len(prompt)})
    batch = AnchorCollator(24, 6, MASK_TOKEN)(samples)
    of_target = objective.of_target(batch)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=rate)
    for _ in range(100):
        optimizer.zero_grad()
        (objective(batch, *of_target).losses.sum() / objective.divisor(batch)).backward()
        optimizer.step()


@pytest.fixture(scope="module", params=["full", "sliding"])
def trained(request):
    target, drafter = tiny_pair("llama", sliding=request.param == "sliding")
    learn(DFlashObjective(drafter, target, gamma=4.0), 3e-3)
    return target, drafter.eval()


def found(target, drafter) -> Findings:
    return examine(target, drafter, letters(), {"given": PROMPTS}, max_new_tokens=24)


def test_nothing_is_wrong_with_a_drafter_that_is_read_as_it_was_trained(trained):
    findings = found(*trained)
    assert findings.best == AS_CONFIGURED, findings.readings
    assert not findings.warnings()
    assert findings.readings[AS_CONFIGURED] == findings.decoded_tau > 3
    assert findings.logit_difference < 1e-4


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"target_layer_ids": +1}, "taps shifted by -1"),
        ({"target_layer_ids": -1}, "taps shifted by +1"),
        ({"mask_token_id": 5}, f"mask token {MASK_TOKEN}, the tokenizer's mask token"),
        ({"sample_from_anchor": True}, "labels that begin behind the anchor (sample_from_anchor is False)"),
    ],
)
def test_a_wrong_config_is_found(trained, wrong, named):
    target, drafter = trained
    ((key, value),) = wrong.items()
    config = drafter.config
    if key == "target_layer_ids":
        value = [tap + value for tap in config.target_layer_ids]
        target = Target(target.model, value)
    changes = {key: value} if key == "sample_from_anchor" else {"dflash_config": config.dflash_config | {key: value}}
    tokenizer = SimpleNamespace(mask_token_id=MASK_TOKEN, pad_token_id=None, unk_token_id=None, eos_token_id=None)
    findings = examine(
        target, drafter_doctor._read_as(drafter, **changes), tokenizer, {"given": PROMPTS}, max_new_tokens=24
    )
    assert findings.best == named
    assert any(f"the drafter fits {named}: tau" in warning for warning in findings.warnings())


def test_a_tau_far_below_what_the_slots_imply_is_said():
    findings = Findings({AS_CONFIGURED: 3.3}, [0.9, 0.9, 0.8], 1.2, 0.0, torch.float32)
    assert findings.implied_tau == pytest.approx(1 + 0.9 + 0.81 + 0.648)
    (warning,) = findings.warnings()
    assert "tau is 1.20, and the accuracy of the slots implies 3.36" in warning
    assert not Findings({AS_CONFIGURED: 3.3}, [0.9, 0.9, 0.8], 3.2, 0.0, torch.float32).warnings()


def test_a_reading_by_chance_is_not_named():
    findings = Findings({AS_CONFIGURED: 1.0, "taps shifted by +1": 1.2}, [0.0, 0.1], 1.0, 0.0, torch.float32)
    assert findings.best == AS_CONFIGURED
    (warning,) = findings.warnings()
    assert "no reading has a tau above 1.20: the drafter was hardly trained, or for another model" in warning


def test_a_drafter_of_random_tokens_is_read_with_random_tokens(monkeypatch):
    target, drafter = tiny_pair("llama", noise="uniform")
    seen = []
    losses = DFlashObjective.forward

    def watched(self, batch, *of_target):
        seen.append(batch["noise_ids"][:, :, 1:])
        return losses(self, batch, *of_target)

    monkeypatch.setattr(DFlashObjective, "forward", watched)
    findings = found(target, drafter)
    assert not any("mask token" in name or "sample_from_anchor" in name for name in findings.readings)
    assert all((ids == MASK_TOKEN).float().mean() < 0.5 and len(ids.unique()) > 20 for ids in seen)


def test_logits_that_differ_are_said(trained, monkeypatch):
    target, drafter = trained
    wrong = copy.deepcopy(drafter)
    whole = type(drafter).decode_masks
    monkeypatch.setattr(  # decoding that does not see the last token before the anchor
        type(drafter), "decode_masks", lambda self, lens, *sizes: whole(self, (lens - 1).clamp(min=0), *sizes)
    )
    findings = found(target, wrong)
    assert any("training and decoding give different logits" in warning for warning in findings.warnings())


@pytest.fixture(scope="module", params=["gated", "whole"])
def trained_lora(request):
    target = Target(tiny_model("llama"))
    torch.manual_seed(0)
    options = dict(mask_token_id=MASK_TOKEN, rank=16, block_size=6, kind=request.param, causal=True)
    drafter = LoraDrafter.for_target(target, **options)
    learn(LoraObjective(drafter, target, gamma=4.0), 5e-3)
    return target, drafter.requires_grad_(False).eval()


def test_a_lora_drafter_that_is_read_as_it_was_trained_is_right(trained_lora):
    findings = found(*trained_lora)
    assert findings.best == AS_CONFIGURED and not findings.warnings()
    assert findings.readings[AS_CONFIGURED] == findings.decoded_tau > 2


def test_a_lora_drafter_of_the_other_kind_is_found(trained_lora):
    target, drafter = trained_lora
    kind, wrong = drafter.config.kind, copy.copy(drafter)
    wrong.config = dataclasses.replace(drafter.config, kind="whole" if kind == "gated" else "gated")
    assert found(target, wrong).best == f"an adapter of the other kind, {kind}"
