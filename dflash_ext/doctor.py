"""The report of `dflash-ext doctor`: what is built, on what it runs, and what serves each operator."""

from __future__ import annotations

import os
import platform
import re

import torch
import transformers
from rich.console import Console
from rich.table import Table

from . import __version__, native
from .integrations.diffusion_gemma import static_cache_difference
from .ops.backends import NATIVE, PORTABLE, SERVED_BY


def report(console: Console) -> None:
    """Prints the state of this installation."""
    facts = Table("", "", show_header=False)
    facts.add_row("dflash_ext", __version__)
    facts.add_row("Python", platform.python_version())
    facts.add_row("torch", f"{torch.__version__}, threads: {torch.get_num_threads()}")
    facts.add_row("transformers", transformers.__version__)
    facts.add_row("its DiffusionGemma", _static_cache())
    facts.add_row("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
    facts.add_row("operator library", _operator_library())
    build = native.build_info()
    if build is None:
        facts.add_row("build", "unknown: the module with the build's facts was made for another Python")
    else:
        facts.add_row("C++ compiler", build["compiler"])
        archs = build["cuda_archs"]
        without = "none: built without nvcc or its kernels"
        facts.add_row("CUDA", f"{build['cuda_version']} for {archs}" if archs else without)
        facts.add_row("CPU kernels for", build["cpu_isas"])
    has_kernels = build is None or bool(build["kernels"])
    if has_kernels:
        facts.add_row("GPU kernels", _gpu_kernels())
    for name in ("DFLASH_EXT_CPU_ISA", "DFLASH_EXT_GPU", "DFLASH_EXT_LIBRARY"):
        if name in os.environ:
            facts.add_row(name, os.environ[name])
    console.print(facts)

    served = Table("operator", "CPU", "GPU", title="what serves each operator")
    for op, by in SERVED_BY.items():
        served.add_row(op, by["cpu"], by["cuda"] if has_kernels else _without_kernels(by["cuda"]))
    console.print(served)
    if not has_kernels:
        console.print("This build has no CUDA kernels: on a GPU, calls that need one raise an error.")
    else:
        portable = Table("operator", "calls with", title="what the portable kernels serve on a Hopper GPU")
        for op, reason in PORTABLE:
            portable.add_row(op, reason)
        console.print(portable)
    if build and build["kernels"]:
        console.print(_kernels(build["kernels"]))


def _static_cache() -> str:
    """Whether transformers' own loop over canvases may be used with a static cache, which it needs to be compiled."""
    difference = static_cache_difference()
    if difference < 1e-3:
        return "its static cache gives the logits of its dynamic one"
    return (
        f"behind a prompt as long as the sliding window its static cache is wrong (logits differ by {difference:.0%}); "
        "its dynamic cache and dflash-ext canvas are right"
    )


def _without_kernels(served_by: str) -> str:
    """What serves an operator on a GPU if no CUDA kernels were built: an error in the place of the native kernel."""
    before, native_kernel, after = served_by.partition(NATIVE)
    return f"an error{after}" if native_kernel else before


def _gpu_kernels() -> str:
    """The kind of native kernels that the first GPU uses."""
    if not torch.cuda.is_available():
        return "none used: there is no GPU"
    if torch.cuda.get_device_capability()[0] != 9:
        return "portable: the GPU is not of the Hopper generation"
    if os.environ.get("DFLASH_EXT_GPU") == "portable":
        return "portable: DFLASH_EXT_GPU asks for them"
    return "Hopper, and portable ones for some calls (below)"


def _kernels(kernels: list[dict]) -> Table:
    """One row per kernel and architecture; its instantiations are counted, their largest figures shown."""
    families: dict[tuple[str, str], list[dict]] = {}
    for kernel in kernels:
        families.setdefault((_plain_name(kernel["name"]), kernel["arch"]), []).append(kernel)
    table = Table("kernel", "arch", "variants", "registers", "shared B", "spilled B", title="CUDA kernels")
    for (name, arch), variants in sorted(families.items()):
        largest = (str(max(v[key] for v in variants)) for key in ("registers", "shared_bytes", "spill_bytes"))
        table.add_row(name, arch, str(len(variants)), *largest)
    return table


def _plain_name(signature: str) -> str:
    """`attention` of `void dflash::(anonymous namespace)::attention<float, 64>(...)`."""
    return re.split(r"[<(]", signature.replace("(anonymous namespace)::", ""))[0].split("::")[-1].split()[-1]


def _operator_library() -> str:
    try:
        return str(native.load())
    except ImportError as error:
        return f"not usable: {error}"
