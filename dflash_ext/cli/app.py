"""What the commands share: the application and its options, the consoles, and the report of a mistake."""

from __future__ import annotations

import math
import os
import warnings
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from .. import __version__

console = Console()
errors = Console(stderr=True)


def console_of_this_process() -> Console:
    """Where a training shows its progress: under torchrun, the first process prints for all."""
    return Console(quiet=True) if int(os.environ.get("RANK", 0)) else console


def say(line: str, **style: str) -> None:
    """Prints one line to standard error, without wrapping or markup."""
    errors.print(line, soft_wrap=True, markup=False, highlight=False, **style)


def _is_reported(error: Exception) -> bool:
    """Whether an error comes from the input or the machine.

    The error of torch for a lack of memory is known by its name, because importing torch would slow every command down.
    """
    kinds = ValueError, OSError, ImportError, FloatingPointError
    return isinstance(error, kinds) or type(error).__name__ == "OutOfMemoryError"


def _line(message: Warning | str, *_place: object) -> str:
    """A warning without the place in the code that raised it."""
    return f"dflash-ext: {message}\n"


class Commands(TyperGroup):
    """Runs a command. An error in its input is one line on standard error, with exit code 1. A warning is one line."""

    def invoke(self, ctx: typer.Context) -> Any:
        with_place = warnings.formatwarning
        if not ctx.params["traceback"]:
            warnings.formatwarning = _line
        try:
            return super().invoke(ctx)
        except Exception as error:
            if ctx.params["traceback"] or not _is_reported(error):
                raise
            say(f"dflash-ext: {error}", style="red")
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            say("dflash-ext: interrupted; what was written so far is kept", style="red")
            raise typer.Exit(130) from None
        finally:
            warnings.formatwarning = with_place


class Command(TyperCommand):
    """A command whose numbers are finite: Python reads "nan" and "inf" as numbers, which pass most bounds."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        for option in self.params:
            value = ctx.params.get(option.name)
            for number in value if isinstance(value, list | tuple) else (value,):
                if isinstance(number, float) and not math.isfinite(number):
                    raise typer.BadParameter(f"{number} is not a finite number", ctx=ctx, param=option)
        return rest


app = typer.Typer(
    name="dflash-ext",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's help shows a type for flags, which take no value
)
# Measures models that fill in tokens; `dflash-ext evaluate` measures drafters.
evaluations = typer.Typer(
    name="eval",
    help="Measure denoisers: how well they fill in hidden tokens, and what they write how fast.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"dflash_ext {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show the traceback of an error instead of one line.")
    ] = False,
) -> None:
    """Train block-diffusion drafters and decode with them, speculatively and losslessly."""
