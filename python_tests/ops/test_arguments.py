"""Arguments of the wrong type: every operator refuses them by an error that names itself and the argument."""

import pytest
import torch

from dflash_ext import (
    count_tokens_,
    kv_inject,
    linear,
    linear_cross_entropy,
    masked_cross_entropy,
    reveal,
    sample,
    sample_and_embed,
    sharded_linear_cross_entropy,
    soft_embedding,
    verify,
)

ROWS, LENGTH, VOCAB, WIDTH = 2, 3, 5, 4


def real(*shape):
    return torch.ones(shape)


def index(*shape):
    return torch.zeros(shape, dtype=torch.int64)


LOSS = {"target": index(ROWS), "weight": real(ROWS), "normaliser": real(), "ignore_index": -1, "z_loss": 0.0}
# Of each operator, arguments that are right.
CALLS = {
    sample: {
        "logits": real(ROWS, VOCAB),
        "seed": index(ROWS),
        "temperature": real(ROWS),
        "top_k": index(ROWS),
        "top_p": real(),
        "token_counts": index(ROWS, VOCAB).int(),
        "repetition_penalty": real(ROWS),
        "logit_bias": real(VOCAB),
        "table_rows": index(ROWS),
    },
    verify: {
        "draft_tokens": index(ROWS, LENGTH),
        "target_logits": real(ROWS, LENGTH + 1, VOCAB),
        "draft_logits": real(ROWS, LENGTH, VOCAB),
        "draft_pivot": real(ROWS, LENGTH),
        "draft_normaliser": real(ROWS, LENGTH),
        "uniforms": real(ROWS, LENGTH + 1) / 2,
        "temperature": 1.0,
        "min_p": real(ROWS) / 2,
        "draft_lens": index(ROWS),
    },
    reveal: {
        "scores": real(ROWS, LENGTH),
        "masked": index(ROWS, LENGTH) == 0,
        "entropy": real(ROWS, LENGTH),
        "entropy_bound": real(ROWS),
    },
    count_tokens_: {
        "token_counts": index(ROWS, VOCAB).int(),
        "tokens": index(ROWS, LENGTH),
        "lens": index(ROWS),
        "table_rows": torch.arange(ROWS),
    },
    soft_embedding: {"logits": real(ROWS, VOCAB), "embedding": real(VOCAB, WIDTH), "temperature": real(ROWS)},
    sample_and_embed: {
        "logits": real(ROWS, VOCAB),
        "embedding": real(VOCAB, WIDTH),
        "seed": index(ROWS),
        "temperature": real(ROWS),
    },
    linear: {
        "x": real(ROWS, WIDTH),
        "weight": real(VOCAB, WIDTH),
        "bias": real(VOCAB),
        "norm": real(WIDTH),
        "norm_eps": 1e-6,
        "residual": real(ROWS, VOCAB),
    },
    kv_inject: {
        "features": real(ROWS, LENGTH, WIDTH),
        "weight": real(2 * 8, WIDTH),
        "k_caches": real(1, ROWS, 1, LENGTH, 8),
        "v_caches": real(1, ROWS, 1, LENGTH, 8),
        "positions": torch.arange(LENGTH).expand(ROWS, -1),
        "cos": real(LENGTH, 4),
        "sin": real(LENGTH, 4),
        "bias": real(2 * 8),
        "k_norm": real(1, 8),
        "norm_eps": 1e-6,
        "slots": torch.arange(LENGTH).expand(ROWS, -1),
    },
    masked_cross_entropy: {"logits": real(ROWS, VOCAB), "teacher": real(ROWS, VOCAB), **LOSS},
    linear_cross_entropy: {
        "hidden": real(ROWS, WIDTH),
        "head": real(VOCAB, WIDTH),
        "teacher_hidden": real(ROWS, WIDTH),
        "teacher_head": real(VOCAB, WIDTH),
        "teacher_row": index(ROWS),
        **LOSS,
    },
    sharded_linear_cross_entropy: {"hidden": real(ROWS, WIDTH), "head": real(VOCAB, WIDTH), **LOSS},
}


@pytest.mark.parametrize("op", CALLS, ids=lambda op: op.__name__)
def test_arguments_of_other_types_are_named(op):
    right = CALLS[op]
    if op is not sharded_linear_cross_entropy:  # which needs processes
        op(**right)
    for name in right:
        for value in ("x", 1j, [[1.0]], {1.0: 2.0}):
            with pytest.raises(TypeError, match=rf"^{op.__name__}: {name}(\[0\])? is .* needed$"):
                op(**right | {name: value})


@pytest.mark.parametrize("op", CALLS, ids=lambda op: op.__name__)
def test_complex_numbers_are_no_reals(op):
    right = CALLS[op]
    for name, value in right.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            with pytest.raises((TypeError, ValueError, RuntimeError), match=f"^{op.__name__}: "):
                op(**right | {name: value.to(torch.complex64)})


def test_seeds_have_64_bits():
    for seed in (2**63, -(2**63) - 1):
        with pytest.raises(ValueError, match="^sample: seed is .*; an int of 64 bits is needed$"):
            sample(real(ROWS, VOCAB), seed)
    sample(real(ROWS, VOCAB), 2**63 - 1)
