"""Shows a training run on the console: its progress with the time left, its figures, and a summary at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack

from rich.console import Console
from transformers import TrainerCallback

from ..progress import counted, progress


class TrainingProgress(TrainerCallback):
    """A callback of transformers' Trainer. As a context manager around the run, it closes the bar on an exception."""

    def __init__(self, console: Console, noun: str, figure: str):
        """`noun`: what is trained. `figure`: the name in the log of what is shown beside the loss."""
        self.console, self.noun, self.figure = console, noun, figure
        self.bars = ExitStack()
        self.note = ""
        self.shown = ""  # what the bar is about

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(self, *exception) -> None:
        self.bars.close()

    def _show(self, what: str, total: int) -> None:
        self.bars.close()  # one bar at a time
        self.shown = what
        self.advance = self.bars.enter_context(progress(self.console, what, total))

    def _show_steps(self, state, done: int = 0) -> None:
        resumed = f" from step {self.first_step}" if self.first_step else ""
        self._show(f"training the {self.noun}{resumed}", state.max_steps - self.first_step)
        self.advance(done, self.note)

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step = state.global_step
        self._show_steps(state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.note = f"loss {logs['loss']:.3f}, {self.figure} {logs.get(self.figure, math.nan):.2f}"

    def on_step_end(self, args, state, control, **kwargs):
        self.advance(1, self.note)

    def on_train_end(self, args, state, control, **kwargs):
        self.bars.close()

    def on_evaluation_progress(self, what: str, done: int, total: int) -> None:
        if (about := f"evaluating the {self.noun}: {what}") != self.shown:
            self._show(about, total)
        self.advance(1)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Prints the figures in a line of its own, and goes on with the bar of the steps."""
        self.bars.close()
        self.console.print(f"step {state.global_step}: {held_out_figures(metrics)}", highlight=False, soft_wrap=True)
        self._show_steps(state, state.global_step - self.first_step)


class LastLog(TrainerCallback):
    """Logs the figures of the last steps. Trainer itself logs only every `logging_steps` steps."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= state.global_step >= state.max_steps


def held_out_figures(entry: Mapping[str, float]) -> str:
    """The figures of an evaluation in words; `entry` is its entry in the log."""
    loss = f"loss {entry['eval_loss']:.2f} on held-out samples"
    if "eval_tau" not in entry:
        return loss
    return f"{loss}, tau {entry['eval_tau']:.2f} and {entry['eval_tokens_per_second']:.0f} tokens/s in decoding them"


def summary(log: list[dict], noun: str, figure: str, best: tuple[str, bool]) -> str:
    """One line about the log of a run: both ends of the training, and the best evaluation.

    Args:
        noun: what was trained.
        figure: the name in the log of what is shown beside the loss.
        best: as `best_evaluation` takes it.
    """
    trained = [entry for entry in log if "loss" in entry]
    if not trained:
        return f"{noun}: there was no step left to train"
    ends = [trained[0], trained[-1]] if len(trained) > 1 else trained
    figures = (
        f"{name} {' -> '.join(f'{entry.get(name, math.nan):.2f}' for entry in ends)}" for name in ("loss", figure)
    )
    line = f"{noun}: {', '.join(figures)} on its training samples in {counted(log[-1]['step'], 'step')}"
    if (kept := best_evaluation(log, best)) is None:
        return line
    return f"{line}; the {noun} of step {kept['step']} is kept: {held_out_figures(kept)}"


def has_diverged(log: list[dict]) -> bool:
    """Whether the last loss in the log is not finite."""
    losses = [entry["loss"] for entry in log if "loss" in entry]
    return bool(losses) and not math.isfinite(losses[-1])


def best_evaluation(log: list[dict], best: tuple[str, bool]) -> dict | None:
    """The log's entry with the best evaluation; None without one. Of equal ones it is the first. NaN is never the best.

    Args:
        best: the figure that counts, and whether the greatest one is the best, as `Evaluation.best` gives them.
    """
    name, is_greatest = f"eval_{best[0]}", best[1]
    known = [entry for entry in log if not math.isnan(entry.get(name, math.nan))]
    return (max if is_greatest else min)(known, key=lambda entry: entry[name], default=None)
