"""The losses of a denoiser against the same written out over full logits."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from dflash_ext.data import NoiseCollator
from dflash_ext.models import Adaptation
from dflash_ext.noise import MaskNoise, Share
from dflash_ext.train.objectives import DenoisingObjective
from python_tests.models.test_adaptation import adaptation_of
from python_tests.tiny import MASK_TOKEN

ROWS, LENGTH = 3, 24
PATTERNS = {
    "causal": {},
    "prefix_block": {},
    "block_causal": {"block_size": 4},
    "blocks": {"pattern": "block_causal", "context": "block_causal", "block_size": 4},
}


def batch_of(block_size=None, **options):
    ids = torch.randint(3, MASK_TOKEN, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    samples = [{"input_ids": row, "starts": torch.tensor([0, 9]), "key": (0, 0, i)} for i, row in enumerate(ids)]
    return NoiseCollator(MaskNoise(Share(0.3, 0.6)), block_size=block_size, **options)(samples)


def objective_of(name, family="llama", **weights):
    options = {"pattern": name} | PATTERNS[name]
    return DenoisingObjective(adaptation_of(family, **options), **weights), options.get("block_size")


def logits(adaptation: Adaptation, batch):
    """Of all tokens, for which the model runs without any of the objective's code."""
    logits = adaptation.target.head @ adaptation(*adaptation.inputs(batch)).transpose(1, 2)
    return logits.transpose(1, 2)


@pytest.mark.parametrize("inverse_rate", [False, True])
@pytest.mark.parametrize("name", PATTERNS)
def test_cross_entropy_of_hidden_tokens(name, inverse_rate):
    objective, size = objective_of(name)
    batch = batch_of(size, inverse_rate=inverse_rate)
    result = objective(batch)
    full = logits(objective.adaptation, batch)[:, :LENGTH]
    want = cross_entropy(full.transpose(1, 2), batch["input_ids"], reduction="none")
    torch.testing.assert_close(result.losses, want * batch["weights"])
    assert torch.equal(result.counts, batch["hidden"])
    right = full.argmax(-1) == batch["input_ids"]
    assert torch.equal(result.correct & result.counts, right & batch["hidden"])
    blocks = (torch.arange(LENGTH) >= batch["blocks"]).sum()
    torch.testing.assert_close(
        objective.divisor(batch), (blocks if inverse_rate else batch["hidden"].sum()).float(), check_dtype=False
    )


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("family", ["llama", "gemma4"])
def test_gradients(family, name):
    objective, size = objective_of(name, family, kl_weight=0.5)
    batch = batch_of(size)
    objective(batch, *objective.of_target(batch)).losses.sum().backward()
    got = {name: parameter.grad for name, parameter in objective.named_parameters()}
    objective.zero_grad()
    losses(objective, batch, kl_weight=0.5).backward()
    for path, parameter in objective.named_parameters():
        torch.testing.assert_close(got[path], parameter.grad, atol=2e-4, rtol=2e-3, msg=path)
        assert got[path].abs().max() > 0 or "layers" in path


def losses(objective, batch, kl_weight):
    """The sum over hidden tokens of the cross-entropy and the divergence from the base, one position earlier."""
    adaptation, hidden = objective.adaptation, batch["hidden"]
    softcap = objective.target.softcap

    def capped(logits):
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    mine = capped(logits(adaptation, batch)[:, :LENGTH])[hidden].log_softmax(-1)
    base = capped(adaptation.base_states(batch) @ objective.target.head.T).roll(1, 1)[hidden].log_softmax(-1)
    own = -mine.gather(-1, batch["input_ids"][hidden][:, None])[:, 0]
    return (own + kl_weight * kl_div(mine, base, log_target=True, reduction="none").sum(-1)).sum()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_divergence_from_the_base(family):
    objective, _ = objective_of("prefix_block", family, kl_weight=0.5)
    batch = batch_of()
    got = objective(batch, *objective.of_target(batch)).losses.sum()
    torch.testing.assert_close(got, losses(objective, batch, 0.5), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", ["causal", "prefix_block", "block_causal"])
def test_loss_of_the_next_token(name):
    objective, size = objective_of(name, ar_weight=0.25)
    batch = batch_of(size)
    full = logits(objective.adaptation, batch)[:, -LENGTH:]
    next_tokens = cross_entropy(full.transpose(1, 2), batch["input_ids"].roll(-1, 1), reduction="none")
    column = torch.arange(LENGTH)
    counts = (column + 1 < batch["ends"]) & ((column < batch["blocks"]) | (name == "block_causal"))
    means = (next_tokens * counts).sum(1) / counts.sum(1)
    objective.ar_weight = 0.0
    want = objective(batch).losses.sum(1) + 0.25 * means * batch["hidden"].sum(1)
    objective.ar_weight = 0.25
    torch.testing.assert_close(objective(batch).losses.sum(1), want)


def test_rows_of_the_next_token_see_right_tokens_alone():
    """What is hidden changes nothing of the loss of the next token, whatever stands in its place."""
    for name in ("causal", "prefix_block", "block_causal"):
        objective, size = objective_of(name, ar_weight=1.0)
        batch = batch_of(size)
        states = objective.adaptation(*objective.adaptation.inputs(batch))
        before = objective._next_tokens(states[:, -LENGTH:], batch)
        with torch.no_grad():
            objective.adaptation.mask_embedding += 1
        states = objective.adaptation(*objective.adaptation.inputs(batch))
        torch.testing.assert_close(objective._next_tokens(states[:, -LENGTH:], batch), before)


def test_what_is_refused():
    with pytest.raises(ValueError, match="the loss of the next token needs a causal context"):
        objective_of("blocks", ar_weight=0.1)
    with pytest.raises(ValueError, match="kl_weight is -1: a number of at least 0 is needed"):
        objective_of("causal", kl_weight=-1)


def test_identity():
    one, other = (DenoisingObjective(adaptation_of("llama", rank=rank)).identity() for rank in (4, 8))
    assert {name for name in one if one[name] != other[name]} == {
        "rank",
    }
