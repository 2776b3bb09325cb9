"""The decode engine at the shapes of real models, with random weights, beside transformers: ``python -m bench.engine``.

A row is the time of a plain step, or of a cycle of drafting and verifying, as a replay of the engine's own CUDA graph.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from bench import runner
from bench.timing import Timing
from dflash_ext.decode import Engine, decode
from dflash_ext.decode.cycle import Drawing
from dflash_ext.models import DFlashDrafter, Target

ROOM = 512  # positions behind the context, for the tokens of all replays


@dataclass(frozen=True)
class Shape:
    name: str
    config: LlamaConfig | Qwen3Config
    draft_layers: int


SHAPES = {
    "smollm2-135m": Shape(
        "smollm2-135m",
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
        "qwen3-8b",
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


def random_model(config: LlamaConfig | Qwen3Config) -> PreTrainedModel:
    """A model of random weights in bfloat16, made on the GPU."""
    torch.manual_seed(0)
    kind = Qwen3ForCausalLM if isinstance(config, Qwen3Config) else LlamaForCausalLM
    with torch.device("cuda"):
        return kind(config).to(torch.bfloat16).eval().requires_grad_(False)


def pair(shape: Shape) -> tuple[Target, DFlashDrafter]:
    model = random_model(shape.config)
    with torch.device("cuda"):
        drafter = DFlashDrafter.for_target(Target(model), mask_token_id=5, num_layers=shape.draft_layers)
    drafter = drafter.to(torch.bfloat16).eval().requires_grad_(False)
    return Target(model, drafter.config.target_layer_ids), drafter


def loaded(target: Target, drafter: DFlashDrafter | None, batch: int, context: int) -> Engine:
    """An engine in which `batch` rows have `context` tokens of random keys and values."""
    engine = Engine(target, drafter, slots=batch, max_length=context + ROOM)
    caches = [engine.cycle.target.cache] + ([engine.cycle.draft.cache] if drafter else [])
    for cache in caches:
        cache.keys.normal_()
        cache.values.normal_()
    slots = torch.arange(batch, device="cuda")
    options = [{"temperature": 0.0, "top_k": 0.0, "top_p": 1.0, "min_p": 0.0}] * batch
    none = [()] * batch
    engine.state.admit(
        slots, start=[context] * batch, last=[10**9] * batch, seed=[0] * batch, options=options, stops=none
    )
    engine.state.numbers[slots, 1] = torch.randint(3, target.vocab_size, (batch,), device="cuda")
    engine.state.numbers[slots, 3] = 1
    return engine


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


def weight_bytes(target: Target, drafter: DFlashDrafter | None) -> int:
    """Of the weights that a step or a cycle reads: all but the embedding's, and the head once for each of the two."""
    modules = [*target.layers] + ([drafter] if drafter else [])
    layers = sum(2 * p.numel() for module in modules for p in module.parameters())
    return layers + 2 * target.head.numel() * (2 if drafter else 1)


def cache_bytes(engine: Engine, batch: int, context: int) -> int:
    caches = [engine.cycle.target.cache] + ([engine.cycle.draft.cache] if engine.cycle.draft else [])
    return sum(cache.bytes // cache.keys.shape[1] // cache.capacity * batch * context for cache in caches)


def ours(target: Target, drafter: DFlashDrafter | None, batch: int, context: int, repeats: int = 60) -> dict:
    engine = loaded(target, drafter, batch, context)
    slots, drawing = list(range(batch)), Drawing()
    before = torch.cuda.memory_allocated()
    timing = timed(lambda: engine.runner.run(slots, drawing, engine.cycle.width), repeats)
    total = weight_bytes(target, drafter) + cache_bytes(engine, batch, context)
    return timing.row() | {
        "gbs": total / timing.ms / 1e6,
        "bound_ms": total / 3.0e9,
        "graph_mb": (torch.cuda.memory_allocated() - before) / 1e6,
    }


def transformers_step(target: Target, batch: int, context: int, *, compiled: bool) -> dict:
    """A step of transformers' own decoding with a static cache, as `generate` runs it."""
    model = target.model
    prompt = torch.randint(3, target.vocab_size, (batch, context), device="cuda")
    options = {"do_sample": False, "min_new_tokens": 33, "max_new_tokens": 33, "cache_implementation": "static"}
    options |= {"disable_compile": not compiled, "pad_token_id": 0}
    short = options | {"min_new_tokens": 1, "max_new_tokens": 1}
    mask = torch.ones_like(prompt)

    def seconds(given: dict) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        model.generate(prompt, attention_mask=mask, **given)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    for _ in range(2):
        model.generate(prompt, attention_mask=mask, **options)
    samples = [(seconds(options) - seconds(short)) / 32 for _ in range(3)]
    return Timing.of(samples).row()


def rows_of(shape: Shape, pair: tuple, batches: list[int], context: int, peers: list[str]) -> list[dict]:
    target, drafter = pair
    rows = []
    for batch in batches:
        case = f"{shape.name}, batch {batch}, ctx {context}"
        for name, draft in (("plain step", None), ("cycle", drafter)):
            rows.append({"case": case, "impl": "dflash_ext", "pass": name} | ours(target, draft, batch, context))
            torch.cuda.empty_cache()
        for peer in peers if batch == batches[0] else ():
            row = transformers_step(target, batch, context, compiled=peer == "compiled")
            rows.append({"case": case, "impl": f"transformers, static cache, {peer}", "pass": "plain step"} | row)
        for row in rows:
            if row["case"] == case:
                bound = f"{row['bound_ms']:7.3f} ms by bytes" if "bound_ms" in row else ""
                print(f"  {case:34} {row['impl']:36} {row['pass']:11} {row['ms']:8.3f} ms {bound}", flush=True)
    return rows


def check(target: Target, drafter: DFlashDrafter) -> float:
    """The largest regret in nats of greedy tokens under the model's own logits: near 0 if decoding is right."""
    prompts = [torch.randint(3, 1000, (n,)).tolist() for n in (5, 40, 17)]
    worst = 0.0
    for draft in (drafter, None):
        decoded = decode(target, draft, prompts, max_new_tokens=24)
        for prompt, completion in zip(prompts, decoded.completions, strict=True):
            ids = torch.tensor([prompt + completion.tokens], device="cuda")
            logp = target.model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            chosen = logp.gather(1, ids[0, len(prompt) :, None])[:, 0]
            worst = max(worst, (logp.amax(-1) - chosen).max().item())
    return worst


def copy_rate() -> float:
    """Terabytes a second that a large copy reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    copy = torch.empty_like(source)
    return 2 * source.numel() / timed(lambda: copy.copy_(source), 5).ms / 1e9


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES))
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--peers", nargs="*", default=["eager", "compiled"], choices=["eager", "compiled"])
    given = parser.parse_args()
    name, rows = f"engine_{runner.gpu_name()}", []
    for shape in given.shapes:
        models = pair(SHAPES[shape])
        regret = check(*models)
        print(f"{shape}: largest regret {regret:.4f} nats", flush=True)
        assert math.isfinite(regret) and regret < 0.2, regret
        rows += rows_of(SHAPES[shape], models, given.batches, given.context, given.peers)
        print(runner.write(name, rows, {"copy_tbs": copy_rate()}), flush=True)
        del models
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
