"""What the rows of a LoRA drafter compute in training, against one block at a time under a dense mask."""

import pytest
import torch

from dflash_ext.models.lora import read_context
from python_tests.models.lora.test_drafter import tiny_lora
from python_tests.tiny import FAMILIES, MASK_TOKEN, random_prompts

LENGTH = 20
ANCHORS = [3, 0, 14]  # the window of gemma3 is 8, a block has 6 slots


def dense_mask(length: int, block: int, causal: bool, window: int | None) -> torch.Tensor:
    """Additive [1, 1, L, L]: causal, but for the last `block` rows, which also see each other unless causal."""
    row, key = torch.arange(length)[:, None], torch.arange(length)
    first = length - block
    sees = (key <= row) | (torch.tensor(not causal) & (row >= first) & (key >= first))
    if window:
        sees &= row - key < window
    return torch.where(sees, 0.0, torch.finfo(torch.float32).min)[None, None]


@torch.no_grad()
def one_block(target, drafter, ids, anchor, slots) -> torch.Tensor:
    """The hidden states of the drafted slots of one block, from the model's own attention on the whole text."""
    text = torch.cat([ids[: anchor + 1], slots])[None]
    is_gated = drafter.config.kind == "gated"
    block = drafter.config.drafted if is_gated else drafter.config.block_size
    masks = {
        kind: dense_mask(text.shape[1], block, drafter.config.causal, window) for kind, window in target.windows.items()
    }
    mask = masks if len(masks) > 1 else next(iter(masks.values()))
    rows = (torch.arange(text.shape[1]) > anchor)[None] if is_gated else None
    with drafter.adapter.applied(target.model, rows):
        hidden = target.decoder(inputs_embeds=drafter.embed(target, text), attention_mask=mask)[0]
    return hidden[0, anchor + 1 :]


def all_blocks(target, drafter, ids, anchors) -> torch.Tensor:
    """The same of every block [N, K, H] as training runs them."""
    anchors = torch.tensor(anchors)[None]
    count, length = anchors.shape[1], len(ids)
    keep = torch.ones_like(anchors, dtype=torch.bool)
    context_positions = torch.arange(length)[None]
    masks = drafter.anchor_masks(target, context_positions, anchors, keep)
    blocks = torch.full((count, drafter.config.block_size), MASK_TOKEN)
    blocks[:, 0] = ids[anchors[0]]
    positions = anchors[0, :, None] + torch.arange(drafter.config.block_size)
    if drafter.config.kind == "gated":
        context_masks = drafter.context_masks(target, context_positions)
        _, context = read_context(target, ids[None], context_positions, context_masks)
        inputs = drafter.embed(target, blocks[:, 1:].reshape(1, -1))
        hidden = drafter(target, inputs, positions[:, 1:].reshape(1, -1), masks, context)
        return hidden.view(count, -1, hidden.shape[-1])
    inputs = drafter.embed(target, torch.cat([ids, blocks.flatten()])[None])
    positions = torch.cat([torch.arange(length), positions.flatten()])[None]
    hidden = drafter(target, inputs, positions, masks)[:, length:]
    return hidden.view(count, drafter.config.block_size, -1)[:, 1:]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["gated", "whole"])
@pytest.mark.parametrize("causal", [False, True])
def test_blocks_side_by_side_are_what_each_is_alone(family, kind, causal):
    target, drafter = tiny_lora(family, kind=kind, causal=causal)
    ids = torch.tensor(random_prompts(LENGTH)[0])
    hidden = all_blocks(target, drafter, ids, ANCHORS)
    for number, anchor in enumerate(ANCHORS):
        alone = one_block(target, drafter, ids, anchor, torch.full((drafter.config.drafted,), MASK_TOKEN))
        torch.testing.assert_close(hidden[number], alone, atol=2e-5, rtol=1e-4)
