import io

import pytest
import torch
from rich.console import Console

import dflash_ext
from dflash_ext import doctor, native
from dflash_ext.ops.backends import PORTABLE, SERVED_BY

BUILD = {
    "version": "1",
    "compiler": "g++ 99",
    "cuda_version": "77.1",
    "cuda_archs": "80,90",
    "cpu_isas": "baseline,mmx",
}


def kernel(name, arch, registers, shared=0, spilled=0):
    return {"name": name, "arch": arch, "registers": registers, "shared_bytes": shared, "spill_bytes": spilled}


@pytest.fixture(autouse=True)
def _no_models(monkeypatch):
    monkeypatch.setattr(doctor, "static_cache_difference", lambda: 0.5)


def printed() -> list[list[str]]:
    """The cells of the rows that are printed, by line."""
    out = io.StringIO()
    doctor.report(Console(file=out, width=300))
    rows = (line.strip("│┃ ").replace("┃", "│").split("│") for line in out.getvalue().splitlines())
    return [[cell.strip() for cell in row] for row in rows]


def test_what_is_installed_and_what_serves_each_operator(monkeypatch):
    monkeypatch.setattr(native, "build_info", lambda: BUILD | {"kernels": [kernel("plain(int)", "sm_80", 7)]})
    monkeypatch.setenv("DFLASH_EXT_GPU", "portable")
    rows = printed()
    assert ["DFLASH_EXT_GPU", "portable"] in rows
    assert ["dflash_ext", dflash_ext.__version__] in rows
    assert ["operator library", str(native.PATH)] in rows
    assert ["torch", f"{torch.__version__}, threads: {torch.get_num_threads()}"] in rows
    for operator, by in SERVED_BY.items():
        assert [operator, by["cpu"], by["cuda"]] in rows
    assert all([operator, reason] in rows for operator, reason in PORTABLE)


@pytest.mark.parametrize(
    ("capability", "asked", "told"),
    [
        ((8, 0), "", "portable: the GPU is not of the Hopper generation"),
        ((9, 0), "portable", "portable: DFLASH_EXT_GPU asks for them"),
        ((9, 0), "", "Hopper, and portable ones for some calls (below)"),
    ],
)
def test_which_kernels_a_gpu_uses(monkeypatch, capability, asked, told):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(native, "build_info", lambda: BUILD | {"kernels": [kernel("plain(int)", "sm_80", 7)]})
    monkeypatch.setenv("DFLASH_EXT_GPU", asked)
    assert ["GPU kernels", told] in printed()


def test_what_is_built(monkeypatch):
    kernels = [
        kernel("void dflash::(anonymous namespace)::loss<float, 4>(dflash::Params)", "sm_80", 30, 128),
        kernel("void dflash::(anonymous namespace)::loss<half, 8>(dflash::Params)", "sm_80", 40, 64, 8),
        kernel("void dflash::(anonymous namespace)::loss<half, 8>(dflash::Params)", "sm_90", 50),
        kernel("dflash::plain(int)", "sm_80", 7),
    ]
    monkeypatch.setattr(native, "build_info", lambda: BUILD | {"kernels": kernels})
    rows = printed()
    for row in (["C++ compiler", "g++ 99"], ["CUDA", "77.1 for 80,90"], ["CPU kernels for", "baseline,mmx"]):
        assert row in rows
    assert not any("no CUDA kernels" in row[0] for row in rows)
    table = rows[rows.index(["kernel", "arch", "variants", "registers", "shared B", "spilled B"]) :]
    assert [row for row in table if row[1:2] and row[1].startswith("sm_")] == [
        ["loss", "sm_80", "2", "40", "128", "8"],
        ["loss", "sm_90", "1", "50", "0", "0"],
        ["plain", "sm_80", "1", "7", "0", "0"],
    ]


def test_a_build_without_cuda(monkeypatch):
    monkeypatch.setattr(native, "build_info", lambda: BUILD | {"cuda_version": "", "cuda_archs": "", "kernels": []})
    rows = printed()
    assert ["CUDA", "none: built without nvcc or its kernels"] in rows
    assert ["This build has no CUDA kernels: on a GPU, calls that need one raise an error."] in rows
    assert ["masked_cross_entropy", "native kernel", "an error"] in rows
    assert ["linear_cross_entropy", "PyTorch GEMM and native kernel", "an error"] in rows
    assert ["block_attn_decode", "native kernel", "an error (bf16, fp16), else plain PyTorch (reference)"] in rows
    assert ["kv_inject", "PyTorch GEMM and native kernel", "an error"] in rows
    assert ["linear", "native kernel", "an error (bf16, fp16, on Hopper), else PyTorch's operators"] in rows
    assert not any(row[0] in ("GPU kernels", "what the portable kernels serve on a Hopper GPU") for row in rows)
    assert not any("variants" in row for row in rows)


def test_what_cannot_be_told_is_said(monkeypatch):
    def load():
        raise ImportError("lib.so was not built")

    monkeypatch.setattr(native, "build_info", lambda: None)
    monkeypatch.setattr(native, "load", load)
    rows = printed()
    assert ["operator library", "not usable: lib.so was not built"] in rows
    assert ["build", "unknown: the module with the build's facts was made for another Python"] in rows
