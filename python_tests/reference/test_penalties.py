"""The definition of penalties and biases against transformers, and against rules written out token by token."""

import math

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from dflash_ext import reference
from dflash_ext.reference.penalties import counts_before

from . import randn


def test_the_repetition_penalty_is_transformers():
    logits, tokens = 3 * randn(4, 30), torch.randint(0, 30, (4, 12), generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(4, 30, dtype=torch.int32).scatter_(1, tokens, -1)
    want = RepetitionPenaltyLogitsProcessor(1.7)(tokens, logits.clone())
    got = reference.penalised_logits(logits, repetition_penalty=1.7, token_counts=counts)
    torch.testing.assert_close(got, want)
    assert torch.equal(reference.penalised_logits(logits, repetition_penalty=1.7, token_counts=counts.abs()), got)


def test_the_rules_token_by_token():
    logits = 3 * randn(3, 20).double()
    counts = torch.randint(-1, 4, (5, 20), generator=torch.Generator().manual_seed(1)).int()
    bias, rows = randn(5, 20).double(), torch.tensor([4, 0, 4])
    penalties = {
        "repetition_penalty": torch.tensor([1.3, 0.8, math.nan]),
        "presence_penalty": torch.tensor([0.5, -1.0, 0.25]),
        "frequency_penalty": torch.tensor([0.1, math.nan, 2.0]),
    }
    got = reference.penalised_logits(logits, **penalties, token_counts=counts, logit_bias=bias, table_rows=rows)
    for row, table in enumerate(rows.tolist()):
        repetition, presence, frequency = (float(x[row]) for x in penalties.values())
        for token in range(20):
            x, count = float(logits[row, token] + bias[table, token]), int(counts[table, token])
            if count != 0 and repetition > 0:
                x = x / repetition if x > 0 else x * repetition
            if count > 0:
                x -= presence + (0.0 if math.isnan(frequency) else frequency * count)
            assert float(got[row, token]) == pytest.approx(x, rel=1e-6)


def test_a_slot_of_a_draft_counts_the_drafts_before_it():
    counts = torch.tensor([[2, -1, 0, 0], [0, 0, 0, 1]], dtype=torch.int32)
    got = counts_before(counts, torch.tensor([[1, 1, 0], [9, 3, -1]]))
    assert got.tolist() == [
        [[2, -1, 0, 0], [2, 1, 0, 0], [2, 2, 0, 0], [3, 2, 0, 0]],
        [[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 2]],
    ]
