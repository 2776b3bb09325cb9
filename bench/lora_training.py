"""A LoRA drafter's training step against PEFT's plain LoRA over whole sequences: ``python -m bench.lora_training``.

A step is the forward and the backward of one sequence of 2,048 tokens at Qwen3-8B's shapes, with random weights, an
adapter of rank 64 on all linear layers, and layers that are computed again in the backward. The peer is what one would
write with PEFT and transformers: a causal language model's loss of all tokens, from all logits. A drafter's blocks of
16 slots have as many trained positions.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from bench import runner
from bench.memory import peak_bytes
from bench.timing import event_turns
from dflash_ext.models import LoraDrafter, Target
from dflash_ext.train import AnchorCollator
from dflash_ext.train.objectives import LoraObjective

LENGTH, BLOCK, RANK = 2048, 16, 64
PEER = "PEFT, causal loss of all logits"


def qwen3_8b(layers: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


def ours(model: Qwen3ForCausalLM, kind: str, kl_weight: float = 0.0) -> Callable[[], Tensor]:
    target = Target(model)
    drafter = LoraDrafter.for_target(target, mask_token_id=151935, kind=kind, block_size=BLOCK, rank=RANK).cuda()
    objective = LoraObjective(drafter, target, kl_weight=kl_weight)
    objective.gradient_checkpointing_enable()
    ids = torch.randint(151935, (LENGTH,), generator=torch.Generator().manual_seed(0))
    sample = {"input_ids": ids, "loss_mask": torch.ones(LENGTH, dtype=torch.bool), "key": (0, 0, 0)}
    batch = AnchorCollator(LENGTH // (BLOCK - 1), BLOCK, 151935)([sample])
    batch = {name: value.cuda() for name, value in batch.items()}

    def step() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            of_target = objective.of_target(batch)
            loss = objective(batch, *of_target).losses.sum() / objective.divisor(batch)
        loss.backward()
        objective.zero_grad()  # what a step takes includes its gradients
        return loss.detach()

    return step


def peer(model: Qwen3ForCausalLM) -> Callable[[], Tensor]:
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=linears))
    adapted.gradient_checkpointing_enable({"use_reentrant": False})
    adapted.enable_input_require_grads()
    adapted.train()
    ids = torch.randint(151935, (1, LENGTH), generator=torch.Generator().manual_seed(0)).cuda()

    def step() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        adapted.zero_grad()
        return loss.detach()

    return step


def main(layers: int = 36) -> None:
    model = qwen3_8b(layers)
    makers = {
        "dflash_ext, gated": partial(ours, model, "gated"),
        "dflash_ext, gated, divergence": partial(ours, model, "gated", 0.5),
        "dflash_ext, whole": partial(ours, model, "whole"),
        PEER: partial(peer, model),  # last, because PEFT changes the model
    }
    rows = []
    for name, make in makers.items():
        step = make()
        loss, peak = float(step()), peak_bytes(step)
        timing = event_turns({name: step}, rounds=5)[name]
        rows.append({"case": f"{layers} layers, {LENGTH} tokens", "impl": name, "loss": loss, "peak_gb": peak / 1e9})
        rows[-1] |= timing.row()
        print(json.dumps(rows[-1]), flush=True)
        del step
        torch.cuda.empty_cache()
    print(f"memory, gated: {rows[0]['peak_gb'] / rows[-1]['peak_gb']:.2f} of the peer's", flush=True)
    (runner.RESULTS / f"lora_training_{runner.gpu_name()}.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(*(int(layers) for layers in sys.argv[1:]))
