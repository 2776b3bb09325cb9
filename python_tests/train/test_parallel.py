"""Several processes of torchrun train as one does."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dflash_ext.models import load_drafter
from dflash_ext.train.objectives import DFlashObjective
from python_tests.tiny import tiny_pair
from python_tests.train.ranks import step_and_measure, torchrun, train


def test_two_ranks_equal_one_with_twice_the_accumulation(tmp_path):
    train(tmp_path / "one", ranks=1)
    torchrun("-m", "python_tests.train.ranks", tmp_path / "two")
    one, two = (json.loads((tmp_path / name / "training.json").read_text())["log"] for name in ("one", "two"))
    assert [entry["step"] for entry in one] == [entry["step"] for entry in two]
    for ours, theirs in zip(one, two, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() & {
            "loss",
            "tau",
            "grad_norm",
            "eval_loss",
            "eval_accuracy",
            "eval_tau",
            "eval_acceptance_1",
        }:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-2, atol=1e-3)  # they are saved in bfloat16


def test_a_drafter_that_fsdp2_shards(tmp_path):
    """Its gradients, the figures of its evaluation and what is saved of it are those of a whole one."""
    target, drafter = tiny_pair("llama")
    figures, gradient = step_and_measure(DFlashObjective(drafter.train(), target), 0, 1)
    torchrun("-m", "python_tests.train.ranks", "sharded", tmp_path)
    torch.testing.assert_close(load_file(tmp_path / "gradient.safetensors")["gradient"], gradient, rtol=1e-3, atol=1e-5)
    theirs = json.loads((tmp_path / "figures.json").read_text())
    figures.pop("tokens_per_second")
    assert {name: theirs[name] for name in figures} == pytest.approx(figures, rel=1e-4)
    saved = load_drafter(tmp_path, dtype=torch.float32)
    for ours, theirs in zip(drafter.parameters(), saved.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)
