"""The definition of the loss of hidden states."""

import pytest
import torch

from dflash_ext import reference

from . import randn


def test_linear_cross_entropy_is_the_loss_of_the_products():
    hidden, head, target = randn(5, 4), randn(7, 4, seed=1), torch.tensor([0, 1, 2, 3, 4])
    weight = torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0])
    got = reference.linear_cross_entropy(hidden, head, target, weight, max_rows=3, label_smoothing=0.1)
    want = reference.masked_cross_entropy(hidden @ head.T, target, weight, label_smoothing=0.1)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="3 rows have a weight, more than max_rows = 2"):
        reference.linear_cross_entropy(hidden, head, target, weight, max_rows=2)
