"""What is measured during training: real decoding of held-out prompts, and the loss on held-out answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import Dataset

from ..decode import Completion, Decoded, decode
from ..eval import summarize
from ..models import Target
from .objectives import DraftingObjective, Objective
from .order import lengths_of
from .parallel import Drafter


@dataclass
class Evaluation:
    """Measures what is trained, on held-out samples. The ranks of a run divide the work, and each gets all figures.

    Attributes:
        samples: held-out samples, as the collator takes them.
        collator: makes their batches. It draws by the samples' "key" alone.
        batch_size: the number of samples in a forward pass.
        seed: decides what is drawn, which is the same in every evaluation.
        on_progress: called with what is measured, the number of batches or prompts that are done, and of those to do.
        best: the figure by which the best checkpoint is chosen, and whether the greatest one is the best.
    """

    samples: Dataset
    collator: Callable[[list[Mapping]], dict[str, Tensor]]
    batch_size: int
    seed: int = 0
    on_progress: Callable[[str, int, int], None] = lambda *_: None
    best: tuple[str, bool] = ("loss", False)

    def measure(self, objective: Objective) -> dict[str, float]:
        """The figures of `objective`, which is in evaluation mode meanwhile."""
        mode = objective.training
        objective.eval()
        try:
            return self.figures(objective)
        finally:
            objective.train(mode)

    @torch.no_grad()
    def figures(self, objective: Objective) -> dict[str, float]:
        """`loss`: the training loss over all samples as one batch, so that each label counts by its weight alone, and
        `accuracy`: the share of labels that are the most probable token.
        """
        state, target = PartialState(), objective.target
        # Ranks that share the layers go through all batches together.
        rank, ranks = (0, 1) if target.ranks > 1 else (state.process_index, state.num_processes)
        order = lengths_of(self.samples).argsort(stable=True).tolist()
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        sums = torch.zeros(4, dtype=torch.float64, device=target.device)  # loss, its divisor, right labels, labels
        # Every rank runs the same number of batches, because a sharded objective is gathered in each of them. Those
        # beyond the last one repeat it and do not count.
        rounds = -(-len(batches) // ranks)
        for number in range(rank, rounds * ranks, ranks):
            rows = batches[min(number, len(batches) - 1)]
            batch = self.collator([{**self.samples[row], "key": (self.seed, "held out", row)} for row in rows])
            batch = {name: value.to(target.device) for name, value in batch.items()}
            losses, counts, correct = objective(batch, *objective.of_target(batch))
            found = (losses.double().sum(), objective.divisor(batch), (correct & counts).sum(), counts.sum())
            if number < len(batches):
                sums += torch.stack([figure.double() for figure in found])
                self.on_progress("the loss on held-out samples", number + 1, len(batches))
        sums = torch.tensor(gather_object([sums.tolist()])).sum(dim=0).tolist()
        return {"loss": sums[0] / max(sums[1], 1), "accuracy": sums[2] / max(sums[3], 1)}


@dataclass
class HeldOutPrompts:
    """The prompts that an evaluation decodes, greedily.

    Attributes:
        prompts: token ids.
        max_new_tokens: the largest number of tokens in an answer.
        stop_token_ids: tokens that end an answer.
        batch_size: the number of prompts that are decoded at a time.
        denoising_steps: the numbers of steps to decode with, 1 among them.
        forwards: those of a cycle, as `dflash_ext.decode.decode` takes them.
    """

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    stop_token_ids: Sequence[int] = ()
    batch_size: int = 32
    denoising_steps: Sequence[int] = (1,)
    forwards: int | None = None


@dataclass
class DraftingEvaluation(Evaluation):
    """Measures a drafter also by decoding held-out prompts with it.

    Attributes:
        prompts: what is decoded; None decodes nothing.
    """

    prompts: HeldOutPrompts | None = None

    def __post_init__(self):
        if self.prompts:
            self.best = "tau", True

    def figures(self, objective: DraftingObjective) -> dict[str, float]:
        """With prompts, also `tau`, `tokens_per_second` and `acceptance_1`, ... by drafted position, as decoding with
        one step of denoising gives them, and `tau_2_steps` and so on.
        """
        figures = super().figures(objective)
        if self.prompts:
            drafter = objective.drafter_to_decode()
            for steps in self.prompts.denoising_steps:
                decoded = self._decoding(objective.target, drafter, steps)
                figures |= decoded if steps == 1 else {f"tau_{steps}_steps": decoded["tau"]}
        return figures

    def _decoding(self, target: Target, drafter: Drafter, steps: int) -> dict[str, float]:
        ranks = PartialState()
        mine = self.prompts.prompts[ranks.process_index :: ranks.num_processes]
        decoded = Decoded([], 0)
        # With all groups, tau is the drafter's own however many prompts are decoded at a time.
        groups = drafter.config.block_size - 1 if self.prompts.forwards == 1 else None
        what = "the tau of held-out prompts" + (f" in {steps} steps" if steps > 1 else "")
        if mine:  # there may be fewer prompts than ranks
            done = count(1)
            decoded = decode(
                target,
                drafter,
                mine,
                max_new_tokens=self.prompts.max_new_tokens,
                stop_token_ids=self.prompts.stop_token_ids,
                batch_size=self.prompts.batch_size,
                denoising_steps=steps,
                forwards=self.prompts.forwards,
                groups=groups,
                on_finish=lambda *_: self.on_progress(what, next(done), len(mine)),
            )
        parts: list[Decoded] = gather_object([decoded])
        completions: list[Completion] = [completion for part in parts for completion in part.completions]
        slowest = max(parts, key=lambda part: part.decode_seconds)
        together = Decoded(completions, max(part.draft_width for part in parts), slowest.cycles)
        for part in ("draft_seconds", "verify_seconds", "commit_seconds"):
            setattr(together, part, getattr(slowest, part))
        figures = summarize(together)
        acceptance = {f"acceptance_{i}": share for i, share in enumerate(figures["acceptance"], 1)}
        return {name: figures[name] for name in ("tau", "tokens_per_second")} | acceptance
