"""Builds the native library with CMake. pyproject.toml has the metadata, and CMakeLists.txt defines what is built.

Environment variables: DFLASH_EXT_CUDA_ARCHS (default "80;90;90a"), DFLASH_EXT_KERNELS ("all", "none" or families such
as "loss"), DFLASH_EXT_SANITIZE=1, MAX_JOBS. nvcc is looked for in CUDACXX, CUDA_HOME, PATH and /usr/local/cuda, in this
order.
"""

import filecmp
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
PRODUCTS = ("libdflash_ext_ops.so", "_C" + sysconfig.get_config_var("EXT_SUFFIX"))
TORCH_HEADERS = ("torch/csrc/stable", "torch/headeronly", "torch/csrc/inductor/aoti_torch")


def find_program(name: str) -> str:
    """The path of cmake or ninja. The folder of this Python comes first: an inactive venv is not on PATH."""
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if not path:
        raise SetupError(f"{name} was not found beside {sys.executable} nor on PATH: pip install {name}")
    return path


def find_nvcc() -> str | None:
    if os.environ.get("CUDACXX"):
        return os.environ["CUDACXX"]
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    at_home, default = (shutil.which("nvcc", path=f"{home}/bin") if home else None for home in homes)
    return at_home or shutil.which("nvcc") or default


def package_dir(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise SetupError(f"{name} is needed to build dflash_ext: pip install {name}")
    return Path(spec.origin).parent


def mirror(source: Path, destination: Path) -> None:
    """Copies headers into the build tree and leaves unchanged files alone.

    An isolated build has torch and pybind11 in a temporary folder. If objects depended on files in that folder, every
    build would compile them again.
    """
    for header in source.rglob("*.h"):
        copy = destination / header.relative_to(source)
        if not copy.exists() or not filecmp.cmp(header, copy, shallow=False):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(header, copy)


class CMakeBuild(build_ext):
    def run(self) -> None:
        sanitize = os.environ.get("DFLASH_EXT_SANITIZE") == "1"
        build = ROOT / "build" / (sysconfig.get_config_var("SOABI") + ("-sanitize" if sanitize else ""))
        torch, pybind11 = package_dir("torch"), package_dir("pybind11")
        headers = build / "headers"
        for folder in TORCH_HEADERS:
            mirror(torch / "include" / folder, headers / "torch" / folder)
        mirror(pybind11 / "include", headers / "pybind11")

        kernels = "none" if sanitize else os.environ.get("DFLASH_EXT_KERNELS", "all")
        nvcc = None if kernels == "none" else find_nvcc()
        if nvcc is None:
            reason = "no CUDA kernels were requested" if kernels == "none" else "nvcc was not found"
            print(f"dflash_ext: {reason}: building for the CPU only", file=sys.stderr, flush=True)

        cmake = find_program("cmake")
        settings = {
            "CMAKE_MAKE_PROGRAM": find_program("ninja"),
            "CMAKE_CUDA_COMPILER": nvcc or "",
            "DFLASH_EXT_CUDA_ARCHS": os.environ.get("DFLASH_EXT_CUDA_ARCHS", "80;90;90a").replace(",", ";"),
            "DFLASH_EXT_KERNELS": kernels.replace(",", ";"),
            "DFLASH_EXT_SANITIZE": "ON" if sanitize else "OFF",
            "DFLASH_EXT_VERSION": self.distribution.get_version(),
            "Python_EXECUTABLE": sys.executable,
            "PYTHON_INCLUDE": sysconfig.get_path("include"),
            "PYTHON_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "PYBIND11_INCLUDE": headers / "pybind11",
            "TORCH_INCLUDE": headers / "torch",
            "TORCH_LIB": torch / "lib",
        }
        definitions = [f"-D{name}={value}" for name, value in settings.items()]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        try:
            subprocess.run([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *definitions], check=True)
            subprocess.run([cmake, "--build", build, "--parallel", jobs], check=True)
        except subprocess.CalledProcessError as error:
            raise SetupError("building dflash_ext failed; the compiler's messages are above") from error

        into = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        for product in PRODUCTS:
            install(build / product, into / "dflash_ext" / product)


def install(built: Path, destination: Path) -> None:
    """Copies to a temporary file and renames it, so that a process that has the old file open keeps it."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_suffix(".tmp")
    shutil.copy2(built, temporary)
    os.replace(temporary, destination)


setup(ext_modules=[Extension("dflash_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
