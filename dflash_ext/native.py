"""The native library: its path, its loading, and the facts of its build."""

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

# DFLASH_EXT_LIBRARY is the path of another build, such as that of `make sanitize`.
PATH = Path(os.environ.get("DFLASH_EXT_LIBRARY") or Path(__file__).with_name("libdflash_ext_ops.so")).absolute()


@cache
def load() -> Path:
    """Registers the native operators as ``torch.ops.dflash_ext`` and returns the library's path.

    Raises:
        ImportError: the library was not built, or this torch cannot load it.
    """
    if not PATH.exists():
        raise ImportError(f"{PATH} was not built: run `pip install -e .` in the source folder")
    try:
        torch.ops.load_library(str(PATH))
    except OSError as error:
        raise ImportError(
            f"torch {torch.__version__} cannot load {PATH} (torch 2.11 or later is supported): {error}"
        ) from error
    return PATH


def build_info() -> dict[str, Any] | None:
    """Facts about the build, or None when the module that holds them was built for another Python.

    Operators need none of this. Keys: ``version``, ``compiler`` (the C++ compiler's name and version, such
    as GNU 12.2.0), ``cuda_version`` and ``cuda_archs`` (both empty in a CPU-only build), ``cpu_isas``
    (instruction sets with kernels of their own), and ``kernels``. The latter has a dict for every CUDA kernel
    and architecture: ``name``, ``arch``, ``threads`` (the most in a block), ``registers`` (of a thread),
    ``shared_bytes`` (static), ``local_bytes``, ``spill_bytes``, ``occupancy`` (percent of a multiprocessor's
    warps; the dynamic shared memory of a launch may lower it).
    """
    try:
        from dflash_ext import _C
    except ImportError:
        return None
    names = ("version", "compiler", "cuda_version", "cuda_archs", "cpu_isas")
    return {name: getattr(_C, name) for name in names} | {"kernels": _C.kernels()}


def summary() -> str:
    """One line that says for what the native library was built."""
    info = build_info()
    if info is None:
        return f"native library {load()}; its build facts are of another Python"
    gpu = "no CUDA (built without nvcc, or without its kernels)"
    if info["cuda_version"]:
        gpu = f"CUDA {info['cuda_version']} for {info['cuda_archs']}, {len(info['kernels'])} kernels"
    return f"native library {info['version']}: CPU ({info['cpu_isas']}) and {gpu}"
