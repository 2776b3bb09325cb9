"""The definition of the loss against PyTorch's own functions."""

import math

import pytest
import torch
import torch.nn.functional as F

from dflash_ext import reference

from . import randn


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_cross_entropy_is_pytorchs_with_a_weight_per_row(reduction, smoothing):
    logits, target = randn(2, 3, 7) * 3, torch.tensor([[0, 6, 3], [2, 99, -5]])
    weight = torch.tensor([[1.0, 0.5, 2.0], [0.25, 0.0, 0.0]])
    safe = target.where(weight != 0, 0)
    each = F.cross_entropy(logits.flatten(0, 1), safe.flatten(), reduction="none", label_smoothing=smoothing)
    want = each.view(2, 3) * weight
    want = {"none": want, "sum": want.sum(), "mean": want.sum() / weight.sum()}[reduction]
    logits[1, 2] = math.nan
    logits.requires_grad_()
    got = reference.masked_cross_entropy(logits, target, weight, reduction=reduction, label_smoothing=smoothing)
    torch.testing.assert_close(got.loss, want)
    (grad,) = torch.autograd.grad(got.loss.sum(), logits)
    assert (grad[1, 1:] == 0).all() and (grad[0] != 0).all()


def test_cross_entropy_statistics_per_row():
    logits, target = randn(5, 7), torch.arange(5)
    logits[3, 3], logits[4, :3] = 9.0, -math.inf
    weight = torch.tensor([1.0, 1.0, 0.0, 3.0, 1.0])
    got = reference.masked_cross_entropy(logits, target, weight)
    rows = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(got.nll, -rows.log_prob(target) * (weight != 0))
    probs = rows.probs
    entropy = -(probs * probs.clamp(min=1e-300).log()).sum(-1)
    torch.testing.assert_close(got.entropy, entropy * (weight != 0))
    assert got.correct.tolist() == [bool(i != 2 and logits[i].argmax() == i) for i in range(5)]
    assert got.correct[3] and not got.nll.requires_grad


def test_cross_entropy_without_any_weight_is_zero():
    logits = randn(3, 4).requires_grad_()
    loss = reference.masked_cross_entropy(logits, torch.zeros(3).long(), torch.zeros(3)).loss
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss == 0 and (grad == 0).all()


@pytest.mark.parametrize("kind", ["kl", "tv"])
def test_cross_entropy_with_softcap_z_loss_and_teacher(kind):
    logits, teacher = randn(3, 6) * 4, randn(3, 6, seed=1)
    teacher[:, 0] = -math.inf
    target = torch.tensor([1, 2, 3])
    got = reference.masked_cross_entropy(
        logits,
        target,
        reduction="none",
        softcap=3.0,
        z_loss=0.1,
        label_smoothing=0.1,
        teacher=teacher,
        teacher_kind=kind,
        teacher_mix=0.25,
    ).loss
    z = 3.0 * torch.tanh(logits / 3.0)
    logp, t = z.log_softmax(-1), teacher.softmax(-1)
    if kind == "kl":
        divergence = F.kl_div(logp, t, reduction="none").sum(-1)
    else:
        divergence = (t - logp.exp()).abs().sum(-1) / 2
    hard = F.cross_entropy(z, target, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(got, 0.75 * hard + 0.25 * divergence + 0.1 * z.logsumexp(-1) ** 2)

    logits.requires_grad_()
    options = dict(softcap=3.0, z_loss=0.1, teacher=teacher, teacher_kind=kind, teacher_mix=0.25)
    assert torch.autograd.gradcheck(
        lambda x: reference.masked_cross_entropy(x, target, reduction="none", **options).loss, logits
    )
