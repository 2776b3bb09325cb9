"""What ptxas says about every kernel, kept at build time so that no GPU is needed to read it.

    resource_usage.py compile <nvcc command>       run nvcc; keep ptxas' report beside the object
    resource_usage.py table <table> <object>...    write the reports of these objects as C++ initialisers

`compile` is the compiler launcher of the CUDA sources. It fails on serialised wgmma too, which ptxas only
mentions.
"""

import re
import subprocess
import sys
from pathlib import Path

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame"
    r", (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
QUIET = re.compile(r"ptxas info|\s+\d+ bytes stack frame")
SERIALISED = re.compile(r"wgmma.*serializ", re.IGNORECASE)


def report_of(obj: str) -> Path:
    return Path(obj + ".ptxas")


def compile_and_keep(command: list[str]) -> int:
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    lines = done.stderr.splitlines()
    serialised = [line for line in lines if SERIALISED.search(line)]
    for line in [line for line in lines if not QUIET.match(line)] + serialised:
        print(line, file=sys.stderr)
    if "-o" in command and "-c" in command:
        report_of(command[command.index("-o") + 1]).write_text(done.stderr)
    return done.returncode or (1 if serialised else 0)


def write_table(table: Path, objects: list[str]) -> None:
    rows = []
    for obj in objects:
        for entry in ENTRY.finditer(report_of(obj).read_text()):
            shared = re.search(r"(\d+) bytes smem", entry["rest"])
            spilled = int(entry["stores"]) + int(entry["loads"])
            numbers = [entry["registers"], shared[1] if shared else 0, entry["stack"], spilled]
            rows.append(f'{{"{entry["name"]}", "{entry["arch"]}", {", ".join(map(str, numbers))}}},\n')
    table.write_text("".join(sorted(rows)))


if __name__ == "__main__":
    mode, *arguments = sys.argv[1:]
    if mode == "compile":
        sys.exit(compile_and_keep(arguments))
    write_table(Path(arguments[0]), arguments[1:])
