"""Trains any objective with transformers' Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from .checkpoints import load_trained, save_trained
from .evaluation import Evaluation
from .graphs import GraphedPasses
from .losses import Losses
from .objectives import Objective
from .order import TrainingOrder
from .parallel import shard_layers
from .reporting import has_diverged


class ObjectiveTrainer(Trainer):
    """Trains the parameters of an objective that require gradients; Trainer's model is the objective itself.

    The loss of a step is the sum of its tokens' losses, divided by the sum of `Objective.divisor` over its accumulated
    batches and ranks. Which samples a step takes, and what is drawn for them, follows from `args.seed`
    (`TrainingOrder`). A checkpoint holds the trained parameters alone, whole and in safetensors.

    `args.torch_compile` compiles `Objective.trained`, in place: the names of its parameters stay, and the loss, which
    has kernels of its own, stays outside.

    Args:
        train_dataset: samples {"input_ids": int64 [S], ...} as the collator takes them.
        evaluation: what is measured every `args.eval_steps` steps and after the last one. The best checkpoint is the
            one with the best of its figures.
        cuda_graphs: whether steps run as CUDA graphs (`GraphedPasses`), on one GPU.
        identity: what checkpoints say of the run (`identity_of`).
        shares_layers: whether all ranks share each layer and train on the same batches (`share_layers`).
        kwargs: the other arguments of Trainer, `data_collator` among them.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        train_dataset: Dataset | None = None,
        evaluation: Evaluation | None = None,
        args: TrainingArguments,
        cuda_graphs: bool = False,
        identity: Mapping[str, dict] | None = None,
        shares_layers: bool = False,
        **kwargs,
    ):
        if train_dataset is not None:
            copies = 1 if shares_layers else args.world_size  # the batches that are trained on at a time
            per_step = args.train_batch_size * args.gradient_accumulation_steps * copies
            by_length = getattr(kwargs.get("data_collator"), "pack_length", None) is None
            options = dict(steps=args.max_steps, per_step=per_step, seed=args.seed, by_length=by_length)
            train_dataset = TrainingOrder(train_dataset, **options)
        if evaluation is not None:
            args.eval_strategy = IntervalStrategy.STEPS
            best, args.greater_is_better = evaluation.best
            args.metric_for_best_model = f"eval_{best}"
            args.save_total_limit = 2  # the newest and the best; with 1, Trainer removes the newest at the end
            kwargs["eval_dataset"] = evaluation.samples
        if cuda_graphs and (objective.waits or args.device.type != "cuda" or args.world_size > 1):
            raise ValueError(
                "cuda_graphs is for LoRA drafters, and for denoisers of masked noise without ar_weight, on one GPU"
            )
        if shares_layers and args.world_size < 2:
            raise ValueError("tensor parallelism needs several processes, which torchrun starts")
        if args.torch_compile:
            objective.trained.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
            args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None
        super().__init__(model=objective, args=args, train_dataset=train_dataset, **kwargs)
        if shares_layers:
            objective.share_layers(init_device_mesh(args.device.type, (args.world_size,)))
            # Accelerate would take the ranks for copies with batches of their own.
            self.accelerator.prepare_model = lambda model, **_: model
            self.accelerator.prepare_data_loader = lambda loader, **_: loader
        if self.is_fsdp_enabled:
            # FSDP2's own mixed precision casts masks, rotary tables and losses. Autocast computes as without FSDP2.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
            objective.forward = self.accelerator.autocast()(objective.forward)
            if objective.shards_target:
                shard_layers(objective.target)
        self.objective, self.identity = objective, identity or {}
        self.evaluation = evaluation
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the whole step's divisor itself
        self._meter = objective.meter()
        self._graphs = GraphedPasses(self._passes, objective.parameters()) if cuda_graphs else None

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of one step and the divisor of its loss."""
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        divisor = sum(self.objective.divisor(batch) for batch in batches)
        if self.args.world_size > 1:
            # Gradients are averaged over ranks, so the divisor is the ranks' mean.
            divisor = self.accelerator.gather(divisor.to(device).float()).mean()
        return batches, divisor

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self._graphs is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        inputs = self._prepare_inputs(inputs)
        loss, result = self._graphs(inputs, num_items_in_batch)
        self._meter.add(inputs, result)
        return loss.detach().clone()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        divisor = self.objective.divisor(inputs) if num_items_in_batch is None else num_items_in_batch
        loss, result = self._loss(model, inputs, divisor)
        self._meter.add(inputs, result)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _loss(self, model, inputs, divisor: Tensor) -> tuple[Tensor, Losses]:
        with torch.no_grad():
            of_target = self.objective.of_target(inputs)
        result = model(inputs, *of_target)
        return result.losses.sum() / divisor.clamp(min=1), result

    def _passes(self, inputs, divisor: Tensor) -> tuple[Tensor, Losses]:
        loss, result = self._loss(self.model_wrapped, inputs, divisor)
        self.accelerator.backward(loss)
        return loss, result

    def log(self, logs, *args, **kwargs):
        """Logs, beside the loss, the figure of the objective's meter since the last log.

        Raises ValueError if the loss is not finite: no later step would mend the weights.
        """
        if "loss" in logs:
            dividend, divisor = self._summed(self._meter.take())
            if divisor:
                logs[self._meter.name] = round(float(dividend / divisor), 3)
        super().log(logs, *args, **kwargs)
        if has_diverged([logs]):
            loss, step = logs["loss"], self.state.global_step
            raise ValueError(f"the training has diverged: the loss of step {step} is {loss}; try a lower learning rate")

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Takes the figures of the evaluation, logs them and returns them."""
        figures = {f"eval_{name}": figure for name, figure in self.evaluation.measure(self.objective).items()}
        self.log(figures)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the trained parameters; every rank calls it."""
        save_trained(self.objective, Path(output_dir or self.args.output_dir), self.identity)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        load_trained(self.objective, Path(resume_from_checkpoint))

    def _summed(self, figures: Tensor) -> Tensor:
        """Sums over ranks."""
        if self.args.world_size == 1:
            return figures
        return self.accelerator.reduce(figures.to(self.args.device), "sum").cpu()
