"""What is measured during training, and which drafter is kept."""

import itertools
import json
import math

import pytest
import torch
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from dflash_ext.decode import decode
from dflash_ext.models import load_drafter
from dflash_ext.train import (
    AnchorCollator,
    DraftingEvaluation,
    Evaluation,
    HeldOutPrompts,
    Recipe,
    evaluation,
    train_drafter,
)
from dflash_ext.train.drafters import parts_of
from dflash_ext.train.objectives import DFlashObjective, LoraObjective
from dflash_ext.train.reporting import best_evaluation
from python_tests.models.lora.test_drafter import tiny_lora
from python_tests.tiny import MASK_TOKEN, random_prompts, tiny_pair
from python_tests.train.test_training import Cycles

HELD_OUT = Cycles(4)
PROMPTS = HeldOutPrompts(random_prompts(5, 7, 9, 4, 6), max_new_tokens=12, stop_token_ids=(2,), batch_size=2)


@pytest.mark.parametrize("gamma", [None, 3.0])
def test_held_out_loss_is_that_of_all_labels_together(gamma):
    """Whatever the batch size, and whatever else was drawn."""
    target, drafter = tiny_pair("llama")
    objective = DFlashObjective(drafter, target, gamma)
    collate = AnchorCollator(4, 6, MASK_TOKEN)
    losses = [Evaluation(Cycles(7), collate, size, seed=3).measure(objective)["loss"] for size in (1, 2, 7, 7)]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    assert losses[2] == losses[3]
    batch = collate([Cycles(7)[i] | {"key": (3, "held out", i)} for i in range(7)])
    with torch.no_grad():
        result = objective(batch, target.features(batch["input_ids"]))
    assert losses[0] == pytest.approx(float(result.losses.sum() / objective.divisor(batch)), rel=1e-5)


def test_decoding_is_that_of_the_engine():
    target, drafter = tiny_pair("llama")
    drafter.train()
    figures = DraftingEvaluation(Cycles(2), AnchorCollator(4, 6, MASK_TOKEN), 2, prompts=PROMPTS).measure(
        DFlashObjective(drafter, target)
    )
    assert drafter.training
    decoded = decode(target, drafter.eval(), PROMPTS.prompts, max_new_tokens=12, stop_token_ids=(2,))
    assert figures["tau"] == pytest.approx(decoded.tau, abs=1e-4)
    acceptance = [figures[f"acceptance_{i}"] for i in range(1, 6)]
    assert acceptance == pytest.approx(decoded.acceptance, abs=1e-4)
    assert figures["tokens_per_second"] > 0


def test_a_cycle_of_one_forward_is_measured_with_all_of_its_groups(monkeypatch):
    target, drafter = tiny_lora("llama", kind="gated", block_size=4)
    asked = []
    monkeypatch.setattr(
        evaluation, "decode", lambda *given, **options: asked.append(options) or decode(*given, **options)
    )
    prompts = HeldOutPrompts(random_prompts(5, 7), max_new_tokens=8, batch_size=64, forwards=1)
    figures = DraftingEvaluation(HELD_OUT, AnchorCollator(4, 4, MASK_TOKEN), 4, prompts=prompts).measure(
        LoraObjective(drafter, target, forwards=1)
    )
    assert figures["tau"] >= 1 and asked[0]["groups"] == 3


def scripted(monkeypatch, *taus):
    """Lets the evaluations of a run measure these taus."""
    left = iter(taus)
    monkeypatch.setattr(
        Evaluation,
        "measure",
        lambda self, _: {"loss": 1.0, "tau": next(left), "tokens_per_second": 9.0, "accuracy": 0.5},
    )


def train(folder, steps=6, held_out=HELD_OUT, drafters=None, **options):
    target, drafter = tiny_pair("llama")
    recipe = Recipe(steps=steps, batch_size=4, anchors=4, log_every=1, evaluate_every=2, learning_rate=1e-2, **options)
    if drafters is not None:
        step = itertools.count(1)
        drafter.norm.register_forward_hook(
            lambda module, *_: drafters.update({next(step) - 1: drafter.fc.weight.detach().bfloat16()})
        )
    return drafter, train_drafter(drafter, target, Cycles(), folder, recipe, held_out=held_out, prompts=PROMPTS)


def test_the_drafter_of_the_best_tau_is_kept(tmp_path, monkeypatch):
    scripted(monkeypatch, 1.5, 2.5, 2.0)
    weights = {}  # of the drafter after each step
    _, log = train(tmp_path, drafters=weights, save_every=1)
    assert [(entry["step"], entry["eval_tau"]) for entry in log if "eval_tau" in entry] == [
        (2, 1.5),
        (4, 2.5),
        (6, 2.0),
    ]
    saved = load_drafter(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(saved.fc.weight, weights[4]) and not torch.equal(saved.fc.weight, weights[5])
    # The checkpoint of the best tau is kept beside the newest one.
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert json.loads((tmp_path / "training.json").read_text())["log"] == log
    assert not (tmp_path / ".saved.part").exists()


def test_each_part_of_an_evaluation_tells_its_own_progress():
    target, drafter = tiny_pair("llama")
    parts = parts_of(drafter, target, Recipe(anchors=4, noise_ratio=0.5))
    prompts = HeldOutPrompts([[5, 6], [7]], max_new_tokens=4, denoising_steps=(1, 2))
    told = {}
    drafting = DraftingEvaluation(HELD_OUT, parts.held_out_collator, 4, prompts=prompts)
    drafting.on_progress = lambda what, done, total: told.setdefault(what, []).append((done, total))
    drafting.measure(parts.objective)
    assert len(told) == 3
    for counts in told.values():
        assert counts == [(i, len(counts)) for i in range(1, len(counts) + 1)]


def test_the_best_of_several():
    def entries(**figures):
        return [
            {"step": step, **dict(zip(figures, values, strict=True))}
            for step, values in enumerate(zip(*figures.values(), strict=True))
        ]

    least_loss, highest_tau = ("loss", False), ("tau", True)
    assert best_evaluation([{"step": 1, "loss": 3.0}], least_loss) is None
    assert best_evaluation(entries(eval_loss=[3.0, 2.0, 2.0, 4.0]), least_loss)["step"] == 1
    assert best_evaluation(entries(eval_loss=[math.nan, 2.0, math.nan]), least_loss)["step"] == 1
    assert best_evaluation(entries(eval_loss=[math.nan, math.nan]), least_loss) is None
    assert best_evaluation(entries(eval_loss=[1.0, 2.0, 3.0], eval_tau=[1.0, 2.0, 2.0]), highest_tau)["step"] == 1


def test_without_held_out_answers_the_last_drafter_is_saved(tmp_path):
    drafter, log = train(tmp_path, held_out=None)
    assert not any("eval_loss" in entry for entry in log)
    saved = load_drafter(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(saved.fc.weight, drafter.fc.weight.detach().bfloat16())


def test_a_loss_that_is_no_number_is_not_passed_over(tmp_path, monkeypatch):
    """It is not left out of the mean of the steps that are logged together."""
    losses = iter([1.0, math.nan, 1.0, 1.0])
    whole = DFlashObjective.forward

    def broken(self, *inputs):
        result = whole(self, *inputs)
        return result._replace(losses=result.losses * next(losses)) if self.training else result

    monkeypatch.setattr(DFlashObjective, "forward", broken)
    target, drafter = tiny_pair("llama")
    with pytest.raises(ValueError, match="the training has diverged: the loss of step 2 is nan"):
        train_drafter(drafter, target, Cycles(), tmp_path, Recipe(steps=4, batch_size=4, anchors=4, log_every=2))


def test_figures_reach_what_trainer_reports_to(tmp_path, monkeypatch):
    """TensorBoard takes numbers alone."""
    seen = {}

    class Board(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.update({name: (state.global_step, value) for name, value in logs.items()})

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Board)
    train(tmp_path, steps=2, report_to=("tensorboard",))
    for name in (
        "loss",
        "tau",
        "eval_loss",
        "eval_tau",
        "eval_acceptance_1",
        "eval_acceptance_5",
        "eval_tokens_per_second",
    ):
        assert seen[name][0] == 2 and isinstance(seen[name][1], int | float), name
