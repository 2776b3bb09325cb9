"""The settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from .parallel import asks_for_fsdp

RATES = {"adamw": 6e-4, "muon": 5e-3}


@dataclass
class RunRecipe:
    """The settings that every training run has.

    Attributes:
        steps: optimizer steps.
        batch_size: sequences per device and forward pass.
        accumulation: forward passes per step.
        learning_rate: the peak, which a cosine decay to 0 follows. None takes that of the optimizer in `RATES`.
        optimizer: "adamw", or "muon" for the matrices and AdamW for all else (`MuonWithAdamW`).
        warmup: share of the steps over which the learning rate rises.
        seed: decides the order of the samples and what is drawn for them, together with the step and the sample's index
            in it.
        save_every: steps between the checkpoints that an interrupted run resumes from; 0 for none.
        evaluate_every: steps between evaluations; 0 for one at the end.
        log_every: steps between entries of the log.
        checkpoint_activations: compute the results of each layer again in the backward instead of keeping them.
        compile: run what is trained under torch.compile.
        cuda_graphs: record the passes of each shape of batch as a CUDA graph, which a GPU replays without waiting for
            the host. For objectives that wait for nothing (`Objective.waits`), on one GPU.
        tensor_parallel: the ranks of torchrun share each layer and train on the same batches, instead of batches of
            their own. For LoRA drafters, whose base is divided (`share_layers`).
        report_to: where Trainer sends the log, such as ("tensorboard",); each needs its package.
        trainer_args: any other arguments of transformers' TrainingArguments, by name.

    Raises:
        ValueError: a setting is out of range.
    """

    steps: int = 1000
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float | None = None
    weight_decay: float = 0.01
    optimizer: str = "adamw"
    warmup: float = 0.04
    seed: int = 0
    save_every: int = 0
    evaluate_every: int = 0
    log_every: int = 10
    checkpoint_activations: bool = False
    compile: bool = False
    cuda_graphs: bool = False
    tensor_parallel: bool = False
    report_to: tuple[str, ...] = ()
    trainer_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulation"):
            self._check_at_least_one(name)
        self._check_choice("optimizer", tuple(RATES))
        if self.learning_rate is None:
            self.learning_rate = RATES[self.optimizer]
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate}: a finite rate above 0 is needed")
        if self.tensor_parallel and asks_for_fsdp(self.trainer_args):
            raise ValueError("tensor_parallel and fsdp do not go together: one of them is supported")
        if self.tensor_parallel and self.save_every:
            raise ValueError("tensor_parallel writes no checkpoints: save_every must be 0")

    def _check_at_least_one(self, name: str) -> None:
        if getattr(self, name) < 1:
            raise ValueError(f"{name} is {getattr(self, name)}: at least 1 is needed")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ValueError(f"{name} is '{getattr(self, name)}': {', '.join(choices)} are supported")

    def _check_share(self, name: str) -> None:
        if not 0 < getattr(self, name) <= 1:
            raise ValueError(f"{name} is {getattr(self, name)}: a share above 0 and up to 1 is needed")


@dataclass
class DraftingRecipe(RunRecipe):
    """The settings of the training of any drafter. Its optimizer is Muon, of which docs/recipe.md and docs/lora.md have
    figures.

    Attributes:
        anchors: blocks drawn from each sequence.
        noise_ratio: the share of mask tokens; each kind of drafter has a rule of its own for the rest.
        block_sizes: as in `AnchorCollator`.
        pack_length: sequences share rows of this number of tokens; None gives each a row of its own.
        gamma: the decay of the loss weights over a block's slots; None weights by D-PACE.
        evaluate_prompts: the largest number of held-out prompts that an evaluation decodes.
    """

    optimizer: str = "muon"
    anchors: int = 64
    noise_ratio: float = 1.0
    block_sizes: tuple[int, ...] = ()
    pack_length: int | None = None
    gamma: float | None = None
    evaluate_prompts: int = 32

    def __post_init__(self):
        super().__post_init__()
        self._check_at_least_one("anchors")
        self._check_share("noise_ratio")
        if self.gamma is not None and not self.gamma > 0:
            raise ValueError(f"gamma is {self.gamma}: a decay above 0 is needed, or none for D-PACE weights")

    @property
    def denoising_steps(self) -> tuple[int, ...]:
        """The numbers of denoising steps that an evaluation decodes with."""
        return (1,)


@dataclass
class Recipe(DraftingRecipe):
    """The settings of a DFlash drafter's training. Defaults are the paper's where a small budget allows
    (arXiv 2602.06036), but for the optimizer.

    Attributes:
        noise_ratio: as in `AnchorCollator`. Below 1, evaluations report the tau at 1, 2 and 3 steps of denoising.
        loss, teacher_mix: as in `DFlashObjective`.
    """

    loss: str = "ce"
    teacher_mix: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        self._check_choice("loss", ("ce", "kl", "tv"))
        self._check_share("teacher_mix")

    @property
    def denoising_steps(self) -> tuple[int, ...]:
        return (1,) if self.noise_ratio == 1 else (1, 2, 3)


@dataclass
class LoraRecipe(DraftingRecipe):
    """The settings of a LoRA drafter's training.

    Attributes:
        noise_ratio: the share of drafted slots that hold the mask token (`AnchorCollator.slot_noise`).
        kl_weight: as in `LoraObjective`.
        context_ratio: as in `AnchorCollator`.
        fixed_anchors: anchors stand side by side instead of being drawn.
        forwards: as in `LoraObjective`. Evaluations decode with so many a cycle.
    """

    kl_weight: float = 0.0
    context_ratio: float | tuple[float, float] = 0.0
    fixed_anchors: bool = False
    forwards: int = 2

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.kl_weight < math.inf:
            raise ValueError(f"kl_weight is {self.kl_weight}: a finite weight from 0 on is needed")
        ratio = self.context_ratio
        least, most = ratio if isinstance(ratio, tuple) else (ratio, ratio)
        if not 0 <= least <= most < 1:
            raise ValueError(f"context_ratio is {ratio}: a share from 0 on and below 1 is needed, or two such shares")
        if self.forwards not in (1, 2):
            raise ValueError(f"forwards is {self.forwards}: 1 and 2 are supported")
        if self.forwards == 1 and self.gamma is not None:
            raise ValueError("forwards is 1: this is for D-PACE weights, and gamma is given, too")
        if self.compile:
            raise ValueError("compile is not supported for LoRA drafters: their base runs fused operators of its own")
