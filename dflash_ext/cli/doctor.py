"""`dflash-ext doctor`."""

from __future__ import annotations

from .app import console


def doctor() -> None:
    """Say what is built, and what serves each operator."""
    from ..doctor import report

    report(console)
