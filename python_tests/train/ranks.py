"""Starts processes of torchrun, and what each of them runs: a short training into the folder of the command line."""

import subprocess
import sys
from pathlib import Path

from dflash_ext.train import HeldOutPrompts, Recipe, train_drafter
from python_tests.tiny import random_prompts, tiny_pair
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


if __name__ == "__main__":
    train(Path(sys.argv[1]), ranks=2)
