"""Two GPUs train a LoRA drafter as one does: with FSDP2, and as ranks that share each layer."""

import os
import sys
from pathlib import Path

import pytest
import torch

from python_tests.train.ranks import torchrun, train
from python_tests.train.test_parallel import assert_equal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two ranks need two GPUs"),
]
# Without autocast, so that sums in another order differ by the rounding of float32 alone.
WAYS = {
    "one": (1, {"bf16": False}, {}),
    "fsdp2": (2, {"bf16": False, "fsdp": True}, {}),
    "shared layers": (1, {"bf16": False}, {"tensor_parallel": True}),
}


@pytest.mark.parametrize("kind", ["gated", "whole"])
@pytest.mark.parametrize("way", ["fsdp2", "shared layers"])
def test_two_gpus_equal_one(tmp_path, way, kind):
    torchrun("--module", __name__, tmp_path / "one", "one", kind, processes=1)
    torchrun("--module", __name__, tmp_path / "two", way, kind)
    assert_equal(tmp_path / "one", tmp_path / "two")


def main(output: str, way: str, kind: str) -> None:
    ranks, trainer_args, settings = WAYS[way]
    device = f"cuda:{os.environ['LOCAL_RANK']}"
    settings |= {"save_every": 0, "kl_weight": 0.5}
    train(Path(output), ranks, kind=kind, device=device, trainer_args=trainer_args, settings=settings)


if __name__ == "__main__":
    main(*sys.argv[1:])
