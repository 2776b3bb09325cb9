"""What a training minimises, as a module that every kind of training shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ...models import Target
from ..losses import Losses
from ..meters import Accuracy, Meter


class Objective(nn.Module):
    """The losses of a batch. `ObjectiveTrainer` trains the parameters in it that require gradients.

    The module that is trained is a submodule and is called inside `forward`, so that the hooks of DDP and FSDP act. The
    target is no submodule: it is neither trained nor sharded nor saved. Objectives differ in noise, mask and weights.

    Attributes:
        target: the frozen model that teaches.
        noun: what is trained, for messages.
        meter: makes the meter of the figure that the log has beside the loss.
        shards_target: whether FSDP shards the layers of the target, too.
        waits: whether the passes wait for the device, as a CUDA graph cannot.
    """

    noun = "model"
    meter: type[Meter] = Accuracy
    shards_target = False
    waits = True

    def __init__(self, target: Target):
        super().__init__()
        self.target = target

    @property
    def trained(self) -> nn.Module:
        """The submodule that is trained: what torch.compile compiles, and activation checkpointing acts on."""
        raise NotImplementedError

    def share_layers(self, mesh: DeviceMesh) -> None:
        """Divides every layer that runs among the ranks of a run, in place (tensor parallelism)."""
        raise ValueError("tensor parallelism is for the training of LoRA drafters")

    def of_target(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """What the frozen target gives for a batch, without gradients. `forward` takes it behind the batch."""
        return ()

    def forward(self, batch: Mapping[str, Tensor], *of_target: Tensor) -> Losses:
        """Runs the trained module on a batch of the collator."""
        raise NotImplementedError

    def divisor(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What a batch adds to the number by which the sum of a step's losses is divided: a scalar."""
        return batch["counts"].sum()

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree in to be continued, as JSON has it: names and values."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """The options of the loss, in which a checkpoint must agree, too."""
        return {}

    @property
    def _no_split_modules(self) -> list[str] | None:
        """The classes of the layers that FSDP shards one by one. Accelerate asks for them."""
        return getattr(self.trained, "_no_split_modules", None)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Makes each layer compute its results again in the backward. Trainer calls it."""
        self.trained.gradient_checkpointing_enable(**options)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """`gradient_checkpointing_enable` by the name that it has from transformers 5.24 on."""
        self.trained.activation_checkpointing_enable(**options)
