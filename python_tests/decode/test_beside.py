"""The adapter's products beside the base's: two ways to add them to some rows of each entry."""

import pytest
import torch

from dflash_ext.decode.forward import LeanForward
from dflash_ext.decode.forward.beside import BesideStack
from dflash_ext.decode.forward.lora import Halves, halves_of
from dflash_ext.models import LoraDrafter, Target
from python_tests.tiny import MASK_TOKEN, tiny_model


def stack_of(targets: str) -> BesideStack:
    target = Target(tiny_model("llama"))
    drafter = LoraDrafter.for_target(target, mask_token_id=MASK_TOKEN, rank=4, targets=targets).requires_grad_(False)
    for weight in drafter.adapter.lora_b:
        weight.normal_()
    forward = LeanForward(target, slots=1, tokens=10)
    return BesideStack.of(forward.stack, halves_of(drafter.adapter, target))


@torch.no_grad()
@pytest.mark.parametrize("first, entries", [(0, 1), (2, 1), (0, 3), (2, 3)])
def test_rows_before_the_first_keep_their_values(first, entries):
    torch.manual_seed(0)
    halves, stack = Halves(torch.randn(4, 16), torch.randn(24, 4)), stack_of("all").on(first, entries)
    x, base = torch.randn(entries * 5, 16), torch.randn(entries * 5, 24)
    is_other = torch.arange(5).repeat(entries)[:, None] >= first
    expected = base + is_other * (x.double() @ halves.down.double().T @ halves.up.double().T)
    for add in (stack._add_in_place, stack._add_row_by_row):
        product = base.clone()
        add(product, x, halves)
        assert torch.allclose(product.double(), expected, atol=1e-5)
        kept = ~is_other.expand_as(base)
        assert torch.equal(product[kept], base[kept])


@pytest.mark.parametrize(
    "targets, packed", [("attention", ["qkv", "out"]), ("o_proj", ["out"]), ("mlp", ["gate_up", "down"])]
)
def test_the_halves_of_each_product(targets, packed):
    halves = stack_of(targets).halves[0]
    names = ["qkv", "out", "gate_up", "down"]
    assert [name for name in names if getattr(halves, name) is not None] == packed


@torch.no_grad()
def test_packed_halves_are_those_of_each_projection():
    target = Target(tiny_model("llama"))
    drafter = LoraDrafter.for_target(target, mask_token_id=MASK_TOKEN, rank=4, alpha=8.0, targets=["q_proj", "v_proj"])
    for weight in drafter.adapter.lora_b:
        weight.normal_()
    qkv = halves_of(drafter.adapter, target)[1].qkv
    expected = []
    for name, rows in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32)):
        path = f"model.layers.1.self_attn.{name}"
        known = path in drafter.adapter.paths
        a, b = drafter.adapter.halves(path) if known else (torch.zeros(1, 64), torch.zeros(rows, 1))
        expected.append(2.0 * b @ a)
    assert torch.allclose(qkv.up @ qkv.down, torch.cat(expected), atol=1e-5)
