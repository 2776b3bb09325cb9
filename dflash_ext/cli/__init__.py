"""The command line, one file a command. A command reads its input, calls the library and prints the result.

The commands import the library when they run, so that `--help` is quick.
"""

from .adapt import adapt
from .answers import answers
from .app import Command, app, evaluations
from .canvas import canvas
from .check_lossless import check_lossless
from .demo import demo
from .doctor import doctor
from .eval_ablate import ablate
from .eval_canvas import canvas_front
from .eval_reconstruct import reconstruct
from .evaluate import evaluate
from .features import features
from .generate import generate
from .probe import probe
from .train import train

# In the order of the help.
for command in (demo, train, answers, features, adapt, generate, canvas, evaluate, check_lossless, doctor, probe):
    app.command(cls=Command)(command)
for command in (reconstruct, ablate):
    evaluations.command(cls=Command)(command)
evaluations.command("canvas", cls=Command)(canvas_front)
app.add_typer(evaluations)


def main() -> None:
    app()
