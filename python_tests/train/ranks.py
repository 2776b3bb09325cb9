"""Starts processes of torchrun, and what each of them runs: a short training into the folder of the command line."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from dflash_ext.train import AnchorCollator, DraftingEvaluation, HeldOutPrompts, Recipe, train_drafter
from dflash_ext.train.drafters import parts_of
from dflash_ext.train.objectives import DFlashObjective
from dflash_ext.train.parallel import is_sharded
from dflash_ext.train.saving import replace_saved
from python_tests.tiny import MASK_TOKEN, random_prompts, tiny_pair
from python_tests.train.test_training import Cycles

STEPS, GLOBAL_BATCH = 3, 8


def torchrun(*words, processes: int = 2) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *words]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]


def train(output: Path, ranks: int, **options) -> list[dict]:
    """The same training whatever the number of ranks: fewer ranks accumulate more batches."""
    target, drafter = tiny_pair("llama")
    recipe = Recipe(
        steps=STEPS, batch_size=2, accumulation=GLOBAL_BATCH // 2 // ranks, anchors=4, log_every=1, evaluate_every=2
    )
    prompts = HeldOutPrompts(random_prompts(5, 7, 9), max_new_tokens=8)
    return train_drafter(drafter, target, Cycles(24), output, recipe, held_out=Cycles(5), prompts=prompts, **options)


def sharded(output: Path) -> None:
    """Trains a step of a drafter that FSDP2 shards, and writes it, its gradients and its figures to the folder."""
    ranks = PartialState(cpu=True)
    target, drafter = tiny_pair("llama")
    objective = DFlashObjective(drafter.train(), target)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP")
    plugin.set_auto_wrap_policy(objective)
    # What Accelerator.prepare does; an Accelerator itself shards nothing on a CPU.
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=ranks.is_main_process,
        device=ranks.device,
        torch_device_mesh=None,
        parallelism_config=None,
    )
    assert fsdp2_prepare_model(accelerator, objective) is objective and is_sharded(drafter)
    figures, weights = step_and_measure(objective, ranks.process_index, ranks.num_processes)
    replace_saved(parts_of(drafter, target, Recipe()).save, output)
    if ranks.is_main_process:
        save_file({"gradient": weights}, output / "gradient.safetensors")
        (output / "figures.json").write_text(json.dumps(figures))


def step_and_measure(objective: DFlashObjective, rank: int, ranks: int) -> tuple[dict, torch.Tensor]:
    """One step of SGD on this rank's samples; returns the figures of an evaluation, and all gradients."""
    collator = AnchorCollator(4, 6, MASK_TOKEN)
    batch = collator([Cycles()[i] | {"key": (0, 0, i)} for i in range(8)][rank::ranks])
    losses = objective(batch, *objective.of_target(batch)).losses
    (losses.sum() * ranks / 8).backward()  # gradients are averaged over ranks
    gradients = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in objective.parameters()]
    torch.optim.SGD(objective.parameters(), lr=0.1).step()
    prompts = HeldOutPrompts(random_prompts(5, 7, 9), max_new_tokens=8)
    figures = DraftingEvaluation(Cycles(5), collator, 2, prompts=prompts).measure(objective)
    return figures, torch.cat([gradient.flatten() for gradient in gradients])


if __name__ == "__main__":
    if sys.argv[1] == "sharded":
        sharded(Path(sys.argv[2]))
    else:
        train(Path(sys.argv[1]), ranks=2)
