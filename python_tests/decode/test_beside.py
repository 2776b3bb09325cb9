"""The adapter's products beside the base's: two ways to add them to some rows of each entry."""

import pytest
import torch

from dflash_ext.decode.forward import LeanForward
from dflash_ext.decode.forward.beside import BesideStack
from dflash_ext.decode.forward.layers import Rows
from dflash_ext.decode.forward.lora import PROJECTIONS, Halves, LayerHalves, halves_of, join
from dflash_ext.decode.forward.masks import causal_masks
from dflash_ext.models import LoraDrafter, Target
from python_tests.tiny import MASK_TOKEN, tiny_model


def forward_of(targets: str, family: str = "llama", rank: int = 4) -> tuple[LeanForward, list[LayerHalves]]:
    target = Target(tiny_model(family))
    drafter = LoraDrafter.for_target(target, mask_token_id=MASK_TOKEN, rank=rank, targets=targets).requires_grad_(False)
    for weight in drafter.adapter.lora_b:
        weight.normal_(std=0.1)
    return LeanForward(target, slots=2, tokens=40), halves_of(drafter.adapter, target)


def stack_of(targets: str) -> BesideStack:
    forward, halves = forward_of(targets)
    return BesideStack.of(forward.stack, halves)


@torch.no_grad()
@pytest.mark.parametrize("first, entries", [(0, 1), (2, 1), (0, 3), (2, 3)])
def test_rows_before_the_first_keep_their_values(first, entries):
    torch.manual_seed(0)
    halves = Halves(torch.randn(4, 16), torch.randn(24, 4), sizes=(24,), places=(0,))
    stack = stack_of("all").on(first, entries)
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


@torch.no_grad()
@pytest.mark.parametrize("first, entries", [(0, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("family, targets", [("llama", "all"), ("qwen2", "all"), ("gemma3", "all"), ("llama", "mlp")])
def test_joint_products_give_the_same_and_leave_the_model_as_it_is(family, targets, first, entries):
    forward, halves = forward_of(targets, family, rank=3)
    hidden = forward.embed(torch.arange(3, 3 + entries * 5)[None])[0]
    start, slots = torch.zeros(entries, dtype=torch.int64), torch.arange(entries, dtype=torch.int32)
    places = torch.arange(5).expand(entries, 5).contiguous()
    masks = causal_masks(forward.windows, start, 5, torch.full((entries,), 5), forward.capacity)

    def run(halves: list[LayerHalves]) -> torch.Tensor:
        stack = BesideStack.of(forward.stack, halves).on(first, entries)
        return stack.forward(hidden.clone(), Rows(places, places, slots, masks), forward.cache)[0]

    tokens, model = torch.arange(3, 9)[None], forward.target.model
    apart, before = run(halves), model(tokens).logits
    joint = join(forward.stack.layers, halves, 3, forward.target)
    torch.testing.assert_close(run(joint), apart, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(tokens).logits, before)
    for layer, of_layer, module in zip(forward.stack.layers, joint, forward.target.layers, strict=True):
        for part, (name, *_) in PROJECTIONS.items():
            if (pair := getattr(of_layer, part)) is not None:
                weights = pair.weight, getattr(layer, part), module.get_submodule(name).weight
                assert len({each.data_ptr() for each in weights}) == 1
