"""Training on several GPUs against one GPU at an equal global batch: ``python -m bench.train_scaling [FILE]``.

It prints the samples per second, the efficiency, and how far the losses differ, with the whole drafter on every GPU
(DDP) and with its parts on all of them (FSDP2). The target has the shapes of SmolLM2-135M and random weights, and the
drafter those of the drafter that comes with the package.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, TrainerCallback

from bench.engine_models import SHAPES
from dflash_ext.models import Target
from dflash_ext.train import AnchorCollator, ObjectiveTrainer, Recipe, new_drafter
from dflash_ext.train.arguments import training_arguments
from dflash_ext.train.objectives import DFlashObjective

STEPS, WARMUP = 14, 4
GLOBAL_BATCH, BATCH, LENGTH, ANCHORS, BLOCK = 256, 32, 384, 64, 16


class Answers(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> dict:
        ids = torch.randint(3, 49152, (LENGTH,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "loss_mask": torch.arange(LENGTH) >= 64}


class Clock(TrainerCallback):
    """Measures the seconds of the steps after the warm-up."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (WARMUP, STEPS):
            torch.cuda.synchronize()
            self.seconds = time.perf_counter() - (self.began if state.global_step == STEPS else 0)
            self.began = time.perf_counter()


def rank(device: torch.device, sharded: bool) -> dict:
    """Trains as one process of torchrun; returns the losses and the samples per second of all processes."""
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(SHAPES["smollm2-135m"].config).to(torch.bfloat16).eval().requires_grad_(False)
    target = Target(model)
    drafter = new_drafter(target, 0, mask_token_id=16, num_layers=3, intermediate_size=1024, block_size=BLOCK)
    with tempfile.TemporaryDirectory() as folder:
        accumulation = GLOBAL_BATCH // BATCH // int(os.environ["WORLD_SIZE"])
        arguments = {"fsdp": True} if sharded else {}
        recipe = Recipe(
            steps=STEPS,
            batch_size=BATCH,
            accumulation=accumulation,
            anchors=ANCHORS,
            optimizer="adamw",
            log_every=1,
            trainer_args=arguments,
        )
        trainer = ObjectiveTrainer(
            DFlashObjective(drafter, Target(target.model, drafter.config.target_layer_ids)),
            args=training_arguments(Path(folder), recipe, device),
            train_dataset=Answers(),
            data_collator=AnchorCollator(ANCHORS, BLOCK, 16),
            callbacks=[clock := Clock()],
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "samples_per_second": GLOBAL_BATCH * (STEPS - WARMUP) / clock.seconds}


def of_ranks(ranks: int, kind: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        out = Path(folder) / "out.json"
        subprocess.run([*torchrun, "-m", "bench.train_scaling", "--rank", str(out), kind], check=True)
        return json.loads(out.read_text())


def main(output: str | None = None) -> None:
    """Measures what the file does not have yet."""
    rows: list[dict] = json.loads(Path(output).read_text())["runs"] if output and Path(output).exists() else []
    known = {(row["gpus"], row["kind"]) for row in rows}
    for ranks, kind in ((1, "DDP"), (2, "DDP"), (4, "DDP"), (8, "DDP"), (4, "FSDP2"), (2, "FSDP2"), (8, "FSDP2")):
        if ranks > torch.cuda.device_count() or (ranks, kind) in known:
            continue
        row = {"gpus": ranks, "kind": kind} | of_ranks(ranks, kind)
        one = rows[0] if rows else row
        row["efficiency"] = row["samples_per_second"] / one["samples_per_second"] / ranks
        row["loss_difference"] = max(abs(a - b) / a for a, b in zip(one["losses"], row["losses"], strict=True))
        rows.append(row)
        print(
            f"{ranks} GPUs, {kind}: {row['samples_per_second']:.0f} samples/s, efficiency {row['efficiency']:.2f}, "
            f"losses differ by at most {row['loss_difference']:.1e} of one GPU's",
            flush=True,
        )
        if output:
            facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "runs": rows}
            Path(output).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        local = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(local)
        result = rank(local, sys.argv[3] == "FSDP2")
        if int(os.environ["RANK"]) == 0:
            Path(sys.argv[2]).write_text(json.dumps(result))
    else:
        main(*sys.argv[1:])
