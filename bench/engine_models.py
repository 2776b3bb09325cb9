"""The models whose shapes the engine's benches measure, with random weights, and engines with filled caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from bench.timing import Timing
from dflash_ext.decode import Engine
from dflash_ext.decode.cycle import Drawing
from dflash_ext.models import DFlashDrafter, Target
from dflash_ext.ops.cycle import FIELDS

ROOM = 512  # positions behind the context, for the tokens of all replays


@dataclass(frozen=True)
class Shape:
    config: LlamaConfig | Qwen3Config
    draft_layers: int


SHAPES = {
    "smollm2-135m": Shape(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
        ),
        draft_layers=3,
    ),
    "qwen3-8b": Shape(
        Qwen3Config(
            vocab_size=151936,
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40960,
            tie_word_embeddings=False,
        ),
        draft_layers=5,
    ),
}


def pair(shape: Shape) -> tuple[Target, DFlashDrafter]:
    """A target and a drafter of 16 slots, with random weights in bfloat16, made on the GPU."""
    torch.manual_seed(0)
    kind = Qwen3ForCausalLM if isinstance(shape.config, Qwen3Config) else LlamaForCausalLM
    with torch.device("cuda"):
        model = kind(shape.config).to(torch.bfloat16).eval().requires_grad_(False)
        drafter = DFlashDrafter.for_target(Target(model), mask_token_id=5, num_layers=shape.draft_layers)
    drafter = drafter.to(torch.bfloat16).eval().requires_grad_(False)
    return Target(model, drafter.config.target_layer_ids), drafter


def caches_of(engine: Engine) -> list:
    draft = engine.cycle.draft
    return [engine.cycle.target.cache] + ([draft.cache] if draft and draft.cache else [])


def loaded(target: Target, drafter: DFlashDrafter | None, batch: int, context: int, **options) -> Engine:
    """An engine in which `batch` rows have `context` tokens of random keys and values."""
    engine = Engine(target, drafter, slots=batch, max_length=context + ROOM, **options)
    for cache in caches_of(engine):
        for buffer in cache.buffers.values():
            buffer.normal_()
    for _ in range(batch):
        engine.submit([3], max_new_tokens=context + ROOM - 1)
    while engine.waiting:
        engine.step()
    numbers = engine.state.numbers[list(engine.rows)]
    numbers[:, FIELDS.index("start")] = context
    numbers[:, FIELDS.index("last")] = 10**9
    numbers[:, FIELDS.index("active")] = 1
    engine.state.numbers[list(engine.rows)] = numbers
    return engine


def replay(engine: Engine, batch: int) -> Callable[[], object]:
    """A call that advances all rows of a `loaded` engine by a cycle of its full width, or by a plain step."""
    slots, drawing = list(engine.rows)[:batch], Drawing()
    return lambda: engine.runner.run(slots, drawing, engine.cycle.width)


def timed(call: Callable[[], object], repeats: int) -> Timing:
    """Milliseconds of a call that waits for nothing, from events around each."""
    for _ in range(3):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return Timing.of([a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)])


def bytes_of(target: Target, drafter: DFlashDrafter | None, batch: int, context: int) -> int:
    """What a step or a cycle must read: the weights, the head once for each of the two, and the rows' keys and values.

    Of the embeddings a few rows are read, which are not counted.
    """
    config, head = target.config, target.head.numel() * (2 if drafter else 1)
    weights = sum(p.numel() for layer in target.layers for p in layer.parameters()) + head
    weights += sum(p.numel() for p in drafter.parameters()) if drafter else 0
    head_dim = target.layers[0].self_attn.head_dim
    cached = 2 * config.num_key_value_heads * head_dim * len(target.layers)
    if drafter:
        cached += 2 * drafter.config.num_key_value_heads * drafter.config.head_dim * len(drafter.layers)
    return 2 * (weights + cached * batch * context)
