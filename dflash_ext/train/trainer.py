"""Trains a DFlash drafter with transformers' Trainer. The frozen target computes the features of every batch."""

from __future__ import annotations

from itertools import islice

from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from .evaluation import Evaluation
from .objectives import DFlashObjective
from .order import TrainingOrder
from .tau import TauOfBlocks


class DFlashTrainer(Trainer):
    """Trains a drafter against a frozen target.

    The loss is the cross-entropy of each drafted slot's token under the target's frozen head, weighted by slot. It is
    divided by the sum of the weights of the whole step, over accumulated batches and ranks. D-PACE weights depend on
    the drafter, so with them it is divided by the number of blocks instead.

    Which samples a step takes, and what is drawn for them, follows from `args.seed` (`TrainingOrder`).

    Args:
        objective: the losses of its drafter, whose target is tapped at the drafter's layers and stays outside the
            trained model.
        train_dataset: samples of the target's own answers, as `AnchorCollator` describes them.
        evaluation: what is measured every `args.eval_steps` steps and after the last one. The best drafter has the
            highest tau, or without prompts the least loss.
    """

    def __init__(
        self,
        objective: DFlashObjective,
        *,
        train_dataset: Dataset | None = None,
        evaluation: Evaluation | None = None,
        args: TrainingArguments,
        **kwargs,
    ):
        objective.drafter.check_target(objective.target)
        if train_dataset is not None:
            per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            by_length = getattr(kwargs.get("data_collator"), "pack_length", None) is None
            options = dict(steps=args.max_steps, per_step=per_step, seed=args.seed, by_length=by_length)
            train_dataset = TrainingOrder(train_dataset, **options)
        if evaluation is not None:
            args.eval_strategy = IntervalStrategy.STEPS
            args.metric_for_best_model = "eval_tau" if evaluation.prompts else "eval_loss"
            args.greater_is_better = bool(evaluation.prompts)
            args.save_total_limit = 2  # the newest and the best; with 1, Trainer removes the newest at the end
            kwargs["eval_dataset"] = evaluation.samples
        super().__init__(model=objective.drafter, args=args, train_dataset=train_dataset, **kwargs)
        self.objective = objective
        self.evaluation = evaluation
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the whole step's blocks itself
        self._tau = TauOfBlocks()

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

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses, counts, correct = self.objective(model, inputs, *self.objective.of_target(inputs))
        divisor = self.objective.divisor(inputs) if num_items_in_batch is None else num_items_in_batch
        self._tau.add(inputs["anchors"], correct & counts, inputs["limits"])
        loss = losses.sum() / divisor.clamp(min=1)
        return (loss, {"loss": loss}) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        """Logs, beside the loss, the tau that greedy decoding would have had on the blocks since the last log."""
        if "loss" in logs:
            tokens, cycles = self._summed(self._tau.take())
            if cycles:
                logs["tau"] = round(float(tokens / cycles), 3)
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Measures the drafter (`Evaluation`), logs the figures and returns them."""
        figures = {f"eval_{name}": figure for name, figure in self.evaluation.measure(self.objective).items()}
        self.log(figures)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures

    def _summed(self, figures: Tensor) -> Tensor:
        """Sums over ranks."""
        if self.args.world_size == 1:
            return figures
        return self.accelerator.reduce(figures.to(self.args.device), "sum").cpu()
