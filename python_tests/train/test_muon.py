import copy

import pytest
import torch

from dflash_ext.train import muon
from dflash_ext.train.muon import MuonWithAdamW, orthogonalised


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_singular_values_are_about_one(device, shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    values = torch.linalg.svdvals(orthogonalised(matrix).float())
    assert values.min() > 0.4 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    overlap = (orthogonalised(matrix) * (u @ v)).sum() / values.sum()
    assert overlap > 0.95


def test_other_parameters_are_stepped_by_adamw():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 8)) for _ in range(2))
    mine = MuonWithAdamW([ours], lr=0.1, weight_decay=0.01)
    torchs = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.01)
    for _ in range(5):
        grad = torch.randn(8)
        ours.grad, theirs.grad = grad, grad.clone()
        mine.step()
        torchs.step()
    torch.testing.assert_close(ours, theirs)


def test_a_matrix_is_stepped_as_by_torchs_muon():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(6, 9)) for _ in range(2))
    mine = MuonWithAdamW([ours], lr=0.1, weight_decay=0.01)
    torchs = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        grad = torch.randn(6, 9)
        ours.grad, theirs.grad = grad, grad.clone()
        mine.step()
        torchs.step()
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02)  # torch's works in bfloat16


def test_matrices_of_one_shape_are_stepped_as_each_alone(monkeypatch):
    monkeypatch.setattr(muon, "AT_A_TIME", 100)  # 2 of the 6 x 8 matrices at a time
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in [(6, 8)] * 3 + [(8, 6)] * 2]
    together, alone = ([torch.nn.Parameter(each.clone()) for each in start] for _ in range(2))
    optimizers = [MuonWithAdamW(together, lr=0.1), *(MuonWithAdamW([each], lr=0.1) for each in alone)]
    for _ in range(3):
        for ours, theirs in zip(together, alone, strict=True):
            ours.grad = torch.randn(ours.shape, generator=generator)
            theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(together, alone)


def test_its_state_is_saved_and_loaded():
    def step(optimizer, parameters, seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    parameters = [torch.nn.Parameter(torch.ones(4, 6)), torch.nn.Parameter(torch.ones(5))]
    optimizer = MuonWithAdamW(parameters, lr=0.1)
    step(optimizer, parameters, 0)
    copies = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    resumed = MuonWithAdamW(copies, lr=0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(optimizer, parameters, 1)
    step(resumed, copies, 1)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(parameters, copies, strict=True))
