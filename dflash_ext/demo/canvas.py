"""Masked diffusion in a few minutes: a tiny causal LM is trained, adapted to fill in blocks, and decodes canvases."""

from __future__ import annotations

import tempfile
import time

from rich.console import Console

from ..data import Conversation, NoiseCollator, TextDataset, encode
from ..decode.canvas import MaskedDiffusion
from ..eval.canvas_front import Judged, base_points, canvas_points, table
from ..models import Adaptation, Target, load_denoiser
from ..noise import MaskNoise, Share
from ..train import RunRecipe, train_denoiser
from .tiny import CONTEXT, trained_on_source_code

STEPS = 300
BLOCK = 16
PROMPTS, NEW_TOKENS = 8, 64


def canvas_model(console: Console) -> None:
    """Trains, adapts, decodes with several numbers of steps, and prints quality and speed beside the base's."""
    console.rule("a tiny causal LM becomes a denoiser")
    began = time.perf_counter()
    model, tokenizer, seen, unseen = trained_on_source_code(console)
    adaptation = Adaptation.for_target(
        Target(model),
        mask_id=tokenizer.mask_token_id,
        pattern="block_causal",
        block_size=BLOCK,
        rank=32,
        alpha=64,
    )
    model.set_attn_implementation("block_attn")
    noise = NoiseCollator(MaskNoise(Share(0.1, 1.0)), Share(0.1, 0.5), BLOCK)
    with tempfile.TemporaryDirectory() as folder:
        train_denoiser(
            adaptation,
            TextDataset((text[:30_000] for text in seen), tokenizer, CONTEXT),
            folder,
            RunRecipe(steps=STEPS, batch_size=8, learning_rate=3e-3, log_every=50),
            collator=noise,
            console=console,
        )
        denoiser = load_denoiser(model, folder)
    prompts = [
        encode(Conversation(text=text[:400]), tokenizer, max_prompt_tokens=CONTEXT)
        for text in unseen[:PROMPTS]
        if text.strip()
    ]
    processes = {
        f"{steps} steps, {order}": MaskedDiffusion(steps=steps, order=order)
        for order in ("confidence", "left_to_right")
        for steps in (2, 4, 8, 16)
    }
    judged = Judged(prompts, tokenizer, Target(model), max_new_tokens=NEW_TOKENS)
    points = canvas_points(denoiser, judged, processes, canvas_length=BLOCK) | base_points(judged)
    console.print(table(points))
    for name in ("16 steps, confidence", "16 steps, left_to_right"):
        console.print(f"{name}: {points[name].answers[0]!r}", markup=False, highlight=False)
    console.print(f"this part took {time.perf_counter() - began:.0f} s")
