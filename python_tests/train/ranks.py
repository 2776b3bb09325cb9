"""Starts several processes that train together, and what each of them runs: a short training into a folder."""

import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

from dflash_ext.train import HeldOutPrompts, LoraRecipe, Recipe, train_drafter
from dflash_ext.train.parallel import is_sharded
from python_tests.models.lora.test_drafter import tiny_lora
from python_tests.tiny import random_prompts, tiny_pair
from python_tests.train.test_training import Cycles

STEPS, GLOBAL_BATCH = 3, 8


def torchrun(*words, processes: int = 2) -> str:
    """Runs a command in several processes; returns what they wrote to standard error."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *words]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def in_processes(function: Callable, *arguments, processes: int = 2) -> None:
    """Calls a function in processes that find each other as those of torchrun do.

    Unlike those of torchrun they need no seconds to import torch and transformers: they are forks of a process that has
    imported this module and done nothing else. A fork of this process, which has threads, crashed once.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ranks = [
        context.Process(target=_as_rank, args=(rank, processes, port, function, arguments)) for rank in range(processes)
    ]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join()
    assert [each.exitcode for each in ranks] == [0] * processes


def _as_rank(rank: int, processes: int, port: int, function: Callable, arguments: tuple) -> None:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in (own | there).items()}
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    function(*arguments)
    torch.distributed.destroy_process_group()


def train(
    output: Path,
    ranks: int,
    optimizer: str = "adamw",
    kind: str = "dflash",
    trainer_args: dict | None = None,
    family: str = "llama",
    settings: dict | None = None,
    device: str = "cpu",
    **options,
) -> list[dict]:
    """The same training whatever the number of ranks: fewer ranks accumulate more batches.

    kind: "dflash", or that of a LoRA drafter, whose layers are computed again in the backward.
    settings: others of the recipe.
    """
    is_lora = kind != "dflash"
    target, drafter = tiny_lora(family, kind=kind, sampler_width=8) if is_lora else tiny_pair(family)
    target.model.to(device)
    drafter.to(device)
    defaults = dict(
        steps=STEPS,
        batch_size=2,
        accumulation=GLOBAL_BATCH // 2 // ranks,
        anchors=4,
        log_every=1,
        evaluate_every=2,
        save_every=2,
        optimizer=optimizer,
        checkpoint_activations=is_lora,
        trainer_args=trainer_args or {},
    )
    recipe = (LoraRecipe if is_lora else Recipe)(**defaults | (settings or {}))
    prompts = None if is_lora else HeldOutPrompts(random_prompts(5, 7, 9), max_new_tokens=8)
    return train_drafter(drafter, target, Cycles(24), output, recipe, held_out=Cycles(5), prompts=prompts, **options)


def shard_on_a_cpu() -> None:
    """Lets Accelerate shard on a CPU, too, where it leaves a plugin of FSDP aside."""
    whole = AcceleratorState.__init__

    def sharding(self, *args, fsdp_plugin=None, **kwargs):
        whole(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)

    AcceleratorState.__init__ = sharding


class SeesParts(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        linear = model.target.layers[0].mlp.down_proj
        assert linear.weight.shape == (64, 48) and is_sharded(model)


def train_in_parts(output: Path, kind: str, family: str, settings: dict) -> None:
    """Trains with tensor parallelism."""
    DEFAULT_CALLBACKS.append(SeesParts)
    train(output, ranks=1, kind=kind, family=family, settings=settings | {"tensor_parallel": True})


class SeesShards(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        assert is_sharded(model) and is_sharded(model.target.model) == model.shards_target


def train_sharded(output: Path, optimizer: str, kind: str, trainer_args: dict, *, again: bool = False) -> None:
    """Trains with FSDP2. With `again`, once more in the folder of this name, from the checkpoint of its second step."""
    shard_on_a_cpu()
    DEFAULT_CALLBACKS.append(SeesShards)
    options = dict(ranks=2, optimizer=optimizer, kind=kind, trainer_args={"fsdp": True} | trainer_args)
    train(output, **options)
    if again:
        if PartialState().is_main_process:
            shutil.copytree(output, output / "again", ignore=shutil.ignore_patterns("checkpoint-3", "training.json"))
        PartialState().wait_for_everyone()
        train(output / "again", **options, resume=True)
