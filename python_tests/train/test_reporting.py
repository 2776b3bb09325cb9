import io

import pytest
from rich.console import Console

from dflash_ext.train import Recipe, train_drafter
from dflash_ext.train.reporting import summary
from python_tests.tiny import tiny_pair
from python_tests.train.test_training import Cycles


def train(tmp_path, console, capsys, steps=3, **options):
    target, drafter = tiny_pair("llama")
    recipe = Recipe(steps=steps, batch_size=4, anchors=4, log_every=1, save_every=options.pop("save_every", 0))
    log = train_drafter(drafter, target, Cycles(16), tmp_path, recipe, console=console, **options)
    printed = capsys.readouterr()
    assert "'loss'" not in printed.out  # what transformers' callbacks print
    assert all("it/s" not in line or "Writing model shards" in line for line in printed.err.splitlines())
    return log


def test_bars_say_what_is_trained_its_loss_and_what_is_evaluated(tmp_path, capsys):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    log = train(tmp_path, console, capsys, held_out=Cycles(4))
    shown = out.getvalue()
    assert "training the drafter" in shown and "3/3" in shown
    # A step is shown with the loss of the one before: it is logged after the step ended.
    assert f"loss {log[1]['loss']:.3f}, tau {log[1]['tau']:.2f}" in shown
    assert "evaluating the drafter: the loss on held-out samples" in shown and "1/1" in shown
    assert f"step 3: loss {log[3]['eval_loss']:.2f} on held-out samples\n" in shown
    # The bars are gone before the summary.
    assert shown.endswith(f"\x1b[2K{summary(log, 'drafter', 'tau', ('loss', False))}\n")


def test_a_resumed_run_counts_the_steps_that_are_left(tmp_path, capsys):
    train(tmp_path, None, capsys, steps=2, save_every=2)
    out = io.StringIO()
    train(tmp_path, Console(file=out, force_terminal=True, width=120), capsys, steps=5, resume=True)
    assert "training the drafter from step 2" in out.getvalue() and "3/3" in out.getvalue()


def test_an_exception_leaves_no_bar_open(tmp_path, capsys):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)

    class Broken(Cycles):
        def __getitem__(self, index):
            raise OSError("the disk is gone")

    target, drafter = tiny_pair("llama")
    with pytest.raises(OSError, match="the disk is gone"):
        train_drafter(drafter, target, Broken(), tmp_path, Recipe(steps=2), console=console)
    console.print("the next line")
    assert out.getvalue().endswith("the next line\n") and not console._live_stack


ABOUT = "drafter", "tau", ("loss", False)


def test_the_summary_names_both_ends_and_the_held_out_loss():
    log = [
        {"step": 10, "loss": 4.0, "tau": 1.25},
        {"step": 20, "loss": 1.5, "tau": 2.0},
        {"step": 24, "train_loss": 2.75},
    ]
    line = "drafter: loss 4.00 -> 1.50, tau 1.25 -> 2.00 on its training samples in 24 steps"
    assert summary(log, *ABOUT) == line
    assert summary([*log, {"step": 24, "eval_loss": 1.75}], *ABOUT) == (
        line + "; the drafter of step 24 is kept: loss 1.75 on held-out samples"
    )
    assert "no step left" in summary([], *ABOUT)
    assert "->" not in summary(log[:1], *ABOUT)
