"""What operators refuse alike: arguments on several devices, and tensors that are not dense."""

import pytest
import torch

from dflash_ext import (
    IntervalMask,
    block_attn,
    block_attn_decode,
    kv_inject,
    linear_cross_entropy,
    masked_cross_entropy,
    reveal,
    sample,
    verify,
)
from dflash_ext.ops import count_tokens_, linear, sample_and_embed, soft_embedding

FILTERS = ("temperature", "top_k", "top_p", "min_p")
DRAFT, TARGET = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 4, 5)


def seed(*values, device="cpu"):
    return torch.tensor(values, device=device)


def each_on_meta(arguments):
    """The arguments with one tensor after another on the meta device, and its name."""
    for name, value in list(arguments.items())[1:]:
        if isinstance(value, torch.Tensor):
            yield name, arguments | {name: value.to("meta")}


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (sample, {"logits": TARGET[0], "seed": seed(1)} | {name: torch.ones(4) for name in FILTERS}),
        (
            verify,
            {"draft_tokens": DRAFT, "target_logits": TARGET, "draft_logits": TARGET[:, 1:]}
            | {"draft_pivot": torch.zeros(2, 3), "draft_normaliser": torch.zeros(2, 3)}
            | {"uniforms": torch.zeros(2, 4), "draft_lens": seed(1, 2)}
            | {name: torch.ones(2) for name in FILTERS},
        ),
        (reveal, {"masked": TARGET[0] == 0, "scores": TARGET[0], "entropy": TARGET[0], "count": seed(1, 2, 3, 4)}),
    ],
    ids=["sample", "verify", "reveal"],
)
def test_arguments_on_several_devices_are_refused_and_all_on_meta_are_not(op, arguments):
    first = next(iter(arguments))
    for name, given in each_on_meta(arguments):
        with pytest.raises(ValueError, match=f"{op.__name__}: {first} is on cpu, {name} on meta; one device is needed"):
            op(**given)
    want = op(**arguments)
    got = op(**{name: value.to("meta") for name, value in arguments.items()})
    for a, b in zip(*((x,) if op is reveal else x for x in (got, want)), strict=True):
        assert a.is_meta and a.shape == b.shape and a.dtype == b.dtype


ROWS, HEADS, MASK = torch.zeros(4, 8), torch.zeros(1, 2, 4, 8), IntervalMask.causal(4)
CACHE = [torch.zeros(1, 2, 4, 8)]


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (block_attn, {"q": HEADS, "k": HEADS, "v": HEADS, "mask": MASK}),
        (block_attn_decode, {"q": HEADS, "k_cache": HEADS, "v_cache": HEADS, "mask": MASK}),
        (masked_cross_entropy, {"logits": ROWS, "target": seed(1, 2, 3, 4), "weight": torch.ones(4)}),
        (linear_cross_entropy, {"hidden": ROWS, "head": ROWS, "target": seed(1, 2, 3, 0), "weight": torch.ones(4)}),
        (linear, {"x": ROWS, "weight": ROWS, "residual": ROWS[:, :4]}),
        (soft_embedding, {"logits": ROWS, "embedding": ROWS.T}),
        (sample, {"logits": ROWS, "seed": seed(1), "top_p": torch.ones(4)}),
        (sample_and_embed, {"logits": ROWS, "embedding": ROWS.T, "seed": seed(1)}),
        (verify, {"draft_tokens": DRAFT, "target_logits": TARGET, "draft_logits": TARGET[:, 1:], "seed": seed(1)}),
        (reveal, {"masked": ROWS == 0, "scores": ROWS}),
        (count_tokens_, {"token_counts": DRAFT.int(), "tokens": DRAFT}),
        (
            kv_inject,
            {"features": torch.zeros(1, 2, 8), "weight": torch.zeros(32, 8), "positions": seed(0, 1)[None]}
            | {"cos": ROWS[:, :4], "sin": ROWS[:, :4], "k_caches": CACHE, "v_caches": CACHE},
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_tensors_that_are_not_dense_are_refused(op, arguments):
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            others = {
                "torch.sparse_coo": value.to_sparse(),
                "nested": torch.nested.nested_tensor([value], layout=torch.jagged),
            }
            for kind, other in others.items():
                with pytest.raises(ValueError, match=f"^{op.__name__}: {name} is a {kind} tensor; a dense one"):
                    op(**arguments | {name: other})


def test_an_interval_mask_of_sparse_tensors_is_refused():
    bounds = torch.zeros(1, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="^IntervalMask: blk_lo is a torch.sparse_coo tensor"):
        IntervalMask(bounds, bounds, bounds.to_sparse(), bounds, 4)
