"""What every command shares: the application, the two consoles, and how a mistake is reported."""

from __future__ import annotations

import functools
from collections.abc import Callable

import typer
from rich.console import Console

app = typer.Typer(
    name="dflash-ext",
    help="Block-diffusion drafters and lossless speculative decoding.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)


def reports_mistakes(function: Callable) -> Callable:
    """Wraps a command: what is wrong with its input becomes one line on standard error and exit code 1."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (ValueError, OSError, ImportError) as error:
            errors.print(f"dflash-ext: {error}", style="red", soft_wrap=True, markup=False, highlight=False)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            errors.print("dflash-ext: interrupted; what was computed is kept", style="red")
            raise typer.Exit(130) from None

    return run
