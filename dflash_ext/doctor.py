"""What is built, on what it runs, and what serves each operator."""

from __future__ import annotations

import platform

import torch
import transformers
from rich.console import Console
from rich.table import Table

from . import __version__, library
from .ops.serving import SERVED_BY


def report(console: Console) -> None:
    """Prints the state of this installation."""
    facts = Table("", "", show_header=False)
    facts.add_row("dflash_ext", __version__)
    facts.add_row("Python", platform.python_version())
    facts.add_row("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    facts.add_row("transformers", transformers.__version__)
    facts.add_row("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
    facts.add_row("operator library", _operator_library())
    build = library.build_info()
    if build is None:
        facts.add_row("build", "unknown: the module with the build's facts was made for another Python")
    else:
        archs = ", ".join(build["cuda_archs"]) or "none: built without nvcc"
        facts.add_row("compiler", build["compiler"])
        facts.add_row("CUDA", f"{build['cuda_version'] or '-'}; {archs}")
        facts.add_row("CPU kernels for", ", ".join(build["cpu_isas"]))
    console.print(facts)

    served = Table("operator", "CPU", "GPU", title="what serves each operator")
    for op, by in SERVED_BY.items():
        served.add_row(op, by["cpu"], by["cuda"])
    console.print(served)

    if build and build["kernels"]:
        kernels = Table("kernel", "arch", "registers", "shared B", "spilled B", title="CUDA kernels")
        for kernel in build["kernels"]:
            figures = (kernel["registers"], kernel["shared_bytes"], kernel["spill_bytes"])
            kernels.add_row(kernel["name"], kernel["arch"], *map(str, figures))
        console.print(kernels)


def _operator_library() -> str:
    try:
        return str(library.load())
    except ImportError as error:
        return f"not usable: {error}"
