"""The command line, one file a command. A command reads its input, calls the library and prints the result.

The commands import the library when they run, so that `--help` is quick.
"""

from .adapt import adapt
from .app import app
from .canvas import canvas
from .check_lossless import check_lossless
from .demo import demo
from .doctor import doctor
from .evaluate import evaluate
from .features import features
from .generate import generate
from .probe import probe
from .train import train

# In the order of the help.
for command in (demo, train, adapt, features, generate, canvas, evaluate, check_lossless, doctor, probe):
    app.command()(command)


def main() -> None:
    app()
