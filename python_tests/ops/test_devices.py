"""What all operators on logits refuse alike: arguments on several devices."""

import pytest
import torch

from dflash_ext import reveal, sample, verify

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
