"""The forward by a model's own modules: a cache of slots under rows of different lengths."""

import pytest
import torch

from dflash_ext.decode import kv_cache
from dflash_ext.decode.forward import ModuleForward
from dflash_ext.integrations import attention
from dflash_ext.models import Target
from python_tests.decode.test_families import tiny
from python_tests.tiny import FAMILIES, random_prompts, tiny_model

# Attention that block_attn serves in its place, and attention that gets copies of the slots and dense masks.
READS_SLOTS = {"gpt2": True, "gpt_oss": True, "gemma4_text": True, "deepseek_v3": True, "xglm": False}


def model_of(family: str):
    return tiny_model(family) if family in FAMILIES else tiny(family)


@pytest.mark.parametrize("family", [*FAMILIES, *READS_SLOTS])
def test_rows_in_pieces_equal_one_pass(family, monkeypatch):
    """Rows of different lengths and slots, fed in pieces with padding and a rejected tail.

    Layers with a window of 8 have pages of 4 keys, the first of which are used again.
    """
    monkeypatch.setattr(kv_cache, "ALIGNMENT", 4)
    model = model_of(family)
    target = Target(model, [1, 3])
    forward = ModuleForward(target, slots=5, tokens=40, rows=11)
    sizes = {layer.keys.shape[2] for layer in forward.cache.layers}
    assert sizes == ({4, 104} if family in ("gemma3", "gpt_oss", "gemma4_text") else {104})
    assert forward.reads_slots == READS_SLOTS.get(family, True)
    rows, slots = random_prompts(25, 13), torch.tensor([3, 0], dtype=torch.int32)

    def read(pieces: list[list[int]], starts: list[int], ends=None):
        width = max(map(len, pieces))
        ids = torch.tensor([piece + [0] * (width - len(piece)) for piece in pieces])
        start, counts = torch.tensor(starts), torch.tensor([len(piece) for piece in pieces])
        column = torch.arange(width)
        positions = torch.where(column < counts[:, None], start[:, None] + column, -1)
        return forward.read(ids, positions, start, counts, slots, target.tap_ids, ends)

    implementation = model.config._attn_implementation
    read([rows[0][:9], rows[1][:4]], [0, 0])
    read([rows[0][9:14], []], [9, 4])
    read([[50, 51, 52], [53, 54, 55]], [14, 4])  # rejected: written over below
    logits, features = read([rows[0][14:], rows[1][4:]], [14, 4])
    last, _ = read([rows[0][24:], rows[1][11:]], [24, 11], [(1, 1), (0, 0)])
    assert model.config._attn_implementation == implementation
    for row, (tokens, kept) in enumerate(zip(rows, (11, 9), strict=True)):
        whole = torch.tensor([tokens])
        expected = model(whole).logits[0, -kept:]
        torch.testing.assert_close(logits[row, :kept], expected, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(last[1 - row], expected[-1], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(features[row, :kept], target.features(whole)[0, -kept:], atol=2e-5, rtol=1e-4)


def test_masks_that_a_layer_gets_on_another_device(monkeypatch):
    """accelerate hands a layer copies of masks and block tables if it lies elsewhere, which are read as they are."""

    def copies(layer, args, given):
        return args, given | {"attention_mask": given["attention_mask"].clone()}

    monkeypatch.setattr(kv_cache, "ALIGNMENT", 4)
    model, moved = tiny_model("gemma3"), tiny_model("gemma3")
    for layer in moved.model.layers[2:]:
        layer.register_forward_pre_hook(copies, with_kwargs=True)
    tokens = torch.tensor(random_prompts(16))
    positions, slots = torch.arange(16)[None], torch.tensor([1], dtype=torch.int32)
    got = []
    for each in (model, moved):
        forward = ModuleForward(Target(each), slots=3, tokens=40, rows=16)
        assert forward.reads_slots
        got.append(forward.read(tokens, positions, torch.tensor([0]), torch.tensor([16]), slots)[0])
    assert torch.equal(*got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_an_operator_with_another_scale_is_refused(monkeypatch, family, dtype):
    """Also beside the rounding of bfloat16, which over a whole model would hide it."""
    own = attention.block_attn_decode
    model = tiny_model(family).to(dtype)
    assert ModuleForward(Target(model), slots=2, tokens=20).reads_slots

    def other(*args, scale: float, **options):
        return own(*args, scale=1.1 * scale, **options)

    monkeypatch.setattr(attention, "block_attn_decode", other)
    assert not ModuleForward(Target(model), slots=2, tokens=20).reads_slots


def test_there_is_no_exact_mode():
    with pytest.raises(ValueError, match="exact=True is not supported: .* no forward of its own for this GPT2LMHead"):
        ModuleForward(Target(tiny("gpt2")), slots=2, tokens=20, exact=True)


def test_no_forward_replaces_a_table_after_tables_were_lengthened():
    """A graph that reads a table keeps its address. XGLM makes a longer one for more tokens."""
    model = tiny("xglm")
    forward = ModuleForward(Target(model), slots=2, tokens=60, rows=40)
    forward.lengthen_tables()
    before = {name: table.data_ptr() for name, table in model.named_buffers()}
    slots = torch.zeros(1, dtype=torch.int32)
    for start, count in ((0, 40), (40, 1), (41, 7)):
        positions = start + torch.arange(count)[None]
        forward.read(positions, positions, torch.tensor([start]), torch.tensor([count]), slots)
    assert {name: table.data_ptr() for name, table in model.named_buffers()} == before
