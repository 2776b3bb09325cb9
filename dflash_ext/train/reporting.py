"""Shows a training run on the console: its progress with the time left, the loss and tau, and a summary at the end."""

from __future__ import annotations

from contextlib import ExitStack

from rich.console import Console
from transformers import TrainerCallback

from ..progress import progress


class TrainingProgress(TrainerCallback):
    """A callback of transformers' Trainer. As a context manager around the run, it closes the bar on an exception."""

    def __init__(self, console: Console):
        self.console = console
        self.bars = ExitStack()
        self.note = ""
        self.evaluating = False

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(self, *exception) -> None:
        self.bars.close()

    def _show(self, what: str, total: int) -> None:
        self.bars.close()  # one bar at a time
        self.advance = self.bars.enter_context(progress(self.console, what, total))

    def on_train_begin(self, args, state, control, **kwargs):
        resumed = f" from step {state.global_step}" if state.global_step else ""
        self._show(f"training the drafter{resumed}", state.max_steps - state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.note = f"loss {logs['loss']:.3f}, tau {logs['tau']:.2f}"

    def on_step_end(self, args, state, control, **kwargs):
        self.advance(1, self.note)

    def on_train_end(self, args, state, control, **kwargs):
        self.bars.close()

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if not self.evaluating:
            self._show("evaluating the drafter on held-out answers", len(eval_dataloader))
            self.evaluating = True
        self.advance(1)

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluating = False
        self.bars.close()


def summary(log: list[dict]) -> str:
    """One line about the log that `train_drafter` returns: loss and tau at both ends, and loss on held-out answers."""
    trained = [entry for entry in log if "loss" in entry]
    if not trained:
        return "drafter: there was no step left to train"
    ends = [trained[0], trained[-1]] if len(trained) > 1 else trained
    figures = (f"{name} {' -> '.join(f'{entry[name]:.2f}' for entry in ends)}" for name in ("loss", "tau"))
    line = f"drafter: {', '.join(figures)} on its training blocks in {log[-1]['step']} steps"
    held_out = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    return f"{line}; loss {held_out[-1]:.2f} on held-out answers" if held_out else line
