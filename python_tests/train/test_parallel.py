"""Several processes train as one does, also with FSDP2."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from python_tests.train.ranks import in_processes, train, train_in_parts, train_sharded

FIGURES = ("loss", "tau", "grad_norm", "eval_loss", "eval_accuracy", "eval_tau", "eval_acceptance_1")


def assert_equal(one, two, first_step=1):
    logs = [json.loads((folder / "training.json").read_text())["log"] for folder in (one, two)]
    ours, theirs = ([entry for entry in log if entry["step"] >= first_step] for log in logs)
    assert [entry["step"] for entry in ours] == [entry["step"] for entry in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name in mine.keys() & FIGURES:
            assert mine[name] == pytest.approx(other[name], rel=1e-4), name
    name = "adapter_model.safetensors" if (one / "adapter_model.safetensors").exists() else "model.safetensors"
    ours, theirs = (load_file(folder / name) for folder in (one, two))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-2, atol=1e-3)  # they are saved in bfloat16


@pytest.mark.parametrize("kind", ["dflash", "whole"])
def test_two_ranks_equal_one_with_twice_the_accumulation(tmp_path, kind):
    train(tmp_path / "one", ranks=1, kind=kind)
    in_processes(train, tmp_path / "two", 2, "adamw", kind)
    assert_equal(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("optimizer, kind", [("adamw", "dflash"), ("muon", "gated")])
def test_fsdp2_equals_one_rank_also_after_a_resume(tmp_path, optimizer, kind):
    """Muon gathers its matrices, and steps other parameters by AdamW, sharded. With a LoRA drafter, the layers of its
    base are sharded, too."""
    one, two = tmp_path / "one", tmp_path / "two"
    train(one, ranks=1, optimizer=optimizer, kind=kind)
    in_processes(partial(train_sharded, again=True), two, optimizer, kind, {})
    assert_equal(one, two)
    assert_equal(one, two / "again")
    checkpoints = [load_file(folder / "checkpoint-2" / "model.safetensors") for folder in (one, two)]
    assert checkpoints[0].keys() == checkpoints[1].keys()
    for name, ours in checkpoints[0].items():  # whole, and in float32
        torch.testing.assert_close(ours, checkpoints[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind, family, optimizer", [("gated", "gemma3", "muon"), ("whole", "qwen3", "adamw")])
def test_ranks_that_share_the_layers_equal_one_rank(tmp_path, kind, family, optimizer):
    """The divergence reads the base, which the ranks share, too. Of an adapter's halves, one is divided."""
    settings = {"save_every": 0, "kl_weight": 0.5, "optimizer": optimizer}
    settings |= {"steps": 2, "batch_size": 4, "accumulation": 2}
    train(tmp_path / "one", ranks=1, kind=kind, family=family, settings=settings)
    in_processes(train_in_parts, tmp_path / "two", kind, family, settings)
    assert_equal(tmp_path / "one", tmp_path / "two")


def test_fsdp2_computes_under_autocast_as_one_rank_does(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    train(one, 1, trainer_args={"bf16": True})
    in_processes(train_sharded, two, "adamw", "dflash", {"bf16": True})
    logs = [json.loads((folder / "training.json").read_text())["log"] for folder in (one, two)]
    for name in ("loss", "eval_loss"):
        ours, theirs = ([entry[name] for entry in log if name in entry] for log in logs)
        assert ours == pytest.approx(theirs, rel=1e-3)
    weights = load_file(two / "checkpoint-2" / "model.safetensors")
    assert {each.dtype for each in weights.values()} == {torch.float32}
