"""A denoiser's training step against SDPA and full logits: ``python -m bench.adapt [MODEL:BATCH...]``.

MODEL is gemma3 (the shapes of Gemma 3 270M) or gemma4 (Gemma 4 E2B), with random weights. A step is the forward and the
backward of a batch of rows of 2,048 tokens, with a LoRA adapter of rank 16, documents of unequal lengths and 25% of the
second half of each one hidden. Both sides train the same adapter on the same batch, and both are compiled. The peer is
what one would write with transformers alone: the mask is dense, the model gives all logits, and those of hidden tokens
get a cross-entropy. Each side runs as the host launches it, and as a CUDA graph, but for the largest steps, which the
host launches fast enough. The memory is that of launched steps.
"""

from __future__ import annotations

import json
import sys
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    PreTrainedModel,
)

from bench import runner
from bench.cases import BOTH
from bench.memory import peak_bytes
from bench.processes import Remote, process_turns
from bench.timing import gpu_time_in_a_row
from dflash_ext.data import NoiseCollator
from dflash_ext.models import Adaptation, Target
from dflash_ext.reference.numerics import softcapped
from dflash_ext.train.graphs import GraphedPasses
from dflash_ext.train.objectives import DenoisingObjective

VOCAB, LENGTH, DOCUMENT = 262144, 2048, 700  # tokens of a row, and of a document on average
OURS, PEER = "dflash_ext", "SDPA, dense mask, full logits"
GRAPHED = ", CUDA graph"
CASES = ("gemma3:8", "gemma3:1", "gemma4:8", "gemma4:1")
ROUNDS = 5
# Tokens of a step up to which the activations of all layers are kept. Beyond, layers are computed again, on both sides.
MOST_KEPT = {"gemma3": 8 * LENGTH, "gemma4": 4 * LENGTH}


def gemma3_270m() -> Gemma3ForCausalLM:
    config = Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        layer_types=kinds_of(18, 6),
    )
    return Gemma3ForCausalLM(config)


def gemma4_e2b() -> Gemma4ForCausalLM:
    config = Gemma4TextConfig(
        vocab_size=VOCAB,
        hidden_size=1536,
        intermediate_size=6144,
        num_hidden_layers=35,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
        global_head_dim=512,
        sliding_window=512,
        layer_types=kinds_of(35, 5),
        num_kv_shared_layers=20,
        use_double_wide_mlp=True,
        final_logit_softcapping=30.0,
    )
    return Gemma4ForCausalLM(config)


def kinds_of(layers: int, period: int) -> list[str]:
    return ["full_attention" if layer % period == period - 1 else "sliding_attention" for layer in range(layers)]


MODELS = {"gemma3": ("Gemma 3 270M", gemma3_270m), "gemma4": ("Gemma 4 E2B", gemma4_e2b)}


def model_of(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = MODELS[name][1]()
    torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


def batch_of(rows: int) -> dict[str, Tensor]:
    """Rows of documents, of which tokens are hidden."""
    generator = torch.Generator().manual_seed(rows)
    samples = []
    for row in range(rows):
        starts = torch.randperm(LENGTH - 1, generator=generator)[: LENGTH // DOCUMENT].sort().values + 1
        ids = torch.randint(VOCAB, (LENGTH,), generator=generator)
        samples.append({"input_ids": ids, "starts": torch.cat([torch.zeros(1).long(), starts]), "key": (0, 0, row)})
    return {name: value.cuda() for name, value in NoiseCollator()(samples).items()}


class Step:
    """The forward and the backward of a batch, all compiled but for the embedding: ours or the peer's."""

    def __init__(self, model: str, rows: int, implementation: str):
        target = Target(model_of(model))
        target.decoder.set_attn_implementation("block_attn" if implementation == OURS else "sdpa")
        self.adaptation = Adaptation.for_target(target, mask_id=4)
        self.objective = DenoisingObjective(self.adaptation)
        self.adaptation.compile(dynamic=False)
        self.batch = batch_of(rows)
        self.divisor = self.objective.divisor(self.batch)
        self.indices = self.batch["hidden"].nonzero(as_tuple=True)
        if is_recomputed(model, rows):
            self.adaptation.gradient_checkpointing_enable()
        self.losses_of = self.objective if implementation == OURS else self.peers
        self.graphed = GraphedPasses(self.passes, self.adaptation.parameters())
        self.launched()

    def passes(self, batch: dict[str, Tensor], divisor: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.autocast("cuda", torch.bfloat16):
            results = self.losses_of(batch)
            loss = results[0].sum() / divisor
        loss.backward()
        return loss.detach(), results

    def peers(self, batch: dict[str, Tensor]) -> tuple[Tensor]:
        target = self.adaptation.target
        states = self.adaptation(*self.adaptation.inputs(batch))
        labels = batch["input_ids"][self.indices]
        return (full_logits_losses(states, target.model.lm_head.weight, target.softcap, self.indices, labels),)

    def launched(self) -> Tensor:
        return self._step(self.passes)

    def _step(self, passes) -> Tensor:
        for parameter in self.adaptation.parameters():
            parameter.grad = None
        return passes(self.batch, self.divisor)[0]

    def time(self, is_graphed: bool) -> float:
        return gpu_time_in_a_row(lambda: self._step(self.graphed if is_graphed else self.passes))

    def peak(self) -> tuple[float, int]:
        """The loss, and the bytes that a step takes beyond what is there before it."""
        return float(self.launched()), peak_bytes(self.launched)


class Way(NamedTuple):
    """A step, and whether it is timed as a CUDA graph."""

    step: Remote
    is_graphed: bool

    def ask(self, method: str):
        return self.step.ask(method, self.is_graphed)


@torch.compile(dynamic=False)
def full_logits_losses(states: Tensor, head: Tensor, softcap: float | None, indices: tuple, labels: Tensor) -> Tensor:
    """The peer's losses: all logits, then the cross-entropy of those of hidden tokens."""
    logits = softcapped(nn.functional.linear(states, head), softcap)
    return nn.functional.cross_entropy(logits[indices].float(), labels, reduction="none")


def main(*cases: str) -> None:
    chosen = [(model, int(rows)) for model, _, rows in (case.partition(":") for case in cases or CASES)]
    # All steps of the call compile at the same time, and none is timed before all are done.
    steps = {case: {each: Remote(Step, *case, each) for each in (OURS, PEER)} for case in chosen}
    peaks = {case: peaks_of(case, of_case) for case, of_case in steps.items()}
    name, results = "_".join(f"{model}_{rows}" for model, rows in chosen), []
    for (model, rows), of_case in steps.items():
        if found := peaks[model, rows]:
            modes = (False,) if is_recomputed(model, rows) else (False, True)
            ways = {each + GRAPHED * graphed: Way(of_case[each], graphed) for graphed in modes for each in of_case}
            timings = process_turns(ways, rounds=ROUNDS)
            for way, timing in timings.items():
                loss, peak = found[way.removesuffix(GRAPHED)]
                row = {"case": f"{MODELS[model][0]}, batch {rows} x {LENGTH}", "impl": way, "pass": BOTH}
                rate = {"tokens_per_s": 1e3 * rows * LENGTH / timing.ms}
                results.append(row | timing.row() | {"loss": loss, "peak_gb": peak / 1e9} | rate)
                print(json.dumps(results[-1]), flush=True)
            ours = next(each for each in reversed(timings) if each.startswith(OURS))
            faster = ", ".join(f"{timings[each].ms / timings[ours].ms:.2f} times {each}" for each in timings)
            print(f"{row['case']}: the speed of {ours} is {faster}", flush=True)
            print(runner.write(f"adapt_{name}_{runner.gpu_name()}", results), flush=True)
        for step in of_case.values():
            step.end()


def peaks_of(case: tuple[str, int], steps: dict[str, Remote]) -> dict[str, tuple[float, int]] | None:
    """What `Step.peak` gives for both sides; None if one of them has ended, such as for want of memory."""
    try:
        return {implementation: step.ask("peak") for implementation, step in steps.items()}
    except (EOFError, OSError):
        print(f"{case}: left out, since a side of it has failed", flush=True)
        return None


def is_recomputed(model: str, rows: int) -> bool:
    return rows * LENGTH > MOST_KEPT[model]


if __name__ == "__main__":
    main(*sys.argv[1:])
