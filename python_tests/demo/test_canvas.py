"""The canvas demo with a few steps and a few small files in place of the standard library."""

import io

from rich.console import Console

from dflash_ext.demo import canvas


def test_the_whole_path(small, monkeypatch):
    for name, value in {"STEPS": 2, "NEW_TOKENS": 16, "PROMPTS": 2}.items():
        monkeypatch.setattr(canvas, name, value)
    out = io.StringIO()
    canvas.canvas_model(Console(file=out, width=160))
    shown = out.getvalue()
    for line in ("denoiser: loss ", "16 steps, left_to_right", "base, token by token", "this part took "):
        assert line in shown, shown
