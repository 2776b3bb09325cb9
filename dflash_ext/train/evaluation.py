"""What is measured during training: real decoding of held-out prompts, and the loss on held-out answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import Dataset

from ..decode import Completion, Decoded, decode
from ..eval import summarize
from ..models import DFlashDrafter, Target
from .collator import AnchorCollator
from .objectives import DFlashObjective
from .order import lengths_of
from .parallel import is_sharded, whole_copy


@dataclass
class HeldOutPrompts:
    """The prompts that an evaluation decodes, greedily.

    Attributes:
        prompts: token ids.
        max_new_tokens: the largest number of tokens in an answer.
        stop_token_ids: tokens that end an answer.
        batch_size: the number of prompts that are decoded at a time.
        denoising_steps: the numbers of steps to decode with, 1 among them.
    """

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    stop_token_ids: Sequence[int] = ()
    batch_size: int = 32
    denoising_steps: Sequence[int] = (1,)


@dataclass
class Evaluation:
    """Measures a drafter while it is trained. The ranks of a run divide the work, and each gets all figures.

    Attributes:
        samples: held-out answers, as `AnchorCollator` describes samples.
        collator: makes their blocks.
        batch_size: the number of held-out answers in a forward pass.
        prompts: what is decoded; None decodes nothing.
        seed: decides the anchors, which are the same in every evaluation.
        on_progress: called with what is measured, the number of batches or prompts that are done, and of those to do.
    """

    samples: Dataset
    collator: AnchorCollator
    batch_size: int
    prompts: HeldOutPrompts | None = None
    seed: int = 0
    on_progress: Callable[[str, int, int], None] = lambda *_: None

    def measure(self, objective: DFlashObjective) -> dict[str, float]:
        """The figures of `objective.drafter`, which is in evaluation mode meanwhile.

        - `loss`: the training loss over all held-out answers as one batch, so that each label counts by its weight
          alone, and `accuracy`: the share of labels that are the drafter's most probable token.
        - With prompts, `tau`, `tokens_per_second` and `acceptance_1`, ... by drafted position, as decoding with one
          step of denoising gives them, and `tau_2_steps` and so on.
        """
        if is_sharded(objective.drafter):  # ranks have different numbers of batches and prompts
            objective = replace(objective, drafter=whole_copy(objective.drafter))
        mode = objective.drafter.training
        objective.drafter.eval()
        try:
            figures = self._loss(objective)
            for steps in self.prompts.denoising_steps if self.prompts else ():
                decoded = self._decoding(objective, steps)
                figures |= decoded if steps == 1 else {f"tau_{steps}_steps": decoded["tau"]}
            return figures
        finally:
            objective.drafter.train(mode)

    @torch.no_grad()
    def _loss(self, objective: DFlashObjective) -> dict[str, float]:
        ranks, target = PartialState(), objective.target
        order = lengths_of(self.samples).argsort(stable=True).tolist()
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        sums = torch.zeros(4, dtype=torch.float64, device=target.device)  # loss, its divisor, right labels, labels
        for number, rows in enumerate(batches):
            if number % ranks.num_processes != ranks.process_index:
                continue
            batch = self.collator([{**self.samples[row], "key": (self.seed, "held out", row)} for row in rows])
            batch = {name: value.to(target.device) for name, value in batch.items()}
            losses, counts, correct = objective(objective.drafter, batch, *objective.of_target(batch))
            figures = losses.double().sum(), objective.divisor(batch), (correct & counts).sum(), counts.sum()
            sums += torch.stack([figure.double() for figure in figures])
            self.on_progress("the loss on held-out answers", number + 1, len(batches))
        sums = torch.tensor(gather_object([sums.tolist()])).sum(dim=0).tolist()
        return {"loss": sums[0] / max(sums[1], 1), "accuracy": sums[2] / max(sums[3], 1)}

    def _decoding(self, objective: DFlashObjective, steps: int) -> dict[str, float]:
        ranks = PartialState()
        mine = self.prompts.prompts[ranks.process_index :: ranks.num_processes]
        done = count(1)
        decoded = decode_prompts(
            objective.target,
            objective.drafter,
            self.prompts,
            mine,
            steps,
            lambda *_: self.on_progress("the tau of held-out prompts", next(done), len(mine)),
        )
        parts: list[Decoded] = gather_object([decoded])
        completions: list[Completion] = [completion for part in parts for completion in part.completions]
        slowest = max(parts, key=lambda part: part.decode_seconds)
        together = Decoded(completions, decoded.draft_width, slowest.cycles)
        for part in ("draft_seconds", "verify_seconds", "commit_seconds"):
            setattr(together, part, getattr(slowest, part))
        figures = summarize(together)
        acceptance = {f"acceptance_{i}": share for i, share in enumerate(figures["acceptance"], 1)}
        return {name: figures[name] for name in ("tau", "tokens_per_second")} | acceptance


def decode_prompts(
    target: Target,
    drafter: DFlashDrafter,
    settings: HeldOutPrompts,
    prompts: Sequence[Sequence[int]],
    denoising_steps: int,
    on_finish: Callable[..., None],
) -> Decoded:
    """Decodes `prompts` greedily with a drafter in training, which gets the target's dtype as after training."""
    if not prompts:  # a rank without a prompt
        return Decoded([], drafter.config.block_size - drafter.config.first_draft_slot)
    if drafter.dtype != target.dtype:
        drafter = whole_copy(drafter, target.dtype)
    return decode(
        target,
        drafter,
        prompts,
        max_new_tokens=settings.max_new_tokens,
        stop_token_ids=settings.stop_token_ids,
        batch_size=settings.batch_size,
        denoising_steps=denoising_steps,
        on_finish=on_finish,
    )
