"""A denoising step of DiffusionGemma 26B-A4B's shapes against transformers' own loop and against what its parts must
read and compute, and canvases of SmolLM2: ``python -m bench.canvas``. Names of cases run these alone, such as
``python -m bench.canvas smollm2 parts``; ``--profile`` prints the kernels of a step.

The model has random weights, the sizes of the published one, and two layers (a sliding and a full one). The prompt has
4,096 tokens and a canvas 256. No canvas ends before its last step, so that both loops make the same steps.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial

import torch
from torch.nn.functional import linear
from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    DiffusionGemmaTextConfig,
    LlamaForCausalLM,
)

from bench import runner
from bench.engine_models import SHAPES
from bench.timing import captured, event_turns, gpu_turns
from dflash_ext import IntervalMask, block_attn_decode, sample, sample_and_embed, soft_embedding
from dflash_ext.decode import decode
from dflash_ext.decode.canvas import MaskedDiffusion, UniformDiffusion, decode_canvas
from dflash_ext.decode.canvas.cycle import CanvasCycle
from dflash_ext.decode.canvas.forward import canvas_forward
from dflash_ext.decode.canvas.graphs import Runner
from dflash_ext.decode.canvas.randomness import Seeded
from dflash_ext.models import Denoiser, Target
from dflash_ext.models.uniform import SelfConditioning

CANVAS, PROMPT, STEPS = 256, 4096, (8, 48)
VOCAB, HIDDEN, SOFTCAP, WINDOW = 262_144, 2816, 30.0, 1024
HEADS = 16
KINDS = {"sliding": (8, 256, WINDOW - 1), "full": (2, 512, PROMPT)}  # key heads, head_dim, keys of the prompt


@functools.cache
def model() -> DiffusionGemmaForBlockDiffusion:
    experts = dict(num_experts=128, top_k_experts=8, moe_intermediate_size=704)
    heads = dict(num_attention_heads=HEADS, num_key_value_heads=8, head_dim=256, num_global_key_value_heads=2)
    kinds = dict(layer_types=["sliding_attention", "full_attention"], num_hidden_layers=2, sliding_window=WINDOW)
    sizes = dict(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=2112)
    text = DiffusionGemmaTextConfig(**sizes, **heads, **kinds, **experts)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            made = DiffusionGemmaForBlockDiffusion(
                DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=CANVAS)
            )
    finally:
        torch.set_default_dtype(before)
    return made.eval().requires_grad_(False)


def prompt_of() -> list[int]:
    return torch.randint(3, VOCAB, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()


def process(steps: int) -> UniformDiffusion:
    return UniformDiffusion(steps=steps, confidence=None)


def seconds(call) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def loops() -> list[dict]:
    """Both loops over one canvas: all of it, with the prompt's encoding, and a step alone.

    A step of ours is that of a loop whose graphs are made, which a server or a long run has. transformers' loop makes
    none, so that the difference of two numbers of steps is its own step.
    """
    target, prompt = model(), prompt_of()
    ids = torch.tensor([prompt], device="cuda")
    options = dict(max_new_tokens=CANVAS, eos_token_id=None, disable_compile=True, confidence_threshold=1e-30)
    target.set_attn_implementation("sdpa")

    def theirs(steps: int) -> None:
        target.generate(ids, max_denoising_steps=steps, **options)

    def ours(steps: int):
        return decode_canvas(target, [prompt], process(steps), max_new_tokens=CANVAS)

    few, many = STEPS
    whole, step = {}, {}
    theirs(few)
    times = [seconds(lambda steps=steps: theirs(steps)) for steps in (few, many)]
    whole["transformers"], step["transformers"] = times[1], (times[1] - times[0]) / (many - few)
    ours(few)
    decoded = []
    whole["dflash_ext"] = seconds(lambda: decoded.append(ours(many)))
    step["dflash_ext"] = decoded[0].decode_seconds / many
    told = (f"a canvas of {many} steps, with its prompt", whole), ("step, by the host's clock", step)
    return [
        {"case": "loop", "pass": which, "impl": impl, "ms": 1e3 * time_of}
        for which, times in told
        for impl, time_of in times.items()
    ]


@torch.no_grad()
def step() -> list[dict]:
    """A replay of a step's graph."""
    target, prompt = model(), prompt_of()
    forward = canvas_forward(target, slots=2, tokens=PROMPT + CANVAS, rows=CANVAS)
    cycle = CanvasCycle(forward, process(10**6), Seeded(), slots=1, length=CANVAS)
    device = dict(device="cuda")
    tokens, none = torch.tensor([prompt], **device), torch.tensor([0], **device)
    start, slot = torch.tensor([PROMPT], **device), torch.tensor([0], **device)
    for first in range(0, PROMPT, 256):
        part = tokens[:, first : first + 256]
        positions = first + torch.arange(256, **device)[None]
        forward.encode(part, positions, none + first, none + 256, slot.int())
    cycle.admit(slot, start, none, None, none + CANVAS)
    run = Runner(cycle)
    run("step", [0])
    timing = gpu_turns({"step": lambda: run("step", [0])}, graphs=False)["step"]
    if "--profile" in sys.argv:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run("step", [0])
            torch.cuda.synchronize()
        print(
            profile.key_averages().table(sort_by="cuda_time_total", row_limit=30, max_name_column_width=90), flush=True
        )
    return [{"case": "loop", "pass": "step, on the GPU", "impl": "dflash_ext", **timing.row()}]


@torch.no_grad()
def parts() -> list[dict]:
    """Attention of both layers, head, soft embedding and sampling, each beside its bound, and all of them in one graph,
    as in a step: a graph takes some microseconds of its own. A step draws and embeds by one operator; the bound is that
    of both, which are timed alone, too."""
    options = dict(device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(CANVAS, HIDDEN, **options)
    table = torch.randn(VOCAB, HIDDEN, **options) * 0.02
    logits = linear(hidden, table)
    temperature = torch.full((CANVAS,), 0.6, device="cuda")
    calls, bounds = {}, {}
    block_table = torch.zeros(1, 1, device="cuda", dtype=torch.int32)
    for kind, (kv_heads, head_dim, keys) in KINDS.items():
        capacity = PROMPT + 2 * CANVAS
        query = torch.randn(1, HEADS, CANVAS, head_dim, **options)
        caches = [torch.randn(1, kv_heads, capacity, head_dim, **options).transpose(1, 2) for _ in range(2)]
        lens = torch.tensor([PROMPT], device="cuda")
        mask = IntervalMask.decode(lens, CANVAS, kv_start=lens - keys, kv_len=capacity)
        mask = mask.plan(HEADS, kv_heads, head_dim, decode=True)
        calls[f"attention, {kind}"] = lambda q=query, c=caches, m=mask: block_attn_decode(
            q, *c, m, block_table=block_table, scale=1.0
        )
        flop = 4 * HEADS * CANVAS * (keys + CANVAS) * head_dim
        moved = 2 * 2 * ((keys + CANVAS) * kv_heads * head_dim + HEADS * CANVAS * head_dim)
        bounds[f"attention, {kind}"] = [(flop, moved)]
    product = 2 * CANVAS * VOCAB * HIDDEN
    moved = 2 * (VOCAB * HIDDEN + CANVAS * VOCAB)
    calls["head"], bounds["head"] = lambda: linear(hidden, table), [(product, moved)]
    drawing = {"temperature": temperature, "softcap": SOFTCAP}
    seed, drawn = torch.arange(CANVAS, device="cuda"), (0, 2 * CANVAS * VOCAB)
    calls["soft embedding and sampling"] = lambda: sample_and_embed(logits, table, seed, **drawing)
    bounds["soft embedding and sampling"] = [(product, moved), drawn]
    alone = {
        "soft embedding alone": lambda: soft_embedding(logits, table, **drawing),
        "sampling alone": lambda: sample(logits, seed, **drawing),
    }
    bounds |= {"soft embedding alone": [(product, moved)], "sampling alone": [drawn]}
    ceilings = runner.gpu_ceilings()
    rows, total, least = [], 0.0, 0.0
    rates = ceilings["matmul_8192_bf16_tflops"] * 1e9, ceilings["copy_tbs"] * 1e9
    for name, call in (calls | alone).items():
        call()
        timing = event_turns({name: captured(call).replay}, rounds=15)[name]  # as in a step, which is a graph
        bound = sum(max(flop / rates[0], moved / rates[1]) for flop, moved in bounds[name])
        rows.append({"case": "parts", "pass": name, "impl": "dflash_ext", **timing.row(), "bound_ms": bound})
        if name in calls:
            total, least = total + timing.ms, least + bound
    rows.append({"case": "parts", "pass": "sum", "impl": "dflash_ext", "ms": total, "bound_ms": least})
    together = captured(lambda: [call() for call in calls.values()]).replay
    timing = event_turns({"together": together}, rounds=15)["together"]
    rows.append({"case": "parts", "pass": "in one graph", "impl": "dflash_ext", **timing.row(), "bound_ms": least})
    return rows


def smollm2() -> Iterator[dict]:
    """SmolLM2-135M's shapes at batch 1: four tokens a step, masked and uniform, beside token by token on one engine.

    Its adapter is merged when it decodes, so that the base itself costs the same, and random weights do, too.
    """
    with torch.device("cuda"):
        lm = LlamaForCausalLM(SHAPES["smollm2-135m"].config).to(torch.bfloat16).eval().requires_grad_(False)
    target = Target(lm)
    width, like = target.embedding_size, {"device": "cuda", "dtype": target.dtype}
    masked = Denoiser(target, target.vocab_size, torch.zeros(width, **like))
    uniform = Denoiser(target, self_conditioning=SelfConditioning(width, 4 * width).to(**like).requires_grad_(False))
    prompt = [torch.randint(3, 49_000, (64,), generator=torch.Generator().manual_seed(0)).tolist()]
    options = dict(max_new_tokens=512, batch_size=1)
    canvas = partial(decode_canvas, prompts=prompt, canvas_length=32, **options)
    calls = {
        "token by token": lambda: decode(target, None, prompt, **options),
        "masked canvas, 4 tokens a step": lambda: canvas(masked, process=MaskedDiffusion(steps=8)),
        "uniform canvas, 4 tokens a step": lambda: canvas(uniform, process=process(8)),
    }
    for call in calls.values():  # warms up
        call()
    for turns in (1, 4):  # a first figure at once, and then the median of turns
        speeds = {name: [] for name in calls}
        for _ in range(turns):
            for name, call in calls.items():
                speeds[name].append(call().tokens_per_second)
        for impl, found in speeds.items():
            ms = 1e3 / statistics.median(found)
            yield {"case": "SmolLM2-135M, batch 1", "pass": f"a token, {turns} turns", "impl": impl, "ms": ms}


CASES = {"smollm2": smollm2, "parts": parts, "step": step, "loops": loops}


def main() -> None:
    rows, chosen = [], [word for word in sys.argv[1:] if word != "--profile"] or list(CASES)
    for name in chosen:
        for row in CASES[name]():
            rows.append(row)
            print(json.dumps(row), flush=True)
        print(runner.write(f"canvas_{runner.gpu_name()}", rows), flush=True)


if __name__ == "__main__":
    main()
