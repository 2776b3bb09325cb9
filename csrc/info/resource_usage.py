"""What the CUDA toolchain says about every kernel, kept at build time so that no GPU is needed to read it.

    resource_usage.py compile <nvcc command>       run nvcc; keep what it reports beside the object
    resource_usage.py table <table> <object>...    write the reports of these objects as C++ initialisers

`compile` is the compiler launcher of the CUDA sources. It fails on serialised wgmma too, which ptxas only
mentions.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

RESOURCES = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame"
    r", (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
LAUNCH_BOUND = re.compile(r"\.entry (\w+)\([^{]*?\.maxntid (\d+)")
QUIET = re.compile(r"ptxas info|\s+\d+ bytes stack frame")
SERIALISED = re.compile(r"wgmma.*serializ", re.IGNORECASE)
SHARED_BYTES = {"sm_80": 164 << 10, "sm_86": 100 << 10, "sm_89": 100 << 10, "sm_90": 228 << 10}


def report_of(obj: str) -> Path:
    return Path(obj + ".report")


def compile_and_keep(command: list[str]) -> int:
    """The report is ptxas' output and a line `bound <kernel> <threads>` for every launch bound."""
    if "-c" not in command:
        return subprocess.run(command).returncode
    obj = command[command.index("-o") + 1]
    intermediate = Path(obj + ".keep")
    intermediate.mkdir(exist_ok=True)
    keep = ["--keep", "--keep-dir", str(intermediate)]
    done = subprocess.run([*command, *keep], stderr=subprocess.PIPE, text=True)
    bounds = {bound for ptx in intermediate.glob("*.ptx") for bound in LAUNCH_BOUND.findall(ptx.read_text())}
    shutil.rmtree(intermediate)

    lines = done.stderr.splitlines()
    serialised = [line for line in lines if SERIALISED.search(line)]
    for line in [line for line in lines if not QUIET.match(line)] + serialised:
        print(line, file=sys.stderr)
    report_of(obj).write_text(done.stderr + "".join(f"bound {name} {threads}\n" for name, threads in bounds))
    return done.returncode or (1 if serialised else 0)


def occupancy(arch: str, threads: int, registers: int, shared: int) -> int:
    """Percent of a multiprocessor's 64 warps that can be resident, dynamic shared memory not counted."""
    warps = -(-threads // 32)
    registers_per_warp = -(-registers * 32 // 256) * 256
    blocks = min(64 // warps, 32, 65536 // (registers_per_warp * warps))
    limit = SHARED_BYTES.get(arch.rstrip("a"), 100 << 10)
    return 100 * min(blocks, limit // (shared + 1024)) * warps // 64


def write_table(table: Path, objects: list[str]) -> None:
    rows = []
    for obj in objects:
        report = report_of(obj).read_text()
        bounds = dict(re.findall(r"^bound (\w+) (\d+)$", report, re.MULTILINE))
        for kernel in RESOURCES.finditer(report):
            name, arch = kernel["name"], kernel["arch"]
            registers, stack = int(kernel["registers"]), int(kernel["stack"])
            spilled = int(kernel["stores"]) + int(kernel["loads"])
            found = re.search(r"(\d+) bytes smem", kernel["rest"])
            shared = int(found[1]) if found else 0
            threads = int(bounds.get(name, 1024))
            resident = occupancy(arch, threads, registers, shared)
            numbers = ", ".join(map(str, (threads, registers, shared, stack, spilled, resident)))
            rows.append(f'{{"{name}", "{arch}", {numbers}}},\n')
    table.write_text("".join(sorted(rows)))


if __name__ == "__main__":
    mode, *arguments = sys.argv[1:]
    if mode == "compile":
        sys.exit(compile_and_keep(arguments))
    write_table(Path(arguments[0]), arguments[1:])
