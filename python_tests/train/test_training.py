import json

import pytest
import torch
from accelerate import PartialState
from torch import nn
from torch._dynamo.utils import counters
from transformers import TrainingArguments

from dflash_ext.decode import decode
from dflash_ext.models import DFlashDrafter, load_drafter
from dflash_ext.train import (
    AnchorCollator,
    ObjectiveTrainer,
    Recipe,
    dpace,
    position_decay,
    save_drafter,
    train_drafter,
)
from dflash_ext.train.objectives import DFlashObjective
from python_tests.tiny import MASK_TOKEN, tiny_pair


class Cycles(torch.utils.data.Dataset):
    """Texts that repeat a cycle of tokens, which a drafter learns quickly."""

    def __init__(self, rows: int = 64, length: int = 40):
        self.rows, self.length = rows, length

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        if index >= self.rows:
            raise IndexError(index)
        ids = 10 + (torch.arange(self.length - index % 5) + index) % 7
        mask = torch.ones(len(ids), dtype=torch.bool)
        mask[:5] = False
        return {"input_ids": ids, "loss_mask": mask}


def a_trainer(target, drafter, tmp_path, gamma):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", remove_unused_columns=False)
    return ObjectiveTrainer(DFlashObjective(drafter, target, gamma), args=args)


def reduced_vocabulary(drafter: DFlashDrafter, drafted: torch.Tensor) -> DFlashDrafter:
    """The drafter with a head of its own that has rows for the tokens `drafted` alone."""
    drafter.config.own_head, drafter.config.draft_vocab_size = True, len(drafted)
    reduced = DFlashDrafter(drafter.config)
    reduced.load_state_dict(drafter.state_dict(), strict=False)
    reduced.lm_head.weight.normal_(std=0.2)
    reduced.d2t.copy_(drafted - torch.arange(len(drafted)))
    reduced.t2d[drafted] = True
    return reduced


@pytest.mark.parametrize("gamma", [3.0, None])
@pytest.mark.parametrize(
    ("family", "first_slot", "drafted"),
    [("llama", 1, None), ("gemma3", 1, None), ("llama", 0, None), ("llama", 1, [2, 10, 11, 12, 13, 15, 16, 40])],
)
def test_the_loss_is_its_definition(family, first_slot, drafted, gamma, tmp_path):
    """The trainer's loss against one written block by block with PyTorch's own cross-entropy.

    `drafted`: the only tokens that the drafter can draft; a block ends at a label that is none of them.
    """
    torch.manual_seed(0)
    target, drafter = tiny_pair(family)
    drafter.config.sample_from_anchor = first_slot == 0
    if drafted is not None:
        drafter = reduced_vocabulary(drafter, torch.tensor(drafted))
    batch = AnchorCollator(4, 6, MASK_TOKEN, first_slot)([Cycles()[i] for i in (1, 3)])
    trainer = a_trainer(target, drafter, tmp_path, gamma)
    loss = trainer.compute_loss(trainer.model, batch)

    total = divisor = 0.0
    for row in range(2):
        ids = batch["input_ids"][row]
        features = target.features(ids[None])
        for block in range(4):
            if not batch["keep"][row, block]:
                continue
            anchor = int(batch["anchors"][row, block])
            noise = torch.tensor([[int(ids[anchor])] + [MASK_TOKEN] * 5])
            hidden = drafter(
                noise_embeds=drafter.embed(target, noise),
                context_hidden_states=features[:, :anchor],
                position_ids=torch.arange(anchor + 6)[None],
            ).last_hidden_state
            logits = drafter.logits(target, hidden)[0, first_slot:]
            counts = batch["counts"][row, block, first_slot:].clone()
            labels = batch["labels"][row, block, first_slot:]
            assert torch.equal(labels[counts], ids[anchor + 1 : anchor + 1 + int(counts.sum())])
            for slot, label in enumerate(labels.tolist()):
                if drafted is not None and label not in drafted:
                    counts[slot:] = False
            nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none").masked_fill(~counts, 0)
            weights = (
                dpace(nll, counts) if gamma is None else position_decay(6, gamma, first_slot)[first_slot:] * counts
            )
            total += (weights * nll).sum()
            divisor += 1 if gamma is None else weights.sum()
    torch.testing.assert_close(loss, total / divisor, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        trainer.get_batch_samples(iter([batch]), 1, loss.device)[1].float(), torch.tensor(float(divisor))
    )


@pytest.mark.parametrize("gamma", [3.0, None])
def test_accumulation_changes_nothing(gamma, tmp_path):
    """One step over a batch of 8 and one over 4 times 2 have the same gradient."""
    gradients = []
    for size, accumulation in ((8, 1), (2, 4)):
        target, drafter = tiny_pair("llama")
        trainer = a_trainer(target, drafter, tmp_path, gamma)
        trainer.args.gradient_accumulation_steps = accumulation
        trainer.current_gradient_accumulation_steps = accumulation
        # Every valid anchor is drawn, so that both ways see the same blocks.
        collate = AnchorCollator(40, 6, MASK_TOKEN)
        batches = [collate([Cycles()[i] for i in range(begin, begin + size)]) for begin in range(0, 8, size)]
        batches, divisor = trainer.get_batch_samples(iter(batches), accumulation, torch.device("cpu"))
        for batch in batches:
            trainer.training_step(trainer.model, batch, divisor)
        gradients.append(torch.cat([p.grad.flatten() for p in drafter.parameters()]))
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)


def test_training_raises_tau_and_leaves_the_target_alone(tmp_path):
    target, drafter = tiny_pair("llama", block_size=4)
    frozen = {name: tensor.clone() for name, tensor in target.model.state_dict().items()}
    prompt = [10 + i % 7 for i in range(12)]
    answer = decode(target, None, [prompt], max_new_tokens=30).completions[0].tokens

    class Answers(Cycles):
        def __getitem__(self, index):
            if index >= self.rows:
                raise IndexError(index)
            ids = torch.tensor(prompt + answer)
            return {"input_ids": ids, "loss_mask": torch.arange(len(ids)) >= len(prompt)}

    recipe = Recipe(steps=60, batch_size=4, anchors=16, learning_rate=3e-3, gamma=4.0)
    log = train_drafter(drafter, target, Answers(32), tmp_path, recipe)
    decoded = decode(target, drafter.eval(), [prompt], max_new_tokens=30)
    assert decoded.completions[0].tokens == answer
    assert decoded.tau > 2.5
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in target.model.state_dict().items())
    saved = json.loads((tmp_path / "training.json").read_text())
    assert saved["recipe"]["steps"] == 60 and saved["log"][-1]["step"] == 60
    again = load_drafter(tmp_path, dtype=torch.float32, device=torch.device("cpu"))
    assert decode(target, again, [prompt], max_new_tokens=30).tau > 2.5


def test_an_interrupted_run_resumes(tmp_path):
    target, drafter = tiny_pair("llama")
    # Every valid anchor is drawn, so that runs differ in nothing but the interruption.
    recipe = Recipe(steps=6, batch_size=4, anchors=40, save_every=2, log_every=1)
    whole = train_drafter(drafter, target, Cycles(), tmp_path / "whole", recipe)

    class Interrupt(Exception):
        pass

    target, drafter = tiny_pair("llama")
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 5:
            raise Interrupt

    handle = drafter.register_forward_hook(interrupt)
    with pytest.raises(Interrupt):
        train_drafter(drafter, target, Cycles(), tmp_path / "cut", recipe)
    handle.remove()
    assert load_drafter(tmp_path / "cut") is not None  # what was trained is kept
    _, drafter = tiny_pair("llama")
    log = train_drafter(drafter, target, Cycles(), tmp_path / "cut", recipe, resume=True)
    steps = [entry["step"] for entry in log if "loss" in entry]
    assert steps == list(range(1, 7))
    expected = [entry["loss"] for entry in whole if "loss" in entry]
    assert [entry["loss"] for entry in log if "loss" in entry] == pytest.approx(expected, rel=1e-3)


def test_a_compiled_training_is_two_graphs(tmp_path, monkeypatch):
    """The second one is for sequences of any length."""

    # It is traced alone: objectives/test_dflash.py compares what is compiled.
    monkeypatch.setattr(DFlashDrafter, "compile", lambda self, **_: nn.Module.compile(self, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    target, drafter = tiny_pair("llama", num_layers=1)
    train_drafter(drafter, target, Cycles(), tmp_path, Recipe(steps=6, batch_size=4, anchors=40, compile=True))
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.gpu
@pytest.mark.slow
def test_compiled_training_has_the_same_losses(tmp_path):
    """Sequences of several lengths, under bfloat16 autocast."""
    torch._dynamo.reset()
    counters.clear()
    losses = []
    for is_compiled in (False, True):
        target, drafter = tiny_pair("llama")
        for module in (target.model, drafter):
            module.to("cuda")
        recipe = Recipe(steps=6, batch_size=4, anchors=40, log_every=1, compile=is_compiled)
        log = train_drafter(drafter, target, Cycles(), tmp_path / str(is_compiled), recipe)
        losses.append([entry["loss"] for entry in log if "loss" in entry])
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


@pytest.mark.parametrize("change", [{"num_layers": 1}, {"intermediate_size": 32}, {"block_size": 4}, {"taps": 2}])
def test_a_checkpoint_of_another_drafter_is_refused(tmp_path, change):
    recipe = Recipe(steps=1, batch_size=4, save_every=1)
    target, drafter = tiny_pair("llama")
    train_drafter(drafter, target, Cycles(8), tmp_path, recipe)
    saved = (tmp_path / "model.safetensors").read_bytes()
    target, other = tiny_pair("llama", **change)
    with pytest.raises(ValueError, match="checkpoint-1 is of another drafter: its "):
        train_drafter(other, target, Cycles(8), tmp_path, recipe, resume=True)
    assert (tmp_path / "model.safetensors").read_bytes() == saved


def test_saving_in_bfloat16_leaves_the_drafter_in_float32(tmp_path):
    _, drafter = tiny_pair("llama")
    save_drafter(drafter, tmp_path, dtype=torch.bfloat16)
    assert drafter.dtype == torch.float32
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_one_process_of_torchrun_saves_for_all(tmp_path, monkeypatch):
    monkeypatch.setattr(ObjectiveTrainer, "is_world_process_zero", lambda self: False)
    monkeypatch.setattr(PartialState, "is_main_process", property(lambda self: False))
    target, drafter = tiny_pair("llama")
    assert train_drafter(drafter, target, Cycles(8), tmp_path, Recipe(steps=1, batch_size=4))
    assert not list(tmp_path.iterdir())


def test_the_last_steps_are_logged(tmp_path):
    target, drafter = tiny_pair("llama")
    log = train_drafter(drafter, target, Cycles(), tmp_path, Recipe(steps=5, batch_size=2, anchors=2, log_every=3))
    assert [entry["step"] for entry in log if "loss" in entry] == [3, 5]
