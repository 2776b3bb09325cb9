"""`attn_implementation="block_attn"` against transformers' own eager attention, on tiny random models."""

import copy
import subprocess
import sys
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounter
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    DiffusionGemmaTextConfig,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StaticCache,
    masking_utils,
)
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as eager_with_sinks

from dflash_ext import IntervalMask, block_attn_decode
from dflash_ext.integrations import as_attention_mask, register
from dflash_ext.integrations.attention import block_attention, interval_attention_mask
from dflash_ext.models.target import cache_argument
from python_tests.exactness import allowed_error
from python_tests.tiny import SHAPE, tiny_model

FAMILIES = ["llama", "qwen3", "gemma2", "gemma3", "gemma4", "llama4", "diffusion_gemma"]
CACHE = cache_argument(LlamaForCausalLM)
LENGTH, WINDOW = 14, 5
MIXED = dict(num_hidden_layers=4, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"] * 2)
GEMMA = SHAPE | MIXED | dict(head_dim=16)
LOCAL = {"llama4": "chunked_attention"}  # the kind of layer beside full attention; elsewhere sliding


def diffusion_gemma():
    experts = dict(num_experts=2, top_k_experts=1, moe_intermediate_size=16)
    text = DiffusionGemmaTextConfig(**GEMMA, **experts, global_head_dim=32, num_global_key_value_heads=2)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8)
    return DiffusionGemmaForBlockDiffusion(
        DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=6)
    )


def model_of(family, **changes):
    """The text model of a family; DiffusionGemma's is its encoder."""
    torch.manual_seed(0)
    if family == "llama":
        model = tiny_model(family, num_hidden_layers=2)
    elif family in ("qwen3", "gemma3"):
        model = tiny_model(family, use_sliding_window=True, **MIXED, **changes)
    elif family == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**GEMMA, attn_logit_softcapping=2.0))
    elif family == "gemma4":
        per_layer = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=SHAPE["vocab_size"])
        config = Gemma4TextConfig(**GEMMA, **per_layer, global_head_dim=32, num_kv_shared_layers=2)
        model = Gemma4ForCausalLM(config)
    elif family == "llama4":
        experts = dict(
            num_local_experts=2, interleave_moe_layer_step=2, intermediate_size_mlp=SHAPE["intermediate_size"]
        )
        kinds = dict(
            num_hidden_layers=4, layer_types=["chunked_attention", "full_attention"] * 2, no_rope_layers=[1, 0] * 2
        )
        model = Llama4ForCausalLM(
            Llama4TextConfig(**SHAPE | kinds, **experts, head_dim=16, attention_chunk_size=WINDOW)
        )
    else:
        model = diffusion_gemma().model.encoder
    for weight in model.parameters():  # large enough for attention to choose
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return model.eval().requires_grad_(True)


def tokens(*shape):
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(1))


def forward(model, implementation, ids, **inputs):
    model.set_attn_implementation(implementation)
    out = model(ids, **inputs)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def assert_same(model, ids, eager, ours, rows=None, peer="eager"):
    """Logits of the rows that count, and the gradients of every parameter, under each implementation's inputs."""
    results = []
    for implementation, inputs in ((peer, eager), ("block_attn", ours)):
        out = forward(model, implementation, ids, **inputs)
        out = out if rows is None else out[rows]
        loss = (out * torch.cos(torch.arange(out.numel())).view(out.shape)).sum()
        results.append((out, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)))
    (want, wanted), (got, grads) = results
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    scale = max(grad.abs().max() for grad in wanted if grad is not None)
    for one, other in zip(grads, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one / scale, other / scale, atol=1e-5, rtol=1e-3)


def padding(style):
    """2-D attention masks of two sequences."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    if style == "left":
        mask[0, :6] = 0
    elif style == "right":
        mask[1, -7:] = 0
    elif style == "both":
        mask[0, :2] = mask[0, -3:] = 0
    elif style == "hole":
        mask[0, 4:6] = 0
    return mask


THREE_RUNS = torch.ones(2, LENGTH, dtype=torch.long)
THREE_RUNS[1, [2, 3, 7]] = 0


def layer_masks(family, **prefix):
    """A prefix and a block for full layers, windows for sliding ones: by kind of layer where a family has both."""
    block = IntervalMask.prefix_block(LENGTH, **prefix)
    if family == "llama":
        return block
    local = LOCAL.get(family, "sliding_attention")
    return {"full_attention": block, local: IntervalMask.sliding_window(LENGTH, 3)}


def each(masks, change):
    return {kind: change(mask) for kind, mask in masks.items()} if isinstance(masks, dict) else change(masks)


@pytest.mark.parametrize("family", FAMILIES)
def test_causal(family):
    assert_same(model_of(family), tokens(2, LENGTH), {}, {})


@pytest.mark.parametrize("style", ["none", "right"])
def test_bidirectional(style):
    model, mask = model_of("gemma3", use_bidirectional_attention=True), padding(style)
    inputs = dict(attention_mask=mask)
    assert_same(model, tokens(2, LENGTH), inputs, inputs, rows=mask.bool())


@pytest.mark.parametrize("style", ["none", "left", "right", "both", "hole"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding(family, style):
    mask = padding(style)
    inputs = dict(attention_mask=mask)
    assert_same(model_of(family), tokens(2, LENGTH), inputs, inputs, rows=mask.bool())


@pytest.mark.parametrize("family", FAMILIES[:-1])  # DiffusionGemma's encoder always has a cache, hence no packing
def test_packed_documents(family):
    model = model_of(family)
    positions = torch.cat([torch.arange(n) for n in (3, 7, 4)])[None]
    inputs = dict(position_ids=positions, use_cache=False)
    assert_same(model, tokens(1, LENGTH), inputs, inputs)
    other = tokens(1, LENGTH).clone()
    other[0, :3] = 5
    one, two = (forward(model, "block_attn", ids, **inputs) for ids in (tokens(1, LENGTH), other))
    torch.testing.assert_close(one[:, 3:], two[:, 3:])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_4d_masks(family, dtype):
    """A bool mask means to block_attn what the additive one means to eager, which would add 0 and 1."""
    masks = layer_masks(family, prefix_len=torch.tensor([5, 9]))
    dense = each(masks, lambda mask: mask.to_dense(torch.float32))
    ours = each(masks, lambda mask: mask.to_bool()) if dtype == torch.bool else dense
    assert_same(model_of(family), tokens(2, LENGTH), dict(attention_mask=dense), dict(attention_mask=ours))


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_one_4d_mask_serves_every_layer(family):
    dense = IntervalMask.prefix_block(LENGTH, 6).to_dense(torch.float32)
    assert_same(model_of(family), tokens(2, LENGTH), dict(attention_mask=dense), dict(attention_mask=dense))


@pytest.mark.parametrize("family", FAMILIES)
def test_interval_masks(family):
    masks = layer_masks(family, prefix_len=torch.tensor([5, 9]))
    eager = dict(attention_mask=each(masks, lambda mask: mask.to_dense(torch.float32)))
    model, ids = model_of(family), tokens(2, LENGTH)
    assert_same(model, ids, eager, dict(interval_mask=masks))
    assert_same(model, ids, eager, dict(attention_mask=each(masks, as_attention_mask)))
    assert_same(model, ids, eager, dict(interval_mask=masks, attention_mask=padding("right")))  # replaced


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gemma4"])
def test_a_step_in_bfloat16_is_as_exact_as_eager(family, device):
    model, masks = model_of(family), layer_masks(family, prefix_len=torch.tensor([5, 9]))
    errors = []
    for seed in range(4):
        ids = torch.randint(3, 96, (2, LENGTH), generator=torch.Generator().manual_seed(seed))

        def gradients(implementation, dtype, device, ids=ids):
            step = copy.deepcopy(model).to(device, dtype)
            on_device = each(masks, lambda mask: mask.to(device))
            dense = each(on_device, lambda mask: mask.to_dense(dtype))
            inputs = dict(interval_mask=on_device) if implementation == "block_attn" else dict(attention_mask=dense)
            out = forward(step, implementation, ids.to(device), use_cache=False, **inputs)
            out.double().log_softmax(-1)[..., 3].sum().backward()
            return torch.cat([x.grad.flatten().double().cpu() for x in step.parameters() if x.grad is not None])

        exact = gradients("eager", torch.float64, "cpu")
        ours, eagers = (gradients(name, torch.bfloat16, device) for name in ("block_attn", "eager"))
        errors.append([((grads - exact).norm() / exact.norm()).item() for grads in (ours, eagers)])
    our_error, eagers_error = torch.tensor(errors).log().mean(0).exp().tolist()
    assert our_error <= allowed_error(eagers_error, torch.finfo(torch.bfloat16).eps / 4)


def test_interval_mask_under_gradient_checkpointing():
    model, masks = model_of("gemma3"), layer_masks("gemma3", prefix_len=5)
    model.gradient_checkpointing_enable()
    model.train()
    eager = dict(attention_mask=each(masks, lambda mask: mask.to_dense(torch.float32)), use_cache=False)
    assert_same(model, tokens(2, LENGTH), eager, dict(interval_mask=masks, use_cache=False))


def test_a_window_that_does_not_bite_needs_no_second_mask():
    mask = IntervalMask.prefix_block(WINDOW, 2)
    eager = dict(attention_mask=mask.to_dense(torch.float32))
    assert_same(model_of("gemma3"), tokens(1, WINDOW), eager, dict(interval_mask=mask))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_caches(family, static):
    """Prefill beyond the window, several tokens, then single ones; the first sequence is padded on the left."""
    model, ids, mask = model_of(family).requires_grad_(False), tokens(2, LENGTH), padding("left")
    config = model.config.get_text_config()
    outputs = {}
    for implementation in ("eager", "block_attn"):
        cache = StaticCache(config, max_cache_len=LENGTH + 3) if static else DynamicCache(config=config)
        outputs[implementation] = [
            forward(
                model,
                implementation,
                ids[:, start:stop],
                attention_mask=mask[:, :stop],
                **{CACHE: cache},
                position_ids=torch.arange(start, stop)[None],
            )
            for start, stop in ((0, 8), (8, 12), (12, 13), (13, 14))
        ]
    for want, got in zip(outputs["eager"], outputs["block_attn"], strict=True):
        rows = slice(None) if want.shape[1] < 8 else slice(6, None)
        torch.testing.assert_close(got[:, rows], want[:, rows], atol=1e-4, rtol=1e-4)


# transformers 5.11 itself cannot generate with Llama 4 and a static cache; test_caches has the two.
GENERATE = {(family, cache): None for family in FAMILIES[:-1] for cache in ("dynamic", "static")}
del GENERATE["llama4", "static"]


@pytest.mark.parametrize(("family", "cache"), GENERATE)
def test_generate(family, cache):
    model, ids, mask = model_of(family), tokens(2, LENGTH), padding("left")
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, cache_implementation=cache)
    model.set_attn_implementation("eager")
    want = model.generate(ids, attention_mask=mask, **options)
    model.set_attn_implementation("block_attn")
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), want)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_goes_on_behind_a_prompt_read_under_intervals(cache):
    """A prompt that sees both ways but for its last token, against eager attention one forward at a time."""
    model, ids, new = model_of("llama"), tokens(2, LENGTH), 8
    mask = IntervalMask.full(LENGTH - 1)
    model.set_attn_implementation("eager")
    filled, want = DynamicCache(config=model.config), ids
    dense = mask.to_dense(torch.float32).expand(2, -1, -1, -1)
    model(ids[:, :-1], attention_mask=dense, **{CACHE: filled})
    for _ in range(new):
        logits = model(want[:, -1:], **{CACHE: filled}).logits
        want = torch.cat([want, logits[:, -1:].argmax(-1)], dim=1)

    model.set_attn_implementation("block_attn")
    options = dict(max_new_tokens=new, do_sample=False, eos_token_id=None)
    assert not torch.equal(model.generate(ids, **options), want)
    if cache == "dynamic":
        filled, slots = DynamicCache(config=model.config), LENGTH - 1
    else:
        filled, slots = StaticCache(model.config, LENGTH + new), LENGTH + new
    read = IntervalMask.full(LENGTH - 1, q_len=LENGTH - 1, kv_len=slots)
    model(ids[:, :-1], interval_mask=read, **{CACHE: filled})
    assert torch.equal(model.generate(ids, **{CACHE: filled}, **options), want)


def test_generate_refuses_intervals():
    model, ids, mask = model_of("llama"), tokens(1, LENGTH), IntervalMask.full(LENGTH)
    model.set_attn_implementation("block_attn")
    with pytest.raises(ValueError, match="not used by the model: .'interval_mask'"):
        model.generate(ids, interval_mask=mask, max_new_tokens=2)
    with pytest.raises(ValueError, match="must be 2D"):
        model.generate(ids, attention_mask=as_attention_mask(mask), max_new_tokens=2)


@pytest.mark.parametrize("style", ["none", "left"])
def test_diffusion_gemma_denoises(style):
    """The encoder is causal; the canvas sees all of the prompt that its layers keep, and itself both ways."""
    model, ids, canvas = diffusion_gemma().eval(), tokens(2, LENGTH), tokens(2, 6)
    mask = padding(style)
    inputs = dict(
        attention_mask=mask,
        decoder_input_ids=canvas,
        decoder_attention_mask=torch.nn.functional.pad(mask, (0, 6), value=1),
    )
    assert_same(model, ids, inputs, inputs, peer="sdpa")  # eager attention is wrong here in early releases


def test_diffusion_gemma_takes_intervals_for_its_canvas():
    model, ids, canvas = diffusion_gemma().eval(), tokens(2, LENGTH), tokens(2, 6)
    masks = {
        "full_attention": IntervalMask.decode(LENGTH, 6, kv_start=torch.tensor([3, 0]), kv_len=LENGTH + 6),
        "sliding_attention": IntervalMask.decode(WINDOW - 1, 6, kv_start=2),
    }
    inputs = dict(decoder_input_ids=canvas)
    eager = inputs | dict(decoder_attention_mask=each(masks, lambda mask: mask.to_dense(torch.float32)))
    ours = inputs | dict(decoder_attention_mask=each(masks, as_attention_mask))
    assert_same(model, ids, eager, ours)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_diffusion_gemma_generates(cache, monkeypatch):
    # transformers 5.11 compiles its steps for minutes with a static cache, whatever `disable_compile` says.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model, ids, mask = diffusion_gemma().eval(), tokens(2, LENGTH), padding("left")
    outputs = []
    for implementation in ("sdpa", "block_attn"):  # eager fails here on a padded prompt
        model.set_attn_implementation(implementation)
        torch.manual_seed(0)
        options = dict(max_new_tokens=12, max_denoising_steps=4, cache_implementation=cache)
        outputs.append(model.generate(ids, attention_mask=mask, disable_compile=True, **options).sequences)
    assert torch.equal(*outputs)


def attention_inputs(rows=6, keys=6):
    generator = torch.Generator().manual_seed(0)
    module = types.SimpleNamespace(is_causal=True, training=False, num_key_value_groups=2)
    shapes = [(2, 4, rows, 16), (2, 2, keys, 16), (2, 2, keys, 16)]
    return module, *(torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes)


def test_sinks():
    module, *qkv = attention_inputs()
    module.sinks = torch.tensor([-3.0, 0.0, 0.5, 4.0], requires_grad=True)
    dense = IntervalMask.causal(6).to_dense(torch.float32)
    want = eager_with_sinks(module, *qkv, dense, scaling=0.4)[0]
    got = block_attention(module, *qkv, dense, scaling=0.4, s_aux=module.sinks)[0]
    torch.testing.assert_close(got, want)
    wanted, grads = (torch.autograd.grad(out.cos().sum(), (*qkv, module.sinks)) for out in (want, got))
    torch.testing.assert_close(grads, wanted)


def test_sinks_of_a_row_that_sees_nothing():
    module, *qkv = attention_inputs()
    sinks = torch.zeros(4, requires_grad=True)
    nothing = torch.zeros(2, 1, 6, 6, dtype=torch.bool)
    out = block_attention(module, *qkv, nothing, s_aux=sinks)[0]
    assert not out.any() and not any(grad.any() for grad in torch.autograd.grad(out.sum(), (*qkv, sinks)))


@pytest.mark.parametrize("rows", [6, 2])
@pytest.mark.parametrize("train", [False, True])
def test_values_narrower_than_keys(rows, train):
    module, query, key, value = attention_inputs(rows=rows)
    mask = IntervalMask.full(6, q_len=rows)
    wide = torch.nn.functional.pad(value[..., :8], (0, 8))
    with torch.set_grad_enabled(train):
        got, want = (block_attention(module, query, key, v, None, interval_mask=mask)[0] for v in (wide[..., :8], wide))
        torch.testing.assert_close(got, want[..., :8])
        slots = torch.tensor([[1], [0]], dtype=torch.int32)
        own = block_attention(module, query, key, wide[..., :8], None, interval_mask=mask, block_table={6: slots})[0]
        swapped = block_attention(module, query, key.flip(0), wide.flip(0)[..., :8], None, interval_mask=mask)[0]
        torch.testing.assert_close(own, swapped)


@pytest.mark.parametrize(("is_causal", "module_is_causal"), [(None, True), (True, False), (None, False), (False, True)])
def test_without_a_mask_the_layer_says_whether_it_is_causal(is_causal, module_is_causal):
    module, *qkv = attention_inputs()
    module.is_causal = module_is_causal
    causal = module_is_causal if is_causal is None else is_causal
    mask = IntervalMask.causal(6) if causal else IntervalMask.full(6)
    got = block_attention(module, *qkv, None, is_causal=is_causal)[0]
    torch.testing.assert_close(got, block_attention(module, *qkv, mask.to_bool())[0])


def test_without_a_mask_one_row_sees_its_window_of_the_cache():
    module, *qkv = attention_inputs(rows=1)
    mask = IntervalMask.decode(5, 1, window=4)
    got = block_attention(module, *qkv, None, sliding_window=4)[0]
    torch.testing.assert_close(got, block_attention(module, *qkv, mask.to_bool())[0])


@pytest.mark.parametrize(
    ("layer_type", "sliding_window", "kind"),
    [
        ("chunked_attention", None, "chunked_attention"),
        (None, 4, "sliding_attention"),
        (None, None, "full_attention"),
    ],
)
def test_layers_that_name_their_kind_and_layers_that_do_not(layer_type, sliding_window, kind):
    module, *qkv = attention_inputs()
    module.layer_type = layer_type
    kinds = ("full_attention", "sliding_attention", "chunked_attention")
    masks = {name: IntervalMask.sliding_window(6, width) for width, name in enumerate(kinds, 2)}
    got = block_attention(module, *qkv, None, sliding_window=sliding_window, interval_mask=masks)[0]
    torch.testing.assert_close(got, block_attention(module, *qkv, masks[kind].to_bool())[0])


def test_a_copied_packed_mask_never_reaches_beyond_the_keys(monkeypatch):
    module, *qkv = attention_inputs()
    packed = as_attention_mask(IntervalMask.full(9, q_len=6))
    with pytest.raises(ValueError, match="over 9 keys, k has 6"):
        block_attention(module, *qkv, packed)
    masks = []

    def record(q, k, v, mask, **options):
        masks.append(mask)
        return q

    monkeypatch.setattr("dflash_ext.integrations.attention.block_attn", record)
    block_attention(module, *qkv, packed.clone())
    assert masks[0].kv_len == 6 and masks[0].ctx_hi.eq(6).all()


def test_plain_causal_masks_stay_linear_in_the_length(monkeypatch):
    monkeypatch.setattr("dflash_ext.integrations.attention.sdpa_mask", None)
    packed = interval_attention_mask(2, LENGTH, LENGTH, attention_mask=padding("both").bool())
    assert packed.dtype == torch.int32 and packed.shape == (2, 1, LENGTH, 4)
    window = sliding_window_causal_mask_function(4)
    packed = interval_attention_mask(2, 3, 8, 7, 2, window, attention_mask=padding("left").bool()[:, :10], local_size=4)
    assert packed[:, 0, :, :2].tolist() == [[[4, 6], [4, 7], [4, 8]], [[2, 6], [3, 7], [4, 8]]]
    cached = interval_attention_mask(2, 3, 9, q_offset=torch.tensor(7), kv_offset=1)
    assert cached[0, 0, :, :2].tolist() == [[0, 7], [0, 8], [0, 9]]
    seen = torch.ones(1, 6, dtype=torch.bool)
    unfilled = interval_attention_mask(
        1, 1, 4, q_offset=5, kv_offset=3, attention_mask=seen, mask_function=bidirectional_mask_function
    )
    assert unfilled[0, 0, :, :2].tolist() == [[0, 3]]


def composed():
    """What transformers composes its masks of, for batches of three and 12 keys."""
    generator = torch.Generator().manual_seed(0)
    start = torch.tensor([0, 1, 4])
    window, chunk = sliding_window_causal_mask_function(3), chunked_causal_mask_function(3, start)
    images = torch.tensor([[-1] * 2 + [0] * 3 + [-1] * 2 + [1] * 3 + [-1] * 2] * 3)
    documents = torch.randint(0, 2, (3, 12), generator=generator).cumsum(-1)
    positions = torch.stack([torch.arange(12) - (row == row[:, None]).int().argmax(-1) for row in documents])
    # Early releases know no positions within documents.
    remap = getattr(masking_utils, "remap_positions_for_packed_sequence", lambda function, positions: function)
    runs = {
        "causal": causal_mask_function,
        "bidirectional": bidirectional_mask_function,
        "window": window,
        "window both ways": sliding_window_bidirectional_mask_function(2),
        "chunks": chunk,
        "window and chunks": and_masks(window, chunk),
        "window of one": sliding_window_causal_mask_function(1),
        "rows from 3 on": and_masks(causal_mask_function, lambda b, h, row, key: row >= 3),
    }
    others = {
        "images": or_masks(causal_mask_function, blockwise_overlay(images)),
        "images and window": or_masks(window, blockwise_overlay(images)),
        "documents": and_masks(causal_mask_function, packed_sequence_mask_function(documents)),
        "window in documents": and_masks(remap(window, positions), packed_sequence_mask_function(documents)),
        "chunks or window": or_masks(chunk, window),
        "a fraction": lambda b, h, row, key: key <= row / 2,
        "a fraction of a distance": lambda b, h, row, key: abs(row - key) < 1.5,
        "parts of a fraction": lambda b, h, row, key: key // 1.5 <= row // 1.5,
        "parts of negative size": lambda b, h, row, key: key // -2 == row // -2,
        "a constant": lambda b, h, row, key: (key <= row) & True,
        "a method": lambda b, h, row, key: key.le(row),
        "two comparisons compared": lambda b, h, row, key: (key <= row) == (key < 9),
    }
    return runs, others


RUNS, OTHERS = composed()


@pytest.mark.parametrize("name", RUNS | OTHERS)
@pytest.mark.parametrize(("rows", "q_offset", "kv_offset"), [(12, 0, 0), (1, 11, 0), (1, 6, 0), (3, 8, 2), (1, 9, 7)])
def test_every_mask_that_transformers_composes(name, rows, q_offset, kv_offset):
    """All entries of a batch, under padding of their own: single tokens, blocks, whole prompts, caches that slid."""
    mask_function, keys = (RUNS | OTHERS)[name], 12 - kv_offset
    padding = torch.ones(3, 12, dtype=torch.bool)
    padding[1, 0] = padding[2, :4] = padding[0, 10:] = False
    for holes in (False, True):
        if holes and name in RUNS:
            padding[0, 5:7] = False
        for given in (None, padding):
            inputs = (3, rows, keys, q_offset, kv_offset, mask_function, given)
            bounds = interval_attention_mask(*inputs, local_size=3)[:, 0].unbind(-1)
            want = sdpa_mask(*inputs, allow_is_causal_skip=False)
            assert torch.equal(IntervalMask(*bounds, keys).to_bool().expand_as(want), want)


@pytest.mark.parametrize("name", RUNS)
def test_comparisons_alone_stay_linear_in_the_length(monkeypatch, name):
    monkeypatch.setattr("dflash_ext.integrations.attention.sdpa_mask", None)
    interval_attention_mask(3, 12, 12, mask_function=RUNS[name], attention_mask=torch.ones(3, 12).bool())


def test_mask_functions_of_single_indices():
    def visible(batch, head, row, key):
        return torch.stack((key <= row, key == 5)).any()

    packed = interval_attention_mask(2, 3, 6, mask_function=visible, use_vmap=True)
    assert packed[0, 0].tolist() == [[0, 1, 5, 6], [0, 2, 5, 6], [0, 3, 5, 6]]


def test_a_dense_mask_is_read_once_a_forward(monkeypatch):
    calls, from_dense = [], IntervalMask.from_dense
    monkeypatch.setattr(IntervalMask, "from_dense", lambda mask: calls.append(mask) or from_dense(mask))
    model, ids = model_of("llama"), tokens(1, 4)
    mask = IntervalMask.causal(4).to_bool()
    one = forward(model, "block_attn", ids, attention_mask=mask)
    assert len(calls) == 1 < model.config.num_hidden_layers
    mask[...] = True
    two = forward(model, "block_attn", ids, attention_mask=mask)
    assert len(calls) == 2 and not torch.allclose(one, two)
    with torch.inference_mode():
        mask = IntervalMask.causal(4).to_bool()
        torch.testing.assert_close(forward(model, "block_attn", ids, attention_mask=mask), one.detach())
        mask[...] = True
        torch.testing.assert_close(forward(model, "block_attn", ids, attention_mask=mask), two.detach())


def decode_steps(model, device, static):
    """A prompt, a block and two single tokens against a cache, padded on the left; nothing is read on the host."""
    config, ids, mask = model.config.get_text_config(), tokens(2, LENGTH).to(device), padding("left").to(device)
    with torch.device(device):
        cache = StaticCache(config, max_cache_len=LENGTH + 3) if static else DynamicCache(config=config)
    for start, stop in ((0, 8), (8, 12), (12, 13), (13, 14)):
        position = torch.arange(start, stop, device=device)[None]
        yield lambda a=start, b=stop, at=position: model(
            ids[:, a:b], attention_mask=mask[:, :b], position_ids=at, **{CACHE: cache}
        )


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("family", FAMILIES[:-1])
def test_decoding_reads_no_value_on_the_host(family, static):
    """Tensors on the meta device have none: whatever needs one raises."""
    model = model_of(family).requires_grad_(False).to("meta")
    model.set_attn_implementation("block_attn")
    for step in decode_steps(model, "meta", static):
        assert step().logits.is_meta


# Transformers' own static cache waits for the GPU in layers with a window or chunks.
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("family", "static"), [("llama", False), ("gemma3", False), ("llama4", False), ("llama", True)]
)
def test_decoding_does_not_wait_for_the_gpu(family, static):
    model = model_of(family).requires_grad_(False).to("cuda", torch.bfloat16)
    model.set_attn_implementation("block_attn")
    for step in [*decode_steps(model, "cuda", static)]:  # once more is what counts
        step()
    for step in [*decode_steps(model, "cuda", static)]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_few_rows_against_a_cache_go_to_the_decode_kernel(monkeypatch):
    rows = []

    def record(query, *args, **kwargs):
        rows.append(query.shape[2])
        return block_attn_decode(query, *args, **kwargs)

    monkeypatch.setattr("dflash_ext.integrations.attention.block_attn_decode", record)
    model = model_of("llama")
    model.set_attn_implementation("block_attn")
    for _ in map(lambda step: step(), decode_steps(model, "cpu", static=False)):
        pass
    assert not rows  # their gradients are wanted
    with torch.no_grad():
        for _ in map(lambda step: step(), decode_steps(model, "cpu", static=False)):
            pass
    assert rows == [4, 4, 1, 1, 1, 1]


def test_compiles_whole():
    """Masks are checked there too, when they are used."""
    model, ids = model_of("gemma3").requires_grad_(False), tokens(2, LENGTH)
    del model.model.layers[2:]
    model.set_attn_implementation("block_attn")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    masks = layer_masks("gemma3", prefix_len=5)
    dense = each(masks, lambda mask: mask.to_bool())
    for inputs in (
        dict(use_cache=False),
        dict(use_cache=True),
        dict(use_cache=False, attention_mask=padding("left")),
        dict(use_cache=False, attention_mask=dense),
        dict(use_cache=False, interval_mask=masks),
    ):
        torch.testing.assert_close(compiled(ids, **inputs).logits, model(ids, **inputs).logits)
    with pytest.raises(RuntimeError, match="more than two runs"):
        compiled(ids, use_cache=False, attention_mask=THREE_RUNS)


@pytest.mark.parametrize(("family", "graphs"), [("llama", 1), ("qwen3", 2), ("gemma3", 2)])
def test_compiled_layers_of_a_kind_share_a_graph(family, graphs):
    model, masks = model_of(family), layer_masks(family, prefix_len=5)
    embeds = torch.randn(2, LENGTH, model.config.get_text_config().hidden_size, requires_grad=True)
    model.set_attn_implementation("block_attn")
    torch._dynamo.reset()
    counter = CompileCounter()
    for layer in model.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    model(inputs_embeds=embeds, use_cache=False, interval_mask=masks)
    assert counter.frame_count == graphs


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (dict(attention_mask=THREE_RUNS), "row 8 of batch entry 1 sees 3 separate runs"),
        (dict(attention_mask=(torch.arange(LENGTH) % 3 == 0).expand(1, 1, LENGTH, -1)), "row 0 .* 5 separate runs"),
        (dict(attention_mask=torch.full((1, 1, LENGTH, LENGTH), -0.5)), "-0.5 in the mask"),
        (dict(attention_mask=torch.ones(1, 4, LENGTH, LENGTH).bool()), r"mask is \[1, 4, 14, 14\]"),
        (dict(attention_mask=torch.ones(1, 1, LENGTH, LENGTH).int()), r"torch.int32 \[1, 1, 14, 14\]"),
        (dict(attention_mask=torch.ones(1, 1, LENGTH, LENGTH).long()), r"torch.int64 \[1, 1, 14, 14\]"),
        (dict(attention_mask=IntervalMask.causal(LENGTH).to_flex()), "attention_mask is a BlockMask"),
        (dict(attention_mask=as_attention_mask(IntervalMask.causal(9))), "the mask is for batch 1 and 9 rows"),
        (dict(attention_mask=IntervalMask.full(9, q_len=LENGTH).to_bool()), "over 9 keys, k has 14"),
        (dict(interval_mask=IntervalMask.causal(9)), "the mask is for batch 1 and 9 rows"),
        (dict(interval_mask=IntervalMask.causal(LENGTH).to_bool()), "interval_mask for .* is Tensor"),
        (dict(interval_mask={}), "interval_mask for .* is NoneType"),
        (
            dict(
                interval_mask=IntervalMask.causal(LENGTH),
                attention_mask=IntervalMask.causal(LENGTH).to_bool(),
            ),
            "both given",
        ),
        (dict(output_attentions=True), "output_attentions"),
    ],
)
def test_what_it_refuses(inputs, message):
    model = model_of("llama")
    with pytest.raises(ValueError, match=message) as error:
        forward(model, "block_attn", tokens(2, LENGTH), **inputs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["gemma3", "llama4"])
def test_one_interval_mask_is_refused_where_a_window_or_chunk_would_cut_it(family):
    message = "over 14 keys was given to (sliding|chunked)_attention layers, which see at most 5; pass a dict"
    with pytest.raises(ValueError, match=message):
        forward(model_of(family), "block_attn", tokens(1, LENGTH), interval_mask=IntervalMask.causal(LENGTH))


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("wrap", ["alone", "base", "compiled", "adapted"])
def test_other_attention_refuses_intervals(implementation, wrap):
    """It would ignore the keyword, and the model would train causally."""
    model, ids, mask = model_of("llama"), tokens(1, LENGTH), IntervalMask.causal(LENGTH)
    wrapped = {
        "alone": lambda: model,
        "base": lambda: model.model,
        "compiled": lambda: torch.compile(model, backend="eager"),
        "adapted": lambda: get_peft_model(model, LoraConfig(target_modules=["q_proj"])),
    }[wrap]()
    model.set_attn_implementation(implementation)
    with pytest.raises(
        ValueError, match=f"interval_mask was given, but .* is '{implementation}', which ignores it"
    ) as e:
        wrapped(ids, interval_mask=mask)
    assert "\n" not in str(e.value)
    if implementation != "flex_attention":  # on the CPU that wants no parameters with gradients
        wrapped(ids, interval_mask=None)
    model.set_attn_implementation("block_attn")
    wrapped(ids, interval_mask=mask)


def test_the_text_model_decides_for_a_model_of_several():
    model, ids = diffusion_gemma(), tokens(1, LENGTH)
    model.model.encoder.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="interval_mask was given"):
        model.model.encoder(ids, interval_mask=IntervalMask.causal(LENGTH))


def test_dropout_is_refused_in_training_only():
    model, ids = model_of("llama"), tokens(1, 4)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    forward(model, "block_attn", ids)
    with pytest.raises(ValueError, match="dropout is 0.1"):
        forward(model.train(), "block_attn", ids)


def test_other_refusals():
    module, *qkv = attention_inputs(rows=3)
    for name in ("position_bias", "cache"):
        with pytest.raises(ValueError, match="does not support"):
            block_attention(module, *qkv, None, **{name: torch.zeros(1)})
    with pytest.raises(ValueError, match="3 rows over 6 keys without a mask"):
        block_attention(module, *qkv, None)


def test_registration(tmp_path):
    before = AttentionInterface()["block_attn"], AttentionMaskInterface()["block_attn"]
    register()
    assert before == (AttentionInterface()["block_attn"], AttentionMaskInterface()["block_attn"])
    assert before == (block_attention, interval_attention_mask)
    model_of("llama").save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="block_attn")
    assert loaded.config._attn_implementation == "block_attn"
    assert copy.deepcopy(loaded)(tokens(1, 4)).logits.shape == (1, 4, SHAPE["vocab_size"])


def test_models_and_libraries_with_a_call_of_their_own(monkeypatch):
    class Counted(torch.nn.Module):
        calls = 0

        def __call__(self, *args, **kwargs):
            Counted.calls += 1
            return super().__call__(*args, **kwargs)

    class Model(LlamaForCausalLM, Counted):
        pass

    model = Model(model_of("llama").config)
    model(tokens(1, 4))
    assert Counted.calls == 1
    theirs = lambda model, *args, **kwargs: "theirs"  # noqa: E731
    monkeypatch.setattr(PreTrainedModel, "__call__", theirs)
    register()
    assert model(tokens(1, 4)) == "theirs"


def test_the_package_alone_does_not_import_transformers():
    code = "import sys, dflash_ext; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
