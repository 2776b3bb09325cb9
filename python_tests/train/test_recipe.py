import re

import pytest
import torch
from transformers import TrainingArguments

from dflash_ext.train import train_drafter
from dflash_ext.train.arguments import trainer_arguments, training_arguments
from dflash_ext.train.recipe import Recipe
from python_tests.tiny import tiny_pair
from python_tests.train.test_training import Cycles


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine that seems to have two GPUs; returns the devices that were made the current one."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_a_process_trains_on_the_targets_device_alone(tmp_path, two_gpus, device):
    """Trainer makes a DataParallel of a model if n_gpu is above 1, and moves models and batches to `device`."""
    assert TrainingArguments(output_dir=str(tmp_path)).n_gpu == 2
    args = training_arguments(tmp_path, Recipe(), torch.device(device))
    assert (args.n_gpu, args.device) == (1, torch.device(device))
    assert args.train_batch_size == Recipe().batch_size
    assert two_gpus[-1] == torch.device(device)


def test_a_target_on_the_cpu_is_trained_for_on_the_cpu(tmp_path, two_gpus):
    args = training_arguments(tmp_path, Recipe(), torch.device("cpu"))
    assert args.n_gpu <= 1 and args.device == torch.device("cpu") and not two_gpus


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 0}, "steps is 0: at least 1"),
        ({"gamma": 0.0}, "gamma is 0.0: a decay above 0"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd': adamw, muon are supported"),
        ({"loss": "mse"}, "loss is 'mse': ce, kl, tv are supported"),
        ({"teacher_mix": 0.0}, "teacher_mix is 0.0: a share above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan: a finite rate"),
    ],
)
def test_a_recipe_that_trains_nothing_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**change)


class Interrupt(Exception):
    pass


@pytest.mark.parametrize(
    "change",
    [{"optimizer": "muon"}, {"loss": "kl", "teacher_mix": 0.5}, {"loss": "tv"}, {"checkpoint_activations": True}],
)
def test_each_choice_trains_and_resumes(tmp_path, change):
    """A resumed run equals the uninterrupted one bitwise, and the loss falls."""
    recipe = Recipe(steps=8, batch_size=4, anchors=8, save_every=3, log_every=1, learning_rate=3e-3, **change)
    target, whole = tiny_pair("llama")
    log = train_drafter(whole, target, Cycles(), tmp_path / "whole", recipe)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0]

    class Cut(Cycles):
        def __getitem__(self, index):
            if (tmp_path / "cut" / "checkpoint-3").exists():
                raise Interrupt
            return super().__getitem__(index)

    target, cut = tiny_pair("llama")
    with pytest.raises(Interrupt):
        train_drafter(cut, target, Cut(), tmp_path / "cut", recipe)
    target, cut = tiny_pair("llama")
    train_drafter(cut, target, Cycles(), tmp_path / "cut", recipe, resume=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(whole.parameters(), cut.parameters(), strict=True))


def test_any_argument_of_trainer_can_be_set(tmp_path):
    words = ["max_grad_norm=0.5", "lr_scheduler_type=linear", "bf16=false", "optim_args=a=1", "logging_first_step=true"]
    given = trainer_arguments([*words, 'lr_scheduler_kwargs={"power": 2}'])
    args = training_arguments(tmp_path, Recipe(trainer_args=given), torch.device("cpu"))
    assert (args.max_grad_norm, args.lr_scheduler_type, args.bf16) == (0.5, "linear", False)
    assert args.optim_args == "a=1" and args.logging_first_step is True and args.lr_scheduler_kwargs == {"power": 2}
    assert args.max_steps == Recipe().steps


@pytest.mark.parametrize("word, value", [("fsdp=true", True), ("fsdp=false", False), ("fsdp=full_shard", "full_shard")])
def test_fsdp_takes_true_and_words(word, value):
    assert trainer_arguments([word]) == {"fsdp": value}


@pytest.mark.parametrize(
    "word, message",
    [
        ("max_grad_norm", "'max_grad_norm': name=value is expected"),
        ("max_gradnorm=1", "Trainer has no argument max_gradnorm; did you mean max_grad_norm?"),
        ("max_steps=7", "the argument max_steps of Trainer is set by --steps"),
        ("max_grad_norm=much", "'max_grad_norm=much': invalid float value: 'much'"),
        ("lr_scheduler_type=square", "'lr_scheduler_type=square': invalid choice"),
        ("bf16=maybe", "'bf16=maybe': "),
    ],
)
def test_a_wrong_argument_of_trainer_is_refused(word, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer_arguments([word])
