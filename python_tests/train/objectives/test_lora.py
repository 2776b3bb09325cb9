"""The objective of LoRA drafters, against the loss of one block at a time."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax, rms_norm, silu

from dflash_ext.models import Target
from dflash_ext.train import AnchorCollator, dpace, position_decay
from dflash_ext.train.anchors import one_forward_dpace
from dflash_ext.train.objectives import LoraObjective
from python_tests.models.lora.test_drafter import tiny_lora
from python_tests.models.lora.test_rows import one_block
from python_tests.pairwise import pairwise
from python_tests.tiny import FAMILIES, MASK_TOKEN, tiny_model
from python_tests.train.test_collator import samples

KINDS = ["gated", "whole"]


def a_batch(**options) -> dict[str, torch.Tensor]:
    return AnchorCollator(4, 6, MASK_TOKEN, **options)(samples(4))


@torch.no_grad()
def expected(target, drafter, batch, *, gamma, kl_weight, forwards=2) -> torch.Tensor:
    """The losses of all slots [B, N, K], from one block at a time and PyTorch's own losses."""
    losses = torch.zeros(batch["labels"][:, :, 1:].shape)
    for row, ids in enumerate(batch["input_ids"]):
        teacher = log_softmax(target.model(input_ids=ids[None]).logits[0], dim=-1)
        for number, anchor in enumerate(batch["anchors"][row].tolist()):
            counts, labels = batch["counts"][row, number, 1:], batch["labels"][row, number]
            hidden = one_block(target, drafter, ids, anchor, batch["noise_ids"][row, number, 1:])
            states = [hidden]
            if drafter.sampler is not None:
                before = target.model.get_input_embeddings()(labels[:-1])
                both = torch.cat([rms_norm(hidden, [64]), rms_norm(before, [64])], dim=-1)
                inner, outer = drafter.sampler.inner.weight, drafter.sampler.outer.weight
                states.append(hidden + silu(both @ inner.T) @ outer.T)
            for state in states:
                logits = target.model.lm_head(state)
                nll = cross_entropy(logits, labels[1:], reduction="none") * counts
                seen = teacher[anchor : anchor + 5]
                seen = torch.cat([seen, seen[-1:].expand(5 - len(seen), -1)])  # slots beyond the text do not count
                divergence = kl_div(log_softmax(logits, dim=-1), seen, log_target=True, reduction="none").sum(dim=-1)
                loss = nll + kl_weight * divergence
                if gamma:
                    weight = counts * position_decay(5, gamma, first_slot=0)
                else:
                    weight = (dpace if forwards == 2 else one_forward_dpace)(nll, counts)
                losses[row, number] += loss * weight
    return losses


@pytest.mark.parametrize(
    "family, kind, settings",
    pairwise(
        FAMILIES,
        KINDS,
        [
            ({}, None, 0.0, {}),
            ({"causal": True}, 3.0, 0.5, {}),
            ({"sampler_width": 8}, None, 0.25, {"slot_noise": 0.5}),
        ],
    ),
)
def test_the_losses_are_their_definition(family, kind, settings):
    options, gamma, kl_weight, noise = settings
    target, drafter = tiny_lora(family, kind=kind, **options)
    objective = LoraObjective(drafter, target, gamma=gamma, kl_weight=kl_weight)
    batch = a_batch(**noise)
    losses, counts, _ = objective(batch, *objective.of_target(batch))
    want = expected(target, drafter, batch, gamma=gamma, kl_weight=kl_weight)
    assert counts.any() and torch.equal(want > 0, counts)
    torch.testing.assert_close(losses, want, atol=1e-4, rtol=1e-4)
    divisor = batch["keep"].sum() if gamma is None else (counts * position_decay(5, gamma, first_slot=0)).sum()
    assert objective.divisor(batch) == divisor


def test_the_weights_are_for_one_forward():
    target, drafter = tiny_lora("llama", sampler_width=8)
    objective, batch = LoraObjective(drafter, target, forwards=1), a_batch()
    losses = objective(batch, *objective.of_target(batch)).losses
    want = expected(target, drafter, batch, gamma=None, kl_weight=0.0, forwards=1)
    torch.testing.assert_close(losses, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_drafter_alone(kind):
    target, drafter = tiny_lora("qwen3", kind=kind, sampler_width=8)
    before = {name: parameter.clone() for name, parameter in target.model.named_parameters()}
    objective = LoraObjective(drafter, target, kl_weight=1.0)
    batch = a_batch()
    of_target = objective.of_target(batch)
    assert not any(each.requires_grad for each in of_target)
    objective(batch, *of_target).losses.sum().backward()
    assert {name for name, _ in objective.named_parameters()} == {f"drafter.{n}" for n, _ in drafter.named_parameters()}
    for name, parameter in drafter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    for name, parameter in target.model.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, before[name])


@torch.no_grad()
def test_the_context_of_a_gated_drafter_is_the_bases_to_the_bit():
    """Whatever the adapter, and also while it acts."""
    target, drafter = tiny_lora("llama")
    objective = LoraObjective(drafter, target)
    batch = a_batch()
    before = objective.of_target(batch)
    objective(batch, *before)
    for parameter in drafter.parameters():
        parameter.add_(1.0)
    after = objective.of_target(batch)
    assert len(before) == 1 + 2 * 6 and all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    plain = target.decoder(input_ids=batch["input_ids"], use_cache=False)[0]
    torch.testing.assert_close(before[0], plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_samples_that_share_rows_give_what_they_give_alone(family, kind):
    target, drafter = tiny_lora(family, kind=kind)
    objective = LoraObjective(drafter, target, kl_weight=0.5)
    found = []
    for pack_length in (None, 25):
        batch = AnchorCollator(5, 6, MASK_TOKEN, pack_length=pack_length)(samples())
        losses, counts, _ = objective(batch, *objective.of_target(batch))
        found.append((losses.detach().sum(dim=-1)[batch["keep"]].sort().values, counts.sum()))
    assert found[0][1] == found[1][1]
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_gives_the_same_gradients(kind):
    target, drafter = tiny_lora("llama", kind=kind)
    objective, batch, calls = LoraObjective(drafter, target), a_batch(), []
    of_target = objective.of_target(batch)

    def gradients() -> list[torch.Tensor]:
        objective.zero_grad()
        objective(batch, *of_target).losses.sum().backward()
        return [parameter.grad.clone() for parameter in objective.parameters()]

    want = gradients()
    target.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    objective.gradient_checkpointing_enable()
    assert all(torch.equal(*pair) for pair in zip(gradients(), want, strict=True))
    assert len(calls) == 2
    target.model(input_ids=batch["input_ids"])
    assert len(calls) == 3 and all("forward" not in vars(layer) for layer in target.layers)


def test_a_whole_drafter_has_no_weights_for_one_forward():
    target, drafter = tiny_lora("llama", kind="whole")
    with pytest.raises(ValueError, match="a gated one is needed"):
        LoraObjective(drafter, target, forwards=1)


def test_a_drafter_of_another_base_is_refused():
    _, drafter = tiny_lora("llama")
    with pytest.raises(ValueError, match="made for another base: its class is 'LlamaForCausalLM'"):
        LoraObjective(drafter, Target(tiny_model("qwen3")))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_on_a_gpu(kind):
    """Under autocast, as Trainer runs it, the gradients are those of the CPU in float32 but for rounding."""
    grads = []
    for device in ("cpu", "cuda"):
        target, drafter = tiny_lora("llama", kind=kind, sampler_width=8)
        objective = LoraObjective(drafter, target, kl_weight=0.5).to(device)
        target.model.to(device)
        batch = {name: value.to(device) for name, value in a_batch().items()}
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            if device == "cuda":
                target.model.bfloat16()
            objective(batch, *objective.of_target(batch)).losses.sum().backward()
        grads.append(torch.cat([parameter.grad.flatten().cpu() for parameter in objective.parameters()]))
    assert (grads[1] - grads[0]).norm() < 5e-2 * grads[0].norm()
