"""A denoiser's training step against SDPA with a dense mask and full logits: ``python -m bench.adapt``.

A step is the forward and the backward of one batch of 2,048 tokens a row at the shapes of Gemma 3 270M, with random
weights, a LoRA adapter of rank 16, documents of unequal lengths and 25% of the second half of each one hidden. Both
sides train the same adapter on the same batch, and both are compiled. The peer is what one would write with
transformers alone: the mask is dense, the model gives all logits, and those of hidden tokens get a cross-entropy.
"""

from __future__ import annotations

import json
import sys
from functools import partial

import torch
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from bench import runner
from bench.memory import peak_bytes
from bench.timing import gpu_turns
from dflash_ext.data import NoiseCollator
from dflash_ext.models import Adaptation, Target
from dflash_ext.train.objectives import DenoisingObjective

LENGTH, DOCUMENT = 2048, 700  # tokens of a row, and of a document on average
OURS, PEER = "dflash_ext", "SDPA, dense mask, full logits"


def gemma3_270m() -> Gemma3ForCausalLM:
    kinds = ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(18)]
    config = Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        layer_types=kinds,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        return Gemma3ForCausalLM(config).bfloat16().eval().requires_grad_(False)


def batch_of(rows: int, vocab: int) -> dict[str, Tensor]:
    """Rows of documents, of which tokens are hidden."""
    generator = torch.Generator().manual_seed(rows)
    samples = []
    for row in range(rows):
        starts = torch.randperm(LENGTH - 1, generator=generator)[: LENGTH // DOCUMENT].sort().values + 1
        ids = torch.randint(vocab, (LENGTH,), generator=generator)
        samples.append({"input_ids": ids, "starts": torch.cat([torch.zeros(1).long(), starts]), "key": (0, 0, row)})
    return {name: value.cuda() for name, value in NoiseCollator()(samples).items()}


class FullLogits(nn.Module):
    """The peer: all logits, then the cross-entropy of those of hidden tokens."""

    def __init__(self, adaptation: Adaptation):
        super().__init__()
        self.adaptation = adaptation

    def forward(self, inputs: tuple, labels: Tensor, hidden: Tensor) -> Tensor:
        logits = self.adaptation.target.model.lm_head(self.adaptation(*inputs))
        return nn.functional.cross_entropy(logits[hidden].float(), labels[hidden])


def steps(rows: int) -> dict[str, partial]:
    batch = batch_of(rows, 262144)
    made = {}
    for name in (OURS, PEER):
        target = Target(gemma3_270m())
        target.decoder.set_attn_implementation("block_attn" if name == OURS else "sdpa")
        adaptation = Adaptation.for_target(target, mask_id=4)
        objective = DenoisingObjective(adaptation)
        adaptation.compile()
        made[name] = partial(_ours, objective, batch) if name == OURS else partial(_peer, FullLogits(adaptation), batch)
    return made


def _ours(objective: DenoisingObjective, batch: dict[str, Tensor]) -> Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        loss = objective(batch).losses.sum() / objective.divisor(batch)
    loss.backward()
    return loss.detach()


def _peer(model: FullLogits, batch: dict[str, Tensor]) -> Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(model.adaptation.inputs(batch), batch["input_ids"], batch["hidden"])
    loss.backward()
    return loss.detach()


def main(*sizes: int) -> None:
    results = []
    for rows in sizes or (8, 1):
        calls = steps(rows)
        peaks = {name: (float(step()), peak_bytes(step)) for name, step in calls.items()}
        for name, timing in gpu_turns(calls, rounds=7, graphs=False).items():
            loss, peak = peaks[name]
            case = {"case": f"Gemma 3 270M, batch {rows} x {LENGTH}", "impl": name, "loss": loss, "peak_gb": peak / 1e9}
            results.append(case | timing.row() | {"tokens_per_s": 1e3 * rows * LENGTH / timing.ms})
            print(json.dumps(results[-1]), flush=True)
        ours, peer = results[-2:]
        print(f"batch {rows}: {peer['ms'] / ours['ms']:.2f} times the peer's speed", flush=True)
    (runner.RESULTS / f"adapt_{runner.gpu_name()}.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(*(int(size) for size in sys.argv[1:]))
