import pytest
import torch

from dflash_ext.train.order import TrainingOrder
from python_tests.train.test_training import Cycles


class Numbered(torch.utils.data.Dataset):
    """Samples of different lengths, whose first token is their number."""

    def __init__(self, rows: int):
        self.rows = rows

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        ids = torch.full((1 + index * 7 % 10,), index)
        return {"input_ids": ids, "loss_mask": torch.ones_like(ids, dtype=torch.bool)}


def numbers(order: TrainingOrder, steps=None) -> list[int]:
    return [int(order[i]["input_ids"][0]) for i in range((steps or order.steps) * order.per_step)]


@pytest.mark.parametrize(("rows", "per_step"), [(64, 2), (40, 8), (7, 4), (3, 8)])
def test_each_pass_takes_every_sample_once(rows, per_step):
    steps = 3 * rows
    taken = torch.tensor(numbers(TrainingOrder(Numbered(rows), steps=steps, per_step=per_step, seed=1)))
    counts = taken.bincount(minlength=rows)
    # A window that the run does not finish has taken some samples of its last pass only.
    assert counts.min() >= len(taken) // rows - 2 and counts.max() <= len(taken) // rows + 2


def test_the_order_follows_from_the_seed_and_the_step_alone():
    first = numbers(TrainingOrder(Numbered(64), steps=40, per_step=4, seed=1))
    assert numbers(TrainingOrder(Numbered(64), steps=40, per_step=4, seed=1)) == first
    assert numbers(TrainingOrder(Numbered(64), steps=900, per_step=4, seed=1), steps=40) == first
    assert numbers(TrainingOrder(Numbered(64), steps=40, per_step=4, seed=2)) != first
    backward = TrainingOrder(Numbered(64), steps=40, per_step=4, seed=1)
    assert [int(backward[i]["input_ids"][0]) for i in reversed(range(160))] == first[::-1]
    assert backward[43]["key"] == (1, 10, 3)


def test_the_samples_of_a_step_have_similar_lengths():
    def spread(order):
        lengths = torch.tensor([len(order[i]["input_ids"]) for i in range(len(order))]).view(-1, order.per_step)
        return (lengths.amax(dim=1) - lengths.amin(dim=1)).float().mean()

    assert spread(TrainingOrder(Numbered(400), steps=50, per_step=4, seed=1)) < 2


def test_a_dataset_without_samples_is_refused():
    with pytest.raises(ValueError, match="there is no sample to train on"):
        TrainingOrder(Cycles(0), steps=1, per_step=1, seed=0)
