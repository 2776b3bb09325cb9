"""The order in which a run takes the samples of its dataset."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .randomness import generator


class TrainingOrder(Dataset):
    """All samples of a run: item `step * per_step + index` is sample number `index` in the global batch of `step`.

    Which sample of the dataset this is follows from (seed, step, index) alone. Each pass over the dataset has an order
    of its own. The samples of a window of steps are sorted by length, cut into the steps' batches, and the steps are
    shuffled, so that the sequences of a batch need little padding. A window has at most 50 steps and a quarter of the
    dataset, as in transformers' LengthGroupedSampler.

    Args:
        dataset: samples {"input_ids": int64 [S], "loss_mask": bool [S]}.
        steps: the number of optimizer steps.
        per_step: the number of samples in a step, over accumulated batches and ranks.
        seed: decides the order.
        by_length: whether a step takes samples of similar lengths. Where samples share rows, they need not be similar.

    Every item is the dataset's sample with the entry "key" added, from which its random draws follow.

    Raises:
        ValueError: the dataset has no sample.
    """

    def __init__(self, dataset: Dataset, *, steps: int, per_step: int, seed: int, by_length: bool = True):
        if not len(dataset):
            raise ValueError("there is no sample to train on")
        self.dataset, self.steps, self.per_step, self.seed = dataset, steps, per_step, seed
        self._lengths = lengths_of(dataset)
        self.window = min(50, max(1, len(dataset) // (4 * per_step))) if by_length else 1  # steps
        self._window: tuple[int, Tensor] | None = None  # the number of the window used last, and its samples

    def __len__(self) -> int:
        return self.steps * self.per_step

    def __getitem__(self, item: int) -> dict:
        step, index = divmod(item, self.per_step)
        window, step_in_window = divmod(step, self.window)
        if self._window is None or self._window[0] != window:
            self._window = window, self._samples_of(window)
        sample = int(self._window[1][step_in_window, index])
        return {**self.dataset[sample], "key": (self.seed, step, index)}

    def _samples_of(self, window: int) -> Tensor:
        """The samples of a window's steps: int64 [window, per_step], each step's sorted by length."""
        size, count = self.window * self.per_step, len(self._lengths)
        first_pass, begin = divmod(window * size, count)
        passes = range(first_pass, first_pass + -(-(begin + size) // count))
        orders = [torch.randperm(count, generator=generator("order", self.seed, number)) for number in passes]
        samples = torch.cat(orders)[begin : begin + size]
        samples = samples[self._lengths[samples].argsort(stable=True)].view(self.window, self.per_step)
        return samples[torch.randperm(self.window, generator=generator("window", self.seed, window))]


def lengths_of(dataset: Dataset) -> Tensor:
    """The number of tokens of each sample; a dataset that knows them without making its samples has `lengths`."""
    lengths: Sequence[int] | Tensor | None = getattr(dataset, "lengths", None)
    if lengths is None:
        lengths = [len(dataset[i]["input_ids"]) for i in range(len(dataset))]
    return torch.as_tensor(lengths)
