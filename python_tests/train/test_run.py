"""A run of an objective that is no drafter's: an adapter on a frozen model learns the next token."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from dflash_ext.ops import masked_cross_entropy
from dflash_ext.train import Evaluation, RunRecipe, run
from dflash_ext.train.objectives import Losses, Objective
from dflash_ext.train.randomness import generator
from python_tests.tiny import tiny_pair
from python_tests.train.test_training import Cycles


class Adapted(nn.Module):
    """A frozen head with tied weights, and an adapter that is trained."""

    def __init__(self, embedding: torch.Tensor):
        super().__init__()
        self.embedding = nn.Parameter(embedding.clone(), requires_grad=False)
        self.head = self.embedding
        self.adapter = nn.Linear(embedding.shape[1], embedding.shape[1], bias=False)
        nn.init.zeros_(self.adapter.weight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding[ids]
        return (hidden + self.adapter(hidden)) @ self.head.T


class NextToken(Objective):
    noun = "adapter"

    def __init__(self, target, rank=64):
        super().__init__(target)
        self.adapted, self.rank = Adapted(target.model.get_input_embeddings().weight.detach()), rank

    @property
    def trained(self):
        return self.adapted

    def of_target(self, batch):
        return (self.target.model(batch["input_ids"]).logits,)  # the trainer calls it without gradients

    def forward(self, batch, teacher):
        assert not teacher.requires_grad
        logits, labels = self.adapted(batch["input_ids"][:, :-1]), batch["input_ids"][:, 1:]
        counts = batch["counts"]
        losses = masked_cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").loss.view_as(labels)
        return Losses(losses * counts, counts, logits.argmax(-1) == labels)

    def identity(self):
        return {"rank": self.rank}


def collate(samples):
    """The tokens that count are drawn."""
    counts = [torch.rand(len(s["input_ids"]) - 1, generator=generator("counted", *s["key"])) < 0.7 for s in samples]
    ids = pad_sequence([sample["input_ids"] for sample in samples], batch_first=True)
    return {"input_ids": ids, "counts": pad_sequence(counts, batch_first=True)}


def train(folder, steps=6, samples=None, objective=None, **options):
    torch.manual_seed(0)
    target, _ = tiny_pair("llama")
    objective = objective or NextToken(target)
    recipe = RunRecipe(steps=steps, batch_size=4, learning_rate=0.5, log_every=1, save_every=3, evaluate_every=3)

    def save(folder):
        folder.mkdir()
        (folder / "adapter.json").write_text(json.dumps(objective.adapted.adapter.weight.tolist()))

    evaluation = Evaluation(Cycles(5), collate, 2)
    options = dict(collator=collate, save=save, evaluation=evaluation) | options
    return objective, run(objective, samples or Cycles(), folder, recipe, **options)


def test_an_objective_of_another_kind(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(sys.modules["dflash_ext.train.run"], "plot_curve", lambda *curve: drawn.append(curve))
    objective, log = train(tmp_path)
    trained = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in trained] == list(range(1, 7))
    assert trained[-1]["loss"] < 0.9 * trained[0]["loss"] and trained[-1]["accuracy"] > trained[0]["accuracy"]
    evaluations = [entry for entry in log if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [3, 6]
    assert evaluations[1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert json.loads((tmp_path / "adapter.json").read_text()) == objective.adapted.adapter.weight.tolist()
    assert drawn == [(log, tmp_path / "curve.png", "accuracy")]
    # A checkpoint holds what is trained alone, in safetensors.
    checkpoint = tmp_path / "checkpoint-6"
    assert load_file(checkpoint / "model.safetensors").keys() == {"adapted.adapter.weight"}
    assert not (checkpoint / "training_args.bin").exists()


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_training_that_has_diverged_ends_and_leaves_an_earlier_result_alone(tmp_path):
    train(tmp_path)
    before = (tmp_path / "adapter.json").read_bytes()
    target, _ = tiny_pair("llama")
    objective = NextToken(target)
    torch.nn.init.constant_(objective.adapted.adapter.weight, torch.nan)
    with pytest.raises(ValueError, match="the training has diverged: the loss of step 1 is nan"):
        train(tmp_path, objective=objective, overwrite=True)
    assert (tmp_path / "adapter.json").read_bytes() == before


def test_an_earlier_training_is_replaced_only_if_that_is_asked_for(tmp_path):
    train(tmp_path)
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match="already has checkpoint-3, checkpoint-6, training.json: --resume"):
        train(tmp_path, steps=3)
    assert files_in(tmp_path) == before
    _, log = train(tmp_path, steps=3, overwrite=True)
    assert log[-1]["step"] == 3
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]  # that of the new training


def test_a_training_without_a_checkpoint_is_no_reason_to_begin_anew(tmp_path):
    train(tmp_path, steps=2)
    shutil.rmtree(tmp_path / "checkpoint-2")
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint is there to resume from, --overwrite replaces what is there"):
        train(tmp_path, resume=True)
    assert files_in(tmp_path) == before
    _, log = train(tmp_path, resume=True, overwrite=True)
    assert log[-1]["step"] == 6


def test_weights_of_another_kind_are_not_replaced(tmp_path):
    """Such as those of the target, if its folder is given for the output."""
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"weights")
    with pytest.raises(ValueError, match="already has model-00001-of-00002.safetensors: no checkpoint"):
        train(tmp_path)


def test_it_resumes_with_the_same_bits(tmp_path):
    whole, expected = train(tmp_path / "whole")

    class Cut(Cycles):
        taken = 0

        def __getitem__(self, index):
            self.taken += 1
            if self.taken > 64 + 20:  # the lengths are read first
                raise OSError("the disk is gone")
            return super().__getitem__(index)

    with pytest.raises(OSError, match="the disk is gone"):
        train(tmp_path / "cut", samples=Cut())
    resumed, log = train(tmp_path / "cut", resume=True)
    assert torch.equal(resumed.adapted.adapter.weight, whole.adapted.adapter.weight)
    assert [entry["loss"] for entry in log if "loss" in entry] == [
        entry["loss"] for entry in expected if "loss" in entry
    ]


def test_a_checkpoint_of_another_objective_is_refused(tmp_path):
    train(tmp_path, steps=3)
    target, _ = tiny_pair("llama")
    with pytest.raises(ValueError, match="checkpoint-3 is of another adapter: its rank is 64, this one's is 8"):
        train(tmp_path, objective=NextToken(target, rank=8), resume=True)
