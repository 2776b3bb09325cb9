"""The native library: what is in it, and that every part of it gives the same results."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from dflash_ext import native

ROOT = Path(__file__).parents[1]
USES_AN_OPERATOR = """
import torch
from dflash_ext import masked_cross_entropy
masked_cross_entropy(torch.ones(2, 3), torch.tensor([0, 1]))
"""


def test_an_unknown_instruction_set_is_refused():
    env = os.environ | {"DFLASH_EXT_CPU_ISA": "mmx"}
    done = subprocess.run([sys.executable, "-c", USES_AN_OPERATOR], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode and "DFLASH_EXT_CPU_ISA is 'mmx'" in done.stderr


def test_a_missing_library_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "PATH", tmp_path / "libdflash_ext_ops.so")
    with pytest.raises(ImportError, match="libdflash_ext_ops.so was not built: run `pip install -e .`"):
        native.load.__wrapped__()


def test_operators_do_not_need_the_info_module():
    code = "import sys; sys.modules['dflash_ext._C'] = None\n" + USES_AN_OPERATOR
    code += "from dflash_ext.native import build_info; assert build_info() is None"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_the_summary_says_whether_there_is_cuda():
    has_cuda = bool(native.build_info()["cuda_version"])
    assert ("no CUDA" in native.summary()) != has_cuda


def test_the_compiler_is_named():
    assert re.fullmatch(r"[A-Z]\w+ \d[\d.]+", native.build_info()["compiler"])


def test_no_kernel_spills():
    info = native.build_info()
    assert info is not None
    assert bool(info["kernels"]) == bool(info["cuda_version"])
    for kernel in info["kernels"]:
        assert kernel["spill_bytes"] == kernel["local_bytes"] == 0, kernel["name"]


def test_every_family_is_built_for_every_architecture():
    info = native.build_info()
    if not info["cuda_version"]:
        pytest.skip("a CPU-only build")
    built = {kernel["arch"] for kernel in info["kernels"]}
    assert built >= {f"sm_{arch}" for arch in info["cuda_archs"].split(",")}


def test_every_kernel_is_launched_by_the_one_helper():
    """It is what keeps the errors of one launch away from the next."""
    calls = re.compile(r"<<<|cudaLaunch\w+\(|cudaGetLastError|cudaPeekAtLastError|cudaFuncSetAttribute")
    for source in sorted((ROOT / "csrc").rglob("*.*")):
        if source.suffix in (".cu", ".h", ".cpp") and source.parent.name != "common":
            assert not calls.findall(source.read_text()), source


def test_every_kernel_has_a_name_of_its_own():
    """A profile shows names alone, so a name says what the kernel computes and for which architecture.

    A kernel that several architectures share is a template in a header, and an argument says which of them it is.
    """
    names = []
    for source in sorted((ROOT / "csrc").rglob("*.*")):
        if source.suffix not in (".cu", ".h"):
            continue
        kernels = re.findall(r"__global__ void\s+(?:__launch_bounds__\([^{;]*?\)\s+)?(\w+)\(const", source.read_text())
        if source.suffix == ".cu":
            assert kernels or "_gpu.h" in source.read_text(), source
            assert all(name.endswith(source.stem[-5:]) for name in kernels), source
        names += kernels
    assert len(names) == len(set(names)), names


def test_every_family_of_kernels_is_described():
    for source in (ROOT / "csrc").glob("*/params.h"):
        assert (source.parent / "README.md").exists(), source.parent


USES_THE_WHEEL = """
import sys, torch
from dflash_ext import IntervalMask, block_attn, native
assert native.PATH.is_relative_to(sys.prefix), native.PATH
q = torch.randn(1, 2, 5, 16)
block_attn(q, q, q, IntervalMask.causal(5))
print(native.summary())
"""


def test_a_wheel_needs_no_compiler(tmp_path):
    """It is installed into a new environment, which sees this one's packages but neither compiler nor checkout."""
    kernels = {} if native.build_info()["cuda_version"] else {"DFLASH_EXT_KERNELS": "none"}
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*build, tmp_path, ROOT], check=True, env=os.environ | kernels)
    (wheel,) = tmp_path.glob("*.whl")
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "dflash_ext").rglob("*.py")}
    assert modules <= set(zipfile.ZipFile(wheel).namelist())
    venv.create(tmp_path / "environment", with_pip=False)
    python = tmp_path / "environment/bin/python"
    packages = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    (tmp_path / "environment" / packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    elsewhere = {"cwd": tmp_path, "env": {"PATH": str(python.parent), "OMP_NUM_THREADS": "1"}, "check": True}
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", wheel]
    subprocess.run([python, *install], **elsewhere)
    used = subprocess.run([python, "-c", USES_THE_WHEEL], **elsewhere, capture_output=True, text=True)
    assert used.stdout.strip() == native.summary()
    told = subprocess.run([python.parent / "dflash-ext", "doctor"], **elsewhere, capture_output=True, text=True)
    assert "block_attn" in told.stdout
